"""An epoch goes on exactly where it stopped, whatever the number of ranks, the prefetch depth and the mode.

Ranks are loaders of one process here: a loader's samples depend on nothing but its rank and the number of ranks.
"""

import json

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import StateError
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles
from tests.helpers.files import make_files
from tests.helpers.tables import write_random_table

STEPS, GLOBAL_BATCH, SIZE = 50, 8, 16
POLICY = MosaicPolicy(p_mined=0.5, p_random=0.1, max_similarity=0.4)
# Ways to make the same samples, as options of a Loader; "tiles" takes the file.
MODES = {
    "stream": {},
    "host": {"tiles": True},
    "pinned": {"tiles": True, "device": "cuda", "placement": "pinned"},
    "device": {"tiles": True, "device": "cuda", "placement": "device"},
}
ALL_MODES = [
    pytest.param(name, marks=[pytest.mark.gpu] if "device" in options else []) for name, options in MODES.items()
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """405 refs: 50 global batches of 8, and 5 refs more. Files and tiles."""
    folder = tmp_path_factory.mktemp("elastic")
    files = make_files(folder, photos=27, refs_per_photo=15)
    tiles = folder / "data.tiles.h5"
    make_tiles(files.dataset, size=SIZE, output=tiles, grids=(1, 2), resample="cv2-linear")
    return files, tiles


def ranks(data, count, mode="stream", **options):
    """The loaders of all ranks."""
    files, tiles = data
    mode = {name: tiles if name == "tiles" else value for name, value in MODES[mode].items()}
    shared = {"size": SIZE, "dtype": "uint8", "policy": POLICY, "seed": 11, "context_length": 16, "num_threads": 1}
    return [
        Loader(
            files.dataset,
            files.negatives,
            batch_size=GLOBAL_BATCH // count,
            rank=rank,
            world_size=count,
            **{**shared, **mode, **options},
        )
        for rank in range(count)
    ]


def arrays(batch):
    tensors = (batch.image, batch.mask, batch.tokens, batch.attention_mask)
    return [*(tensor.cpu().numpy() for tensor in tensors), batch.plan]


def steps(loaders):
    """The rest of the epoch as global steps, samples in the order of ranks: arrays [steps * 8, ...]; and its length."""
    made = [list(loader) for loader in loaders]
    assert len({len(batches) for batches in made}) == 1  # every rank yields as many
    parts = zip(*(arrays(batch) for step in zip(*made, strict=True) for batch in step), strict=True)
    return [np.concatenate(part) for part in parts], len(made[0])


@pytest.fixture(scope="module")
def uninterrupted(data):
    """Epoch 0 by one rank that decodes."""
    whole, count = steps(ranks(data, 1))
    assert count == STEPS and np.array_equal(whole[-1]["position"], np.arange(STEPS * GLOBAL_BATCH))
    return whole


def assert_tail(found, uninterrupted, done):
    for part, expected in zip(found, uninterrupted, strict=True):
        assert np.array_equal(part, expected[done * GLOBAL_BATCH :])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, "stream", 2), (1, "stream", 2), marks=pytest.mark.slow),
        pytest.param((1, "host", 1), (2, "stream", 4), marks=pytest.mark.slow),
        ((4, "stream", 3), (2, "host", 1)),
        pytest.param((2, "host", 2), (8, "host", 2), marks=pytest.mark.slow),
        pytest.param((4, "stream", 2), (2, "pinned", 3), marks=pytest.mark.gpu),
        pytest.param((2, "device", 2), (1, "host", 1), marks=pytest.mark.gpu),
        pytest.param((1, "pinned", 1), (8, "device", 2), marks=pytest.mark.gpu),
    ],
    ids=lambda side: "{} {} {}".format(*side),
)
def test_the_whole_tail_is_the_same_from_every_step(data, uninterrupted, before, after):
    """``before`` and ``after`` are ranks, mode and prefetch depth of who saved and who goes on."""
    saving = ranks(data, before[0], before[1], prefetch=before[2])
    going_on = ranks(data, after[0], after[1], prefetch=after[2])
    states = [[loader.state_dict() for loader in saving]]
    for _ in zip(*saving, strict=True):
        states.append([loader.state_dict() for loader in saving])
    assert len(states) == STEPS + 1
    for done, state in enumerate(states[:STEPS]):
        assert all(one == state[0] for one in state)
        text = json.dumps(state[done % before[0]])  # each rank's turn
        for loader in going_on:
            loader.load_state_dict(json.loads(text))
        tail, count = steps(going_on)
        assert count == STEPS - done
        assert_tail(tail, uninterrupted, done)
        assert {loader.epoch for loader in going_on} == {1}


@pytest.mark.parametrize("mode", ALL_MODES)
def test_every_rank_yields_as_many_batches_of_the_same_steps(data, uninterrupted, mode):
    for count in (1, 2, 4, 8):
        loaders = ranks(data, count, mode)
        assert {len(loader) for loader in loaders} == {STEPS}
        assert_tail(steps(loaders)[0], uninterrupted, 0)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_without_drop_last_the_epochs_first_refs_fill_the_last_step_of_all_ranks(data, uninterrupted, mode):
    padded, count = steps(ranks(data, 1, mode, drop_last=False))
    assert count == STEPS + 1
    assert_tail([part[: STEPS * GLOBAL_BATCH] for part in padded], uninterrupted, 0)
    plan = padded[-1]
    assert np.array_equal(plan["position"], np.arange(count * GLOBAL_BATCH))
    assert np.array_equal(np.sort(plan["ref"][:405]), np.arange(405))
    assert np.array_equal(plan["ref"][405:], plan["ref"][:3])
    for count in (2, 8):
        loaders = ranks(data, count, mode, drop_last=False)
        assert {len(loader) for loader in loaders} == {STEPS + 1}
        for done in (0, STEPS - 1, STEPS):
            for loader in loaders:
                loader.load_state_dict({**loader.state_dict(), "epoch": 0, "samples_seen": done * GLOBAL_BATCH})
            assert_tail(steps(loaders)[0], padded, done)


def test_a_state_is_small_at_every_step_and_says_nothing_of_ranks(data):
    (one,), many = ranks(data, 1), ranks(data, 4, "host", prefetch=4, drop_last=False)
    for _ in zip(one, many[3], strict=False):
        text = json.dumps(one.state_dict())
        assert len(text) < 800 and json.loads(text) == many[3].state_dict()


def test_a_state_of_changed_files_is_refused_with_both_fingerprints_and_the_remedy(data, tmp_path):
    files, _ = data
    (saved,) = ranks(data, 1)
    mined_again = files._replace(negatives=tmp_path / "again.neg.h5")
    write_random_table(mined_again.negatives, Dataset.open(files.dataset), seed=1)
    indexed_again = make_files(tmp_path / "again", photos=27, refs_per_photo=15, seed=1)
    for changed, kind in ((mined_again, "negatives"), (indexed_again, "dataset")):
        (loader,) = ranks((changed, None), 1)
        before = loader.state_dict()
        with pytest.raises(StateError, match="interrupted run used") as error:
            loader.load_state_dict(saved.state_dict())
        for state in (saved.state_dict(), before):
            assert state["fingerprints"][kind][0][:12] in str(error.value)
        assert loader.state_dict() == before


def test_an_exception_in_the_loop_costs_nothing(data, uninterrupted):
    (loader,) = ranks(data, 1)
    with pytest.raises(KeyError):
        for step, _ in enumerate(loader, 1):
            if step == 7:
                raise KeyError
    state = loader.state_dict()
    assert_tail(steps([loader])[0], uninterrupted, 0)  # a new pass is the same epoch anew,
    loader.load_state_dict(state)
    assert_tail(steps([loader])[0], uninterrupted, 7)  # and a loaded state goes on behind the batch that was delivered
