import dataclasses

import pytest

from nemo_dali.policy import MosaicPolicy


def test_defaults_are_the_documented_ones():
    assert dataclasses.asdict(MosaicPolicy()) == {
        "p_mined": 0.5,
        "p_random": 0.0,
        "mine_after_epoch": 0,
        "top_k": 100,
        "max_similarity": None,
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
