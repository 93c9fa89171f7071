import dataclasses
import json

import numpy as np
import pytest

from nemo_dali.errors import NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import MosaicPolicy, read_policy, write_policy


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
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        MosaicPolicy(**wrong)


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
    ],
)
def test_a_file_that_is_no_policy_is_told_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "p.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(NemoError, match=rf"policy file .*p\.json cannot be.*{words}.*nemo-dali tune") as error:
        read_policy(tmp_path / "p.json")
    assert "\n" not in str(error.value)


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
