"""What may happen to a loader from outside: interrupts, forks, limits, several passes at once."""

import copy
import json
import logging
import mmap
import os
import pickle
import random
import signal
import sys

import numpy as np
import pytest
import torch

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.pipeline.buffer_pool import BufferPool
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers import fork_server
from tests.helpers.forged import forge
from tests.helpers.tables import write_random_table


def make(files, **options):
    defaults = {"batch_size": 4, "size": 64, "dtype": "uint8", "policy": MosaicPolicy(p_mined=1), "context_length": 16}
    return Loader(files.dataset, files.negatives, **{**defaults, **options})


@pytest.fixture(scope="module")
def epochs(files):
    """The batches of epochs 0 and 1."""
    loader = make(files)
    return [list(loader), list(loader)]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert np.array_equal(batch.plan, other.plan)
        assert torch.equal(batch.image, other.image) and torch.equal(batch.mask, other.mask)


@pytest.mark.parametrize("call", ["plan", "feed_input", "schedule_run", "share_outputs"])
@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_an_interrupt_anywhere_leaves_no_batch_behind(files, epochs, monkeypatch, call, when):
    from nvidia.dali import Pipeline

    loader = make(files)
    home, name = (type(loader._planner), "draw") if call == "plan" else (Pipeline, call)
    real, calls = getattr(home, name), 0

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(home, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(loader)
    loader.set_epoch(1)
    assert_same(list(loader), epochs[1])


# Python only reports one that strikes in a callback of its collector: Hypothesis, once used, has one.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_random_moments(files, epochs):
    """A signal may strike between any two lines; what is delivered afterwards is right all the same."""
    loader = make(files, prefetch=3)
    moments = random.Random(0)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupts = 0
    try:
        for _ in range(60):
            loader.set_epoch(moments.randrange(2))
            passed = []
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.03))
                passed.extend(loader)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
            epoch = epochs[1] if passed and np.array_equal(passed[0].plan, epochs[1][0].plan) else epochs[0]
            assert_same(passed, epoch[: len(passed)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 0
    loader.set_epoch(1)
    assert_same(list(loader), epochs[1])


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_as_many_batches_are_in_flight_as_prefetch_says(files, prefetch):
    loader = make(files, prefetch=prefetch)
    for _ in loader:
        assert loader._prefetcher.in_flight == prefetch


def test_passes_that_overlap_are_right_and_the_newest_one_counts(files, epochs):
    loader = make(files)
    old = iter(loader)
    begun = [next(old), next(old)]
    new = iter(loader)
    mixed = [next(new)]
    begun.append(next(old))
    mixed.append(next(new))
    assert loader.state_dict()["samples_seen"] == 8
    assert_same([*begun, *old], epochs[0])
    assert loader.state_dict()["samples_seen"] == 8
    assert_same([*mixed, *new], epochs[0])
    assert loader.epoch == 1


def test_closing_under_a_pass_does_no_harm(files, epochs):
    loader = make(files)
    passed = []
    for batch in loader:
        passed.append(batch)
        loader.close()
    assert_same(passed, epochs[0])


def test_set_epoch_and_loading_during_a_pass_are_kept(files, epochs):
    loader = make(files)
    passes = iter(loader)
    next(passes)
    state = {**loader.state_dict(), "epoch": 1, "samples_seen": 8}
    loader.load_state_dict(state)
    next(passes)
    assert loader.state_dict() == state
    assert_same(list(loader), epochs[1][2:])
    for _ in loader:
        loader.set_epoch(0)
    assert loader.epoch == 0


def test_a_state_of_the_last_step_leaves_nothing_of_its_epoch(files, epochs):
    loader = make(files)
    for _ in loader:
        state = loader.state_dict()
    assert (state["epoch"], state["samples_seen"]) == (0, 48)
    loader.load_state_dict(state)
    assert_same(list(loader), epochs[1])  # as a loop without set_epoch expects
    loader.load_state_dict(state)
    loader.set_epoch(0)  # as LAVT does: the position is kept, and nothing is left
    assert list(loader) == [] and loader.epoch == 1
    assert_same(list(loader), epochs[1])


def test_a_loader_is_not_copied_but_a_batch_is(files):
    loader = make(files)
    batch = next(iter(loader))
    for copied in (lambda: pickle.dumps(loader), lambda: copy.deepcopy(loader)):
        with pytest.raises(TypeError, match="each process"):
            copied()
    again = pickle.loads(pickle.dumps(batch))
    assert_same([again], [batch])
    assert again.sentences == batch.sentences and again.ref_ids == batch.ref_ids


def test_a_block_is_used_again_when_the_last_view_is_gone():
    pool = BufferPool(4096, most=2)
    array = pool.take()
    tensor = torch.from_numpy(array)[1000:].view(-1, 2)
    address = array.ctypes.data
    del array
    other = pool.take()
    assert other.ctypes.data != address  # the tensor still looks into it
    del tensor
    kept = [pool.take() for _ in range(3)]
    assert kept[0].ctypes.data == address
    assert len({array.ctypes.data for array in [other, *kept]}) == 4


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_a_pool_keeps_so_many_blocks_and_the_others_go_with_their_arrays():
    pool = BufferPool(1 << 24, most=2)
    taken = [pool.take() for _ in range(5)]
    youngest = {array.ctypes.data for array in taken[3:]}
    for array in taken:
        array[:] = 1
    del array
    before = resident_bytes()
    del taken
    assert before - resident_bytes() > 2.5 * (1 << 24)  # three of five
    again = [pool.take(), pool.take()]
    assert {array.ctypes.data for array in again} == youngest


def test_nothing_is_called_when_a_batch_goes(files):
    """Python drops a KeyboardInterrupt that strikes in a finalizer: a user's Ctrl-C would do nothing."""
    loader = make(files)
    batch = next(iter(loader))
    called = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code) if event == "call" else None)
    del batch
    sys.setprofile(None)
    assert called == []


def in_child(run):
    """Exit code of ``run`` in a forked child, or None if it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run() or 0
        finally:
            os._exit(code)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        signal.sigtimedwait([], 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_shares_no_frames_and_does_not_hang(files):
    loader = make(files)
    passes = iter(loader)
    batch = next(passes)
    image = batch.image.clone()

    def child():
        batch.image.numpy()[:] = 77  # torch's own threads stayed in the parent
        try:
            next(passes)
        except NemoError as error:
            if "fork" not in str(error):
                return 3
        else:
            return 4
        loader.close()
        return 0

    assert in_child(child) == 0
    assert torch.equal(batch.image, image)
    assert len(list(passes)) == len(loader) - 1


@pytest.mark.process
def test_a_forked_child_ends_by_itself(files):
    code = f"""
import os, sys
from nemo_dali import Loader
loader = Loader({str(files.dataset)!r}, {str(files.negatives)!r}, batch_size=4)
kept = next(iter(loader))
child = os.fork()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sys.exit(7)
"""
    assert fork_server.run(code).returncode == 7


def limited(files, soft, hard, batch_size):
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from nemo_dali import Loader, MosaicPolicy, NemoError
policy = MosaicPolicy(p_mined=1, grids={{3: 1}})
loader = Loader({str(files.dataset)!r}, {str(files.negatives)!r}, batch_size={batch_size}, policy=policy, size=32)
try:
    print(len(list(loader)))
except NemoError as error:
    print(error)
"""
    done = fork_server.run(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.process
def test_the_limit_of_open_files_is_raised_or_told(files):
    assert limited(files, 200, 1000, batch_size=48) == "1"  # 432 photos at once
    assert "ulimit -n" in limited(files, 200, 500, batch_size=48)


def test_all_candidates_may_be_asked_for(files):
    loader = make(files, policy=MosaicPolicy(p_mined=1, top_k=2**31 - 1, max_similarity=0.4))
    assert (loader.plan(0, np.arange(200))["images"][:, :4] >= 0).all()
    for wrong in (2**31, 10.5):
        with pytest.raises(ValueError, match="top_k"):
            MosaicPolicy(top_k=wrong)


def test_a_table_with_too_few_rows_is_refused(files, tmp_path):
    table = tmp_path / "few.neg.h5"
    write_random_table(table, Dataset.open(files.dataset))

    def edit(parts):
        for name in ("neighbors", "similarity", "text_embedding", "own_rank"):
            parts.arrays[name] = parts.arrays[name][:10]

    forge(table, edit)
    with pytest.raises(FileFormatError, match="10 sentences"):
        make(files._replace(negatives=table))


def test_ranks_that_torch_does_not_know_of_are_warned(files, monkeypatch, caplog):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with caplog.at_level(logging.WARNING):
        make(files)
        assert "init_process_group" in caplog.text
        caplog.clear()
        make(files, batch_size=1, rank=1, world_size=4)
        assert not caplog.text


def test_numbers_of_numpy_are_numbers(files):
    loader = make(files, seed=np.int64(3), batch_size=np.int32(4))
    loader.set_epoch(np.int64(2))
    assert json.loads(json.dumps(loader.state_dict()))["epoch"] == 2
    for wrong in ({"batch_size": 4.0}, {"size": "64"}, {"seed": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(files, **wrong)
    with pytest.raises(ValueError, match="epoch"):
        loader.set_epoch(2**70)
    with pytest.raises(ValueError, match="mean"):
        make(files, mean=(float("nan"), 0, 0))


def test_other_addresses_than_s3_are_refused(files):
    with pytest.raises(ValueError, match="s3://"):
        make(files, images="gs://bucket/photos")


def test_closing_twice_and_an_unused_pipeline(files):
    pipeline = StreamPipeline(max_cells=4, num_threads=1, prefetch=2)
    pipeline.close()
    pipeline.close()
    loader = make(files)
    loader.close()
    assert len(list(loader)) == len(loader)
