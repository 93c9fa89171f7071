"""A policy that changes with the epoch, in the Loader: each epoch by its own, whatever is made ahead or resumed."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError, StateError
from nemo_dali.kernels.plan.rows import MINED, SINGLE
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.by_epoch import ByEpoch
from nemo_dali.plan.policy import MosaicPolicy, write_policy
from nemo_dali.tiles.build import make_tiles
from tests.helpers.files import make_files

EPOCHS, STEPS, SIZE = 4, 6, 32
CHANGING = MosaicPolicy(
    p_mined=ByEpoch({0: 0.0, 1: 0.5, 3: 0.8}),
    p_random=ByEpoch({0: 0.0, 3: 0.2}, "linear"),
    top_k=ByEpoch({0: 20, 3: 8}, "linear"),
    max_similarity=ByEpoch({0: 0.5, 2: 0.3}),
    grids={2: 1.0, 3: 1.0},
)


def make(files, **options):
    defaults = {"batch_size": 8, "size": SIZE, "dtype": "uint8", "context_length": 16, "num_threads": 1}
    return Loader(files.dataset, files.negatives, **{**defaults, "policy": CHANGING, **options})


def plans(loader):
    return [batch.plan for batch in loader]


@pytest.fixture(scope="module")
def epochs(files):
    """The rows of each epoch's steps, by Loaders whose policy is that of the epoch alone."""
    found = []
    for epoch in range(EPOCHS):
        loader = make(files, policy=CHANGING.at(epoch))
        loader.set_epoch(epoch)
        found.append(plans(loader))
    return found


def same(found, expected):
    return [step.tobytes() for step in found] == [step.tobytes() for step in expected]


@pytest.mark.parametrize("prefetch", [1, 2, 9])
@pytest.mark.parametrize("infinite", [False, True])
def test_what_is_made_ahead_of_an_epochs_end_is_of_the_next_epochs_policy(files, epochs, prefetch, infinite):
    loader = make(files, prefetch=prefetch, infinite=infinite)
    if infinite:
        found = [batch.plan for batch in islice(loader, EPOCHS * STEPS)]
        found = [found[first : first + STEPS] for first in range(0, EPOCHS * STEPS, STEPS)]
    else:
        found = [plans(loader) for _ in range(EPOCHS)]
    loader.close()
    for own, expected in zip(found, epochs, strict=True):
        assert same(own, expected)
    kinds = [np.concatenate(own)["kind"] for own in found]
    assert (kinds[0] == SINGLE).all() and (kinds[1] == MINED).any() and (kinds[3] != SINGLE).all()


@pytest.mark.parametrize(("world_before", "world_after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("before", [2, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 3])
def test_a_resume_within_an_epoch_and_across_a_change_on_any_number_of_ranks(
    files, epochs, before, world_before, world_after
):
    def ranks(world):
        return [make(files, batch_size=8 // world, rank=rank, world_size=world) for rank in range(world)]

    interrupted = ranks(world_before)[-1]
    done = 0
    while done < before:
        done += sum(1 for _ in zip(range(before - done), interrupted, strict=False))
    state = json.loads(json.dumps(interrupted.state_dict()))
    interrupted.close()
    after = ranks(world_after)
    for loader in after:
        loader.load_state_dict(state)
    found = []
    while after[0].epoch < EPOCHS:
        found += [np.concatenate(step) for step in zip(*map(plans, after), strict=True)]
    assert same(found, [step for own in epochs for step in own][before:])


def test_a_state_of_another_schedule_is_refused_and_says_where_they_differ(files):
    later = dict.fromkeys(range(10, 40, 2), 0.25)
    policy = replace(CHANGING, p_mined=ByEpoch({0: 0.0, 1: 0.5, **later, 50: 0.75}))
    state = make(files, policy=policy).state_dict()
    for other, words in (
        (
            ByEpoch({0: 0.0, 1: 0.5, **later, 51: 0.75}),
            r'p_mined \.\.\..*"50": 0\.75\}\}, here \.\.\..*"51": 0\.75\}\}',
        ),
        (ByEpoch({**policy.p_mined.values}, "linear"), r'p_mined \{"steps": .*, here \{"linear": '),
        (0.5, r'p_mined \{"steps": .*, here 0\.5'),
    ):
        loader = make(files, policy=replace(policy, p_mined=other))
        with pytest.raises(StateError, match=words) as caught:
            loader.load_state_dict(state)
        assert len(str(caught.value)) < 400
        loader.load_state_dict(state, strict=False)
    twin = ByEpoch({50: 0.75, **{epoch: 0.25 for epoch in later}, 1: 0.5, 0: 0})
    make(files, policy=replace(policy, p_mined=twin)).load_state_dict(state)


def test_equal_numbers_are_one_policy_to_a_state(files):
    state = make(files, policy=MosaicPolicy(p_mined=1, max_similarity=1, grids={2: 1})).state_dict()
    make(files, policy=MosaicPolicy(p_mined=1.0, max_similarity=1.0)).load_state_dict(state)
    with pytest.raises(StateError, match="max_similarity 1, here null"):
        make(files, policy=MosaicPolicy(p_mined=1.0)).load_state_dict(state)


def test_a_policy_file_says_the_same(files, epochs, tmp_path):
    write_policy(tmp_path / "policy.json", CHANGING, tuned_for="0" * 64, why=[])
    loader = make(files, policy=tmp_path / "policy.json")
    assert loader.policy == CHANGING
    assert same([*plans(loader), *plans(loader)], [*epochs[0], *epochs[1]])


def test_bad_photos_give_way_by_their_epochs_policy(tmp_path):
    files = make_files(tmp_path)
    dataset = Dataset.open(files.dataset)
    bad = np.zeros(len(dataset.images.id), bool)
    bad[[2, 5, 11, 17]] = True
    for photo in np.flatnonzero(bad):
        Path(dataset.photo_path(photo)).unlink()
    loader = make(files, on_error="substitute")
    for epoch in range(EPOCHS):
        alone = make(files, policy=CHANGING.at(epoch))
        expected, replaced = alone._planner.substitute(epoch, alone.plan(epoch, np.arange(48)), bad)
        assert same(plans(loader), np.split(expected, STEPS))
        assert replaced.targets and (replaced.negatives > 0) == (epoch > 0)
    loader.close()


def test_tiles_must_be_there_for_every_epochs_grids(files, tmp_path):
    policy = MosaicPolicy(p_mined=ByEpoch({0: 0.0, 2: 0.5}), max_similarity=0.5)
    make_tiles(files.dataset, output=tmp_path / "singles.tiles.h5", size=SIZE, grids=[1])
    make_tiles(files.dataset, output=tmp_path / "both.tiles.h5", size=SIZE, grids=[1, 2])
    with pytest.raises(FileFormatError, match="has no tiles for grid 2"):
        make(files, policy=policy, tiles=tmp_path / "singles.tiles.h5")
    decoded, loader = make(files, policy=policy), make(files, policy=policy, tiles=tmp_path / "both.tiles.h5")
    for _ in range(3):
        for batch, expected in zip(loader, decoded, strict=True):
            assert np.array_equal(batch.plan, expected.plan) and bool((batch.image == expected.image).all())
    with pytest.raises(NemoError, match="no negative table"):
        Loader(files.dataset, batch_size=8, policy=policy)
