"""What pipelines have in common: garbage collection beside DALI's threads, and draining whatever went wrong."""

import gc
import threading
import time
from collections import deque

import pytest

from nemo_dali.errors import NemoError
from nemo_dali.pipeline.batches import BatchPipeline, mark_as_dalis
from nemo_dali.pipeline.device_batch import DeviceBatch
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.operators import no_collection
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.resident import loader


def test_collection_goes_on_when_the_last_thread_wants_it():
    inside, leave = threading.Event(), threading.Event()

    def other():
        with no_collection():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with no_collection():
        thread.start()
        inside.wait()
    assert not gc.isenabled()  # the other thread is still there
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@needs_compiler
@pytest.mark.usefixtures("played")
def test_a_loader_leaves_collection_as_it_is(files, monkeypatch):
    found, write = [], DeviceBatch.write
    monkeypatch.setattr(DeviceBatch, "write", lambda *given: (found.append(gc.isenabled()), write(*given)))
    made = loader(files, device="cuda")
    next(iter(made))
    made.close()
    assert found and all(found)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, NemoError])
def test_drain_drops_batches_whatever_dali_says_of_them(error):
    class Failing(StreamPipeline):
        def __init__(self):
            self._owed, self._running = 3, deque([1, 2, 3])

        def wait(self):
            self._owed -= 1
            raise error("std::bad_alloc")

    pipeline = Failing()
    pipeline.drain()
    assert pipeline._owed == 0


class Kept(BatchPipeline):
    """Tells what it holds when it ends."""

    def __init__(self):
        super().__init__(prefetch=1)
        self.seen = []

    def feed(self, *given, **more):
        raise NotImplementedError

    wait = drain = _abandon = feed

    def _end(self):
        self.seen.append(self.holds is not None and self.holds())


@pytest.mark.parametrize("on_dalis_thread", [False, True])
def test_what_batches_read_is_held_until_a_pipeline_has_ended(on_dalis_thread):
    pipeline = Kept()
    pipeline.holds = set

    def close():
        if on_dalis_thread:  # where another thread does it
            mark_as_dalis()
        pipeline.close()

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    deadline = time.monotonic() + 10
    while pipeline.holds is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pipeline.seen == [set()] and pipeline.holds is None


def test_a_loaders_pipeline_holds_what_its_batches_read(files):
    made = loader(files)
    next(iter(made))
    pipeline = made._prefetcher._pipeline
    assert pipeline.holds is made._prefetcher._assembler
    made.close()
    assert pipeline.holds is None
