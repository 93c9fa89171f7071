import dataclasses
import json
import logging
import os
import pickle

import numpy as np
import pytest

from nemo_dali.errors import NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan import policy as module
from nemo_dali.plan.by_epoch import ByEpoch
from nemo_dali.plan.policy import Difficulty, MosaicPolicy, read_policy, warn_if_unbounded, write_policy
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


# --- by epoch --------------------------------------------------------------------------------------------------------

WARM_UP = MosaicPolicy(p_mined=ByEpoch({0: 0.0, 5: 0.5}), p_random=0.1)
HARDER = MosaicPolicy(
    p_mined=ByEpoch({0: 0.2, 10: 0.6}, "linear"),
    p_random=ByEpoch({0: 0.4, 10: 0.0, 12: 0.3}),
    mine_after_epoch=3,
    top_k=ByEpoch({0: 400, 12: 101}, "linear"),
    max_similarity=ByEpoch({0: 0.2, 8: None}),
    max_similarity_no_target=ByEpoch({0: None, 2: 0.1}),
)


def test_an_attribute_may_be_what_a_policy_file_has_for_it():
    assert WARM_UP == MosaicPolicy(p_mined={"steps": {"0": 0, "5": 0.5}}, p_random=0.1)
    assert WARM_UP == MosaicPolicy(p_mined={"steps": {5: 0.5, 0: 0.0}}, p_random=0.1)
    with pytest.raises(ValueError, match=r"p_mined .* must have each epoch once"):
        MosaicPolicy(p_mined={"steps": {0: 0.0, "5": 0.5, 5: 0.5}})
    assert dataclasses.replace(WARM_UP, p_random={"linear": {"0": 0.1}}).p_random == ByEpoch({0: 0.1}, "linear")


def test_json_has_the_epochs_in_their_order():
    policy = MosaicPolicy(p_mined=ByEpoch({10: 0.5, 9: 0.25, 0: 0}))
    assert '"p_mined": {"steps": {"0": 0, "9": 0.25, "10": 0.5}}' in policy.to_json()
    assert json.loads(HARDER.to_json())["max_similarity"] == {"steps": {"0": 0.2, "8": None}}


@pytest.mark.parametrize("policy", [WARM_UP, HARDER, MosaicPolicy()])
def test_a_policy_is_a_value(policy, tmp_path):
    write_policy(tmp_path / "p.json", policy, tuned_for="a" * 64, why=[])
    twins = [
        *(MosaicPolicy.from_json(policy.to_json()), pickle.loads(pickle.dumps(policy)), dataclasses.replace(policy)),
        read_policy(tmp_path / "p.json")[0],
    ]
    for twin in twins:
        assert twin == policy and hash(twin) == hash(policy) and twin.to_json() == policy.to_json()
        assert [twin.difficulty(epoch) for epoch in range(20)] == [policy.difficulty(epoch) for epoch in range(20)]
    assert policy != dataclasses.replace(policy, p_mined=ByEpoch({0: 0.0, 6: 0.5}))


def test_equal_policies_have_equal_hashes():
    one = MosaicPolicy(p_mined=1, grids={2: 1, 3: 0}, top_k=ByEpoch({0: 9, 4: 8}))
    other = MosaicPolicy(p_mined=1.0, grids={3: 0.0, 2: 1.0}, top_k=ByEpoch({4: 8, 0: 9}))
    assert one == other and len({one, other}) == 1


def test_the_policy_of_an_epoch():
    assert [WARM_UP.at(epoch).p_mined for epoch in (0, 4, 5, 1000)] == [0.0, 0.0, 0.5, 0.5]
    assert HARDER.at(0) == MosaicPolicy(p_mined=0, p_random=0.2 + 0.4, top_k=400, max_similarity=0.2)
    assert HARDER.at(9).p_mined == HARDER.p_mined.at(9) == pytest.approx(0.56)
    rest = {"p_random": 0.4, "top_k": 176, "max_similarity_no_target": 0.1}
    assert HARDER.at(9) == MosaicPolicy(p_mined=HARDER.p_mined.at(9), **rest)
    assert HARDER.difficulty(12) == Difficulty(0.6, 0.3, 101, None, 0.1)
    for epoch in range(15):
        policy = HARDER.at(epoch)
        assert policy.at(epoch + 3) == policy and policy.breakpoints == [0]
    constant = MosaicPolicy(p_mined=0.3, p_random=0.2, mine_after_epoch=2)
    assert constant.at(1) == MosaicPolicy(p_mined=0, p_random=0.5) and constant.at(2).p_mined == 0.3
    assert MosaicPolicy().at(7) == MosaicPolicy()
    for wrong in (-1, 0.5, "0"):
        with pytest.raises(ValueError, match="epoch"):
            MosaicPolicy().at(wrong)


@pytest.mark.parametrize(
    ("p_mined", "p_random", "epoch"),
    [
        (ByEpoch({0: 0.2, 4: 0.8, 5: 0.2}), 0.3, 4),
        (ByEpoch({0: 0.2, 4: 0.8, 6: 0.2}, "linear"), 0.3, 4),
        (0.3, ByEpoch({0: 0.2, 4: 0.8, 6: 0.2}, "linear"), 4),
        (ByEpoch({0: 0.9, 10: 0.1}), ByEpoch({0: 0.0, 10: 0.9}, "linear"), 9),  # at every epoch named they fit
        (ByEpoch({0: 0.0, 10: 1.0}, "linear"), ByEpoch({0: 0.5, 10: 0.0}), 9),
    ],
)
def test_the_shares_must_fit_in_every_epoch(p_mined, p_random, epoch):
    with pytest.raises(ValueError, match=rf"^p_mined \+ p_random \(1\.\d+ in epoch {epoch}\) must be at most 1$"):
        MosaicPolicy(p_mined=p_mined, p_random=p_random)


def test_shares_that_fit_in_every_epoch_are_taken():
    crossing = MosaicPolicy(p_mined=ByEpoch({0: 0, 7: 1}, "linear"), p_random=ByEpoch({0: 1, 7: 0}, "linear"))
    for epoch in range(9):
        now = crossing.at(epoch)
        assert now.p_mined + now.p_random == pytest.approx(1)
    assert crossing.shown_grids == {2}
    most = dict.fromkeys(range(0, 3000, 3), 0.5)
    many = MosaicPolicy(p_mined=ByEpoch(most), p_random=ByEpoch(most, "linear"), top_k=ByEpoch(dict.fromkeys(most, 9)))
    assert len(many.turns) == 1999 and MosaicPolicy.from_json(many.to_json()) == many


STEPS = ByEpoch({0: 0.0, 5: 0.5, 9: 0.0})


@pytest.mark.parametrize(
    ("policy", "mines", "grids"),
    [
        (MosaicPolicy(p_mined=STEPS), True, {1, 2}),
        (MosaicPolicy(p_mined=0, p_random=STEPS, grids={3: 1}), False, {1, 3}),
        (MosaicPolicy(p_mined=ByEpoch({0: 0.0, 5: 1.0})), True, {1, 2}),
        (MosaicPolicy(p_mined=ByEpoch({0: 1.0, 5: 0.0}), p_random=ByEpoch({0: 0.0, 5: 1.0})), True, {2}),
        (MosaicPolicy(p_mined=ByEpoch({0: 1, 5: 0}, "linear"), p_random=ByEpoch({0: 0, 5: 1})), True, {1, 2}),
        (MosaicPolicy(p_mined=ByEpoch({0: 0.0, 7: 0.0})), False, {1}),
        (MosaicPolicy(p_mined=STEPS, mine_after_epoch=8), True, {1, 2}),
        (MosaicPolicy(p_mined=STEPS, mine_after_epoch=9), False, {1, 2}),  # random ones until then, none from then on
        (MosaicPolicy(mine_after_epoch=10**9), True, {1, 2}),
    ],
)
def test_what_a_policy_does_in_any_epoch(policy, mines, grids):
    assert policy.mines is mines
    assert policy.shown_grids == grids and policy.largest_grid == max(grids)
    assert policy.shown_grids == {grid for epoch in range(20) for grid in policy.at(epoch).shown_grids}


@pytest.mark.parametrize(
    ("policy", "where"),
    [
        (MosaicPolicy(), ""),
        (MosaicPolicy(max_similarity=0.3), None),
        (MosaicPolicy(p_mined=STEPS), ""),
        (MosaicPolicy(p_mined=STEPS, max_similarity=ByEpoch({0: None, 5: 0.3, 9: None})), None),
        (MosaicPolicy(p_mined=STEPS, max_similarity=ByEpoch({0: None, 5: 0.3, 8: None})), " in epoch 8"),
        (MosaicPolicy(max_similarity=ByEpoch({0: 0.3, 6: None})), " in epoch 6"),
        (MosaicPolicy(max_similarity=ByEpoch({0: None, 6: 0.3}), mine_after_epoch=6), None),
        (MosaicPolicy(max_similarity=ByEpoch({0: None, 6: 0.3}), mine_after_epoch=5), " in epoch 5"),
        # A share that begins at 0 and rises, while there is no bound yet.
        (
            MosaicPolicy(p_mined=ByEpoch({0: 0, 6: 0.5}, "linear"), max_similarity=ByEpoch({0: None, 6: 0.3})),
            " in epoch 5",
        ),
    ],
)
def test_an_epoch_that_mines_without_a_bound_is_told(policy, where, caplog):
    module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        warn_if_unbounded(policy)
    module._warn_once.cache_clear()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == (
        [] if where is None else [f"max_similarity is None{where}"]
    )


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
        ("[1]", "not a JSON object"),
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
        ('{"why": ["' + "x" * 2**20 + '"]}', "more than the limit of 1,048,576"),
        ('{"top_k": 50, "top_k": 60}', "the key 'top_k' is in an object twice"),
        ('{"p_mined": {"steps": {"0": 0, "5": 0.5, "5": 0.6}}}', "the key '5' is in an object twice"),
        (
            '{"p_mined": {"0": 0, "5": 0.5}}',
            r'p_mined \(.*\) must be a number, or numbers by their epochs as in \{"steps',
        ),
        ('{"p_mined": {}}', r"p_mined \(\{\}\) must be a number, or"),
        ('{"p_mined": {"steps": {"0": 0}, "linear": {"0": 0}}}', "p_mined .* must be a number, or"),
        ('{"p_mined": {"cosine": {"0": 0}}}', "p_mined .* must be a number, or"),
        ('{"p_mined": {"steps": [0, 0.5]}}', "p_mined .* must be a number, or"),
        ('{"p_mined": {"steps": {}}}', r"p_mined: values \(\{\}\) must be 1 to 1,000 values by epoch"),
        ('{"p_mined": {"steps": {"1": 0.5}}}', "p_mined: values .* must have epochs as keys.* and 0 among them"),
        *(
            (f'{{"p_mined": {{"steps": {{"0": 0, "{epoch}": 0.5}}}}}}', "p_mined: values .* must have epochs as keys")
            for epoch in ("-1", "1.5", "1e3", "00", "+5", " 5", "1_0", "\u0665", "five", "9" * 19, "9" * 5000)
        ),
        ('{"p_mined": {"linear": {"0": 0, "5": NaN}}}', r"p_mined: values \(nan in epoch 5\) must be numbers"),
        ('{"p_mined": {"steps": {"0": null}}}', r"p_mined \(None in epoch 0\) must be a number between 0 and 1"),
        ('{"p_mined": {"steps": {"0": {"steps": {"0": 0}}}}}', "p_mined: values .* in epoch 0.* must be numbers"),
        ('{"p_mined": {"steps": ' + '{"0": ' * 10**5, "recursion"),
        (
            '{"p_mined": {"steps": {"0": 0.5, "5": 1.5}}}',
            r"p_mined \(1.5 in epoch 5\) must be a number between 0 and 1",
        ),
        ('{"p_mined": {"linear": {"0": 0.5, "1": 1}}, "p_random": 0.3}', r"p_mined \+ p_random \(1.3 in epoch 1\)"),
        ('{"top_k": {"linear": {"0": 400, "5": 99.5}}}', r"top_k \(99.5 in epoch 5\) must be a whole number"),
        ('{"top_k": {"steps": {"0": 400, "5": 2}}}', r"top_k \(2 in epoch 5\) must be a whole number between 3"),
        ('{"max_similarity": {"steps": {"0": 2}}}', r"max_similarity \(2 in epoch 0\) must be None or a number"),
        ('{"max_similarity": {"linear": {"0": null, "5": 0.3}}}', r"max_similarity: values \(None in epoch 0\)"),
        ('{"jitter": {"steps": {"0": 0.1}}}', r"jitter \(.*\) must be a number between 0 and 0.5"),
        ('{"mine_after_epoch": {"steps": {"0": 1}}}', r"mine_after_epoch \(.*\) must be a whole number"),
        ('{"p_mined": {"steps": {' + ", ".join(f'"{e}": 0' for e in range(1001)) + "}}}", "a dict of 1001 values"),
        (
            '{"p_mined": {"steps": {' + ", ".join(f'"{e}": 0' for e in range(10**6)) + "}}}",
            "more than the limit of 1,048,576",
        ),
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
    for path, reason in ((tmp_path / "p.json", "it is not a regular file"), ("/dev/zero", "it is not a regular file")):
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
    policies += [WARM_UP, HARDER]
    seeds = [policy.to_json().encode() for policy in policies]
    seeds.append(seeds[0][:-1] + b', "tuned_for": "ab", "why": ["one", "two"]}')
    assert fuzz(read_policy, seeds, mutate, tmp_path / "p.json", examples(5000)) > 0


def test_a_loader_takes_a_policy_file(files, tmp_path, caplog):
    table = NegativeTable.open(files.negatives)
    policy = MosaicPolicy(p_mined=1.0, max_similarity=0.25, top_k=5)
    write_policy(tmp_path / "p.json", policy, tuned_for=table.fingerprint, why=[])
    loader = Loader(files.dataset, files.negatives, batch_size=4, size=48, policy=tmp_path / "p.json")
    assert loader.policy == policy and "tuned for a different" not in caplog.text
    given = Loader(files.dataset, files.negatives, batch_size=4, size=48, policy=policy)
    np.testing.assert_array_equal(loader.plan(0, range(8)), given.plan(0, range(8)))
    write_policy(tmp_path / "p.json", policy, tuned_for="0" * 64, why=[])
    Loader(files.dataset, files.negatives, batch_size=4, size=48, policy=str(tmp_path / "p.json"))
    assert "p.json was tuned for a different negative table" in caplog.text
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
