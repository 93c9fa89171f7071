import dataclasses
import json
import os

import numpy as np
import pytest

from nemo_dali.errors import NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import MosaicPolicy, read_policy, write_policy
from tests.helpers.bounds import fuzz, mutate_bytes
from tests.helpers.counts import examples


def test_defaults_are_the_documented_ones():
    assert dataclasses.asdict(MosaicPolicy()) == {
        "p_mined": 0.5,
        "p_random": 0.0,
        "mine_after_epoch": 0,
        "top_k": 100,
        "max_similarity": None,
        "max_similarity_no_target": None,
        "grids": {2: 1.0},
        "jitter": 0.0,
        "target_cell": "uniform",
    }


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


WEIRD = [10**400, -(10**5000), float("nan"), None, "0.5", "x" * 10**6, "\x1b[31m", [0.5], {"a": 1}, nested(10**5)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"p_mined": -0.1},
        {"p_mined": 1.5},
        {"p_mined": float("nan")},
        {"p_mined": 0.7, "p_random": 0.4},
        {"mine_after_epoch": -1},
        {"top_k": 2},
        {"top_k": 7, "grids": {3: 1.0}},
        {"max_similarity": 1.5},
        {"max_similarity_no_target": -1.5},
        {"grids": {}},
        {"grids": {4: 1.0}},
        {"grids": {2: -1.0, 3: 2.0}},
        {"grids": {2: 0.0}},
        {"grids": {2: float("nan")}},
        {"jitter": 0.6},
        {"jitter": -0.1},
        {"target_cell": "left"},
        *({name: value} for name in ("p_mined", "p_random", "jitter") for value in WEIRD),
        *({name: value} for name in ("mine_after_epoch", "top_k") for value in (*WEIRD, 5.0, 1e300, float("inf"))),
        *(
            {name: value}
            for name in ("max_similarity", "max_similarity_no_target")
            for value in WEIRD
            if value is not None
        ),
        *({"grids": value} for value in WEIRD),
        *({"grids": {2: value}} for value in WEIRD),
        {"grids": {2: 1.7e308, 3: 1.7e308}},
        {"grids": {(2,): 1.0}},
        {"grids": {10**5000: 1.0}},
        {"target_cell": ["uniform"]},
        {"target_cell": {}},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_value_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)) as caught:
        MosaicPolicy(**wrong)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_policy_is_frozen_and_keeps_its_own_grids():
    grids = {2: 1.0}
    policy = MosaicPolicy(grids=grids)
    grids[3] = 1.0
    assert policy.grids == {2: 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.p_mined = 1.0


@pytest.mark.parametrize(
    ("policy", "grid"),
    [
        (MosaicPolicy(p_mined=0), 1),
        (MosaicPolicy(), 2),
        (MosaicPolicy(grids={2: 1, 3: 0.0}), 2),
        (MosaicPolicy(grids={2: 1, 3: 0.1}), 3),
    ],
)
def test_largest_grid(policy, grid):
    assert policy.largest_grid == grid
    assert policy.most_negatives == grid**2 - 1


def test_json_round_trip():
    policy = MosaicPolicy(p_mined=0.3, max_similarity=0.25, grids={2: 1.0, 3: 2.0}, target_cell="positional")
    assert MosaicPolicy.from_json(policy.to_json()) == policy
    for wrong in ('{"p_mind": 1}', "[]", "{"):
        with pytest.raises(ValueError):
            MosaicPolicy.from_json(wrong)


# --- policy files ----------------------------------------------------------------------------------------------------


def test_a_policy_file_comes_back_as_written(tmp_path):
    policy = MosaicPolicy(max_similarity=0.28, top_k=50, grids={2: 1.0, 3: 0.5}, target_cell="positional")
    write_policy(tmp_path / "p.json", policy, tuned_for="a" * 64, why=["because"])
    assert read_policy(tmp_path / "p.json") == (policy, "a" * 64)
    assert json.loads((tmp_path / "p.json").read_text())["why"] == ["because"]
    write_policy(tmp_path / "p.json", MosaicPolicy(), tuned_for="b" * 64, why=[])
    assert read_policy(tmp_path / "p.json") == (MosaicPolicy(), "b" * 64)


def test_a_policy_file_may_be_written_by_hand(tmp_path):
    (tmp_path / "p.json").write_text('{"max_similarity": 0.3}')
    assert read_policy(tmp_path / "p.json") == (MosaicPolicy(max_similarity=0.3), None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "double quotes"),
        ("[1]", "no JSON object"),
        ('{"tau": 0.3}', "keys among"),
        ('{"top_k": 1}', r"top_k \(1\)"),
        ('{"max_similarity": "high"}', r"max_similarity \('high'\)"),
        ('{"grids": {"two": 1}}', "'two'"),
        ("\ud800", "utf-8"),
        ("[" * 10**5, "recursion"),
        ('{"why": ' + "[" * 10**5, "recursion"),
        ('{"top_k": ' + "9" * 400 + "}", r"top_k \(a number of 1329 bits\)"),
        ('{"top_k": ' + "9" * 10**5 + "}", "4300 digits"),
        ('{"p_mined": 1e400}', r"p_mined \(inf\)"),
        ('{"p_mined": NaN}', r"p_mined \(nan\)"),
        ('{"grids": {"2": 1.7e308, "3": 1.7e308}}', "as weights"),
        ('{"grids": {"2": {}}}', "as weights"),
        ('{"grids": {"' + "2" * 5000 + '": 1}}', "must weigh 2"),
        ('{"tuned_for": [[]]}', r"tuned_for \(\[\[\]\]\)"),
        ('{"why": ["' + "x" * 2**20 + '"]}', "at most 1,048,576 are read"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_is_no_policy_is_told_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "p.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(NemoError, match=rf"policy file .*p\.json cannot be.*{words}.*nemo-dali tune") as error:
        read_policy(tmp_path / "p.json")
    assert "\n" not in str(error.value)


def test_a_pipe_is_no_policy_file_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.json")
    for path, reason in ((tmp_path / "p.json", "it is no regular file"), ("/dev/zero", "it is no regular file")):
        with pytest.raises(NemoError, match=reason):
            read_policy(path)


PIECES = [
    *(b"1e999", b"-1", b"NaN", b"Infinity", b"9" * 400, b"9" * 5000, b"true", b"null", b"[", b"{", b"]", b"}", b"[[]]"),
    *(b'"x"', b'"2"', b'"grids"', b'"p_mined": 2', b'"\\ud800"', b"1.7e308", b"\xff", b"\0", b"0.5", b",", b":"),
]


def mutate(random, seeds):
    return mutate_bytes(random, seeds, pieces=PIECES)


@pytest.mark.fuzz
def test_any_file_is_a_policy_or_refused(tmp_path):
    policies = [MosaicPolicy(), MosaicPolicy(grids={2: 1, 3: 2.5}, max_similarity=0.3, max_similarity_no_target=0.2)]
    seeds = [policy.to_json().encode() for policy in policies]
    seeds.append(seeds[0][:-1] + b', "tuned_for": "ab", "why": ["one", "two"]}')
    assert fuzz(read_policy, seeds, mutate, tmp_path / "p.json", examples(5000)) > 0


def test_a_loader_takes_a_policy_file(files, tmp_path, caplog):
    table = NegativeTable.open(files.negatives)
    policy = MosaicPolicy(p_mined=1.0, max_similarity=0.25, top_k=5)
    write_policy(tmp_path / "p.json", policy, tuned_for=table.fingerprint, why=[])
    loader = Loader(files.dataset, files.negatives, batch_size=4, size=48, policy=tmp_path / "p.json")
    assert loader.policy == policy and "tuned for another" not in caplog.text
    given = Loader(files.dataset, files.negatives, batch_size=4, size=48, policy=policy)
    np.testing.assert_array_equal(loader.plan(0, range(8)), given.plan(0, range(8)))
    write_policy(tmp_path / "p.json", policy, tuned_for="0" * 64, why=[])
    Loader(files.dataset, files.negatives, batch_size=4, size=48, policy=str(tmp_path / "p.json"))
    assert "p.json was tuned for another negative table" in caplog.text
    with pytest.raises(NemoError, match="policy file"):
        Loader(files.dataset, files.negatives, batch_size=4, size=48, policy="nowhere.json")


@pytest.mark.parametrize(
    ("policy", "grids"),
    [
        (MosaicPolicy(), {1, 2}),
        (MosaicPolicy(p_mined=1.0), {2}),
        (MosaicPolicy(p_mined=0.4, p_random=0.6, grids={3: 1.0, 2: 0.0}), {3}),
        (MosaicPolicy(p_mined=0.0), {1}),
        (MosaicPolicy(p_mined=0.0, p_random=0.1, grids={2: 1.0, 3: 2.0}), {1, 2, 3}),
    ],
)
def test_which_grids_a_policy_shows(policy, grids):
    assert policy.shown_grids == grids
