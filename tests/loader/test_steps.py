"""Steps planned many at a time: each is what it would be alone, in whatever order they are asked for."""

import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from nemo_dali.errors import FileFormatError
from nemo_dali.loader import _steps
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.files import make_files

EVERY_KIND = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, jitter=0.5, top_k=15)
SIZE = 33


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("steps"), photos=60, seed=2)


def steps_of(loader):
    return loader._prefetcher._steps


def make(files, **options):
    return Loader(files.dataset, files.negatives, **{"size": SIZE, "context_length": 16, **options})


def assert_planned(loader, step, *, rank=0):
    """A step is what the plan says, and its cells what is laid out of its rows alone."""
    batch = loader.batch_size
    positions = step.seen + rank * batch + np.arange(batch)
    if loader._schedule.pad is False:
        positions = positions[positions < len(loader.dataset)]
    assert np.array_equal(step.rows, loader.plan(step.epoch, positions))
    alone = steps_of(loader).with_rows(step, step.rows).cells
    for name in ("tiles", "sample", "photo", "begin", "letterboxed"):
        assert getattr(step.cells, name).tobytes() == getattr(alone, name).tobytes(), name


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_every_step_of_an_epoch_in_turn(files, rank, split, fit):
    policy = {"policy": EVERY_KIND, "drop_last": False} if split == "train" else {}
    loader = make(files, batch_size=5, split_mode=split, fit=fit, rank=rank, world_size=3, **policy)
    seen, kinds = 0, set()
    for _ in range(len(loader)):
        step = steps_of(loader).plan(3, seen)
        assert (step.epoch, step.seen) == (3, seen)
        assert_planned(loader, step, rank=rank)
        kinds |= set(step.rows["grid"].tolist())
        seen += 15
    assert kinds == ({1, 2, 3} if split == "train" else {1})


def test_any_step_at_any_time(files, monkeypatch):
    monkeypatch.setattr(_steps, "MOST_ROWS", 20)
    loader = make(files, batch_size=4, policy=EVERY_KIND)
    order = random.Random(1)
    for _ in range(60):
        epoch, seen = order.randrange(3), 4 * order.randrange(len(loader))
        for following in range(seen, min(seen + 4 * order.randrange(1, 5), 4 * len(loader)), 4):
            assert_planned(loader, steps_of(loader).plan(epoch, following))


def test_chunks_grow_to_their_limit_and_never_beyond_an_epoch(files, monkeypatch):
    monkeypatch.setattr(_steps, "MOST_ROWS", 32)
    loader, drawn = make(files, batch_size=4, policy=EVERY_KIND), []
    draw = loader._planner.draw

    def noted(epoch, positions):
        drawn.append((epoch, positions.tolist()))
        return draw(epoch, positions)

    monkeypatch.setattr(loader._planner, "draw", noted)
    for seen in range(0, 4 * len(loader), 4):
        steps_of(loader).plan(0, seen)
    steps_of(loader).close()
    drawn = [positions for epoch, positions in drawn if epoch == 0]
    lengths = [len(positions) for positions in drawn]
    assert lengths[:5] == [4, 8, 16, 32, 32] and max(lengths) == 32
    assert [position for positions in drawn for position in positions] == list(range(4 * len(loader)))


@pytest.fixture
def threads():
    """A function that lists the planning threads begun in this test: other tests may have left loaders in cycles."""
    others = set(threading.enumerate())
    return lambda: [one for one in set(threading.enumerate()) - others if one.name.startswith("nemo-dali plan")]


def test_the_next_chunk_is_made_by_a_thread_that_ends_with_the_pipeline(files, monkeypatch, threads):
    loader = make(files, batch_size=4, policy=EVERY_KIND)
    makers, draw = [], loader._planner.draw

    def noted(epoch, positions):
        makers.append(threading.current_thread().name)
        return draw(epoch, positions)

    monkeypatch.setattr(loader._planner, "draw", noted)
    assert not threads()
    assert len(list(loader)) == len(loader)
    assert makers[0] == "MainThread" and len(makers) > 2
    assert all(name.startswith("nemo-dali plan") for name in makers[1:])
    assert len(threads()) == 1
    loader.close()
    assert not threads()


def test_what_goes_wrong_ahead_is_raised_when_its_own_step_is_begun(files, monkeypatch):
    monkeypatch.setattr(_steps, "MOST_ROWS", 8)
    loader = make(files, batch_size=4, policy=EVERY_KIND, prefetch=1)
    expected = [batch.plan.tobytes() for batch in make(files, batch_size=4, policy=EVERY_KIND)]
    draw, passing, broken = loader._planner.draw, iter(loader), True

    def damaged(epoch, positions):
        if broken and 24 in positions:
            raise FileFormatError("damaged")
        return draw(epoch, positions)

    monkeypatch.setattr(loader._planner, "draw", damaged)
    shown = []
    with pytest.raises(FileFormatError, match="damaged"):
        shown.extend(batch.plan.tobytes() for batch in passing)
    assert shown == expected[:5]  # the step at position 24 is begun before the one at 20 is delivered
    broken = False
    assert [batch.plan.tobytes() for batch in loader] == expected


def test_a_step_that_is_asked_for_out_of_turn_waits_for_its_own_rows_only(files, monkeypatch):
    loader = make(files, batch_size=4, policy=EVERY_KIND)
    drawn, draw = [], loader._planner.draw

    def noted(epoch, positions):
        if threading.current_thread() is threading.main_thread():
            drawn.append((epoch, len(positions)))
        return draw(epoch, positions)

    monkeypatch.setattr(loader._planner, "draw", noted)
    for seen in range(0, 40, 4):
        steps_of(loader).plan(0, seen)
    for epoch in (5, 2):
        steps_of(loader).plan(epoch, 8)
    assert drawn == [(0, 4), (5, 4), (2, 4)]


def test_an_interrupt_while_the_thread_is_waited_for_leaves_no_pipeline_behind(files, monkeypatch):
    loader = make(files, batch_size=4, policy=EVERY_KIND)
    next(iter(loader))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "shutdown", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loader.close()
    assert loader._prefetcher.in_flight == 0 and loader._prefetcher._pipeline is None
    assert [batch.plan.tobytes() for batch in loader] == [
        batch.plan.tobytes() for batch in make(files, batch_size=4, policy=EVERY_KIND)
    ]


def test_a_step_whose_chunk_was_given_up_is_made(files):
    """As where a signal's handler closes the loader that waits for it."""
    loader = make(files, batch_size=4, policy=EVERY_KIND)
    steps = steps_of(loader)
    steps.plan(0, 0)
    steps._ahead.future.result()
    cancelled = Future()
    cancelled.cancel()
    steps._ahead = _steps.ChunkAhead((0, 4), cancelled)
    assert_planned(loader, steps.plan(0, 4))


def test_without_a_further_thread_chunks_are_made_when_they_are_asked_for(files, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    expected = [batch.plan.tobytes() for batch in make(files, batch_size=4, policy=EVERY_KIND)]
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    assert [batch.plan.tobytes() for batch in make(files, batch_size=4, policy=EVERY_KIND)] == expected


def test_a_step_shares_no_memory_with_others(files):
    loader = make(files, batch_size=4, policy=EVERY_KIND)
    steps = steps_of(loader)
    steps.plan(0, 0)
    one, other = steps.plan(0, 4), steps.plan(0, 4)
    one.rows["images"] = -5
    one.cells.tiles["image"] = 7
    assert (other.rows["images"] != -5).any() and not other.cells.tiles["image"].any()
    assert_planned(loader, steps.plan(0, 4))


def test_the_thread_ends_behind_a_loader_that_is_gone_and_nobody_waits_for_it(files, monkeypatch, threads):
    """Python collects wherever it allocates: under a lock, too, that the thread needs, or that ``join`` takes."""
    loader = make(files, batch_size=4, policy=EVERY_KIND)
    draw, begun, gone = loader._planner.draw, threading.Event(), threading.Event()

    def slow(epoch, positions):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            gone.wait(60)
        return draw(epoch, positions)

    monkeypatch.setattr(loader._planner, "draw", slow)
    batches = iter(loader)
    next(batches)
    assert begun.wait(60)
    (thread,) = threads()
    del loader, batches
    assert thread.is_alive()
    gone.set()
    thread.join(60)
    assert not thread.is_alive()
