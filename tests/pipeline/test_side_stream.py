"""Resident tiles on a GPU, queued from the training thread or from DALI's; the host plays the GPU."""

import os
import threading

import numpy as np
import pytest
import torch

from nemo_dali import NemoError
from nemo_dali.kernels import cuda_source, device
from nemo_dali.kernels.device import ON_DEVICE, TO_DEVICE, CopyOnDevice
from nemo_dali.pipeline import batches, opening
from nemo_dali.pipeline.graphs_gpu import CudaResidentPipeline
from nemo_dali.pipeline.side_stream import SideStreamPipeline
from nemo_dali.pipeline.uploads import SPARE, Uploads
from nemo_dali.tiles.build import make_tiles
from tests.helpers import played_gpu
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.played_gpu import CURRENT, SIDE
from tests.helpers.resident import SIZE, loader

pytestmark = needs_compiler
WAYS = {"training thread": SideStreamPipeline, "dali": CudaResidentPipeline}


@pytest.fixture(scope="module")
def path(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "all.tiles.h5"
    make_tiles(files.dataset, size=SIZE, output=path, grids=(1, 2, 3))
    return path


@pytest.fixture
def resident(files, path, played):
    return lambda **options: loader(
        files, tiles=path, device="cuda", placement="device", dtype="float16", num_threads=1, **options
    )


def assert_same(some, others):
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.attention_mask, other.attention_mask)
        assert one.plan.tobytes() == other.plan.tobytes()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefetch", [1, 3])
def test_both_ways_end_in_the_cpus_batches(files, resident, played, monkeypatch, way, prefetch):
    monkeypatch.setattr(opening, "GATHER_FROM", way)
    made, expected = resident(prefetch=prefetch), loader(files, dtype="float16")
    asked = len(played.page_locked)  # for tiles and tokens on their way
    assert_same([batch for _ in range(2) for batch in made], [batch for _ in range(2) for batch in expected])
    assert type(made._prefetcher._pipeline) is WAYS[way]
    fed = len(played.copies)
    assert played.launched == ["gather_2", "write_masks", "take_tokens_2"] * fed  # one copy a batch, and none besides
    assert {kind for kind, _ in played.copies} == {TO_DEVICE} and len(played.page_locked) == asked + 1


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_that_is_given_up_is_begun_anew(files, resident, monkeypatch, way):
    monkeypatch.setattr(opening, "GATHER_FROM", way)
    made, expected = resident(prefetch=2), list(loader(files, dtype="float16"))
    first = next(iter(made))
    copy = first.image.clone()
    for _ in range(2):
        made.set_epoch(0)
        assert_same(list(made), expected)
    assert torch.equal(first.image, copy)  # what was made ahead wrote into no batch that is held


def test_who_does_not_wait_sees_rubbish(files, resident, monkeypatch):
    wait = played_gpu.Stream.wait_event
    monkeypatch.setattr(
        played_gpu.Stream, "wait_event", lambda self, event: None if self.cuda_stream == CURRENT else wait(self, event)
    )
    made = resident()  # held, as to close it is to wait
    shown, expected = next(iter(made)), next(iter(loader(files, dtype="float16")))
    assert not torch.equal(shown.image, expected.image)
    assert set(shown.mask.unique().tolist()) == {played_gpu.RUBBISH}


def test_streams_wait_for_each_other_and_the_host_for_none(resident, played, monkeypatch):
    order = []
    record, wait, put = played_gpu.Event.record, played_gpu.Stream.wait_event, device.copy

    def recording(event, stream):
        order.append(("record", stream.cuda_stream))
        record(event, stream)

    def waiting(stream, event):
        order.append(("wait", stream.cuda_stream, event.stream.cuda_stream))
        wait(stream, event)

    def copying(*arguments, stream):
        order.append(("copy", stream))
        put(*arguments, stream=stream)

    monkeypatch.setattr(played_gpu.Event, "record", recording)
    monkeypatch.setattr(played_gpu.Stream, "wait_event", waiting)
    monkeypatch.setattr(device, "copy", copying)
    passing = iter(resident(prefetch=1))
    next(passing)
    side = next(stream for stream in played.streams if stream >= SIDE)
    feeding = [("record", CURRENT), ("wait", side, CURRENT), ("copy", side), ("record", side), ("record", side)]
    assert order == [*feeding, ("wait", CURRENT, side), *feeding]
    assert not any("the host" in call for call in played.calls)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("cudaErrorIllegalAddress: an illegal memory access"), "pipeline failed.*cudaErrorIllegalAddress"),
        (NemoError("GPU 0 does not take the kernel"), "pipeline failed.*GPU 0 does not take the kernel"),
        (torch.OutOfMemoryError("CUDA out of memory"), "ran out of memory. Lower batch_size"),
        (MemoryError("MemoryError: out of memory"), "ran out of memory. Lower batch_size"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_while_queueing_is_told_with_its_batch(files, resident, monkeypatch, way, error, message):
    monkeypatch.setattr(opening, "GATHER_FROM", way)
    made, expected = resident(prefetch=2), list(loader(files, dtype="float16"))
    load, left = cuda_source.load_kernel, [4]  # two kernels of a source in each batch

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return load(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cuda_source, "load_kernel", failing)
        passing = iter(made)
        assert_same([next(passing), next(passing)], expected[:2])
        with pytest.raises(NemoError, match=message):
            next(passing)
    made.set_epoch(0)
    assert_same(list(made), expected)


def test_it_is_closed_behind_the_gpu(resident, played):
    made = resident(prefetch=2)
    next(iter(made))
    pipeline = made._prefetcher._pipeline
    assert pipeline.in_flight == 2 and not pipeline.broken
    made.close()
    assert pipeline.in_flight == 0
    assert played.calls[-2:] == ["the host for the device", "the host for the stream"]
    pipeline.close()
    assert next(iter(made)).image.shape == (4, 3, SIZE, SIZE)


@pytest.mark.process
def test_a_fork_does_not_go_on_with_it(resident, played):
    made = resident(prefetch=2)
    passing = iter(made)
    next(passing)
    child = os.fork()
    if child == 0:
        try:
            try:
                next(passing)
            except NemoError as error:
                before = list(played.calls)
                made.close()
                os._exit(0 if "fork" in str(error) and played.calls == before else 2)
            os._exit(3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    next(passing)


def test_on_dalis_thread_a_forgotten_pipeline_is_closed_by_another(resident):
    made = resident(prefetch=1)
    next(iter(made))
    pipeline, closing, ended = made._prefetcher._pipeline, [], threading.Event()
    end = pipeline._end
    pipeline._end = lambda: (closing.append(threading.get_ident()), end(), ended.set())

    def as_dali():
        batches.mark_as_dalis()
        pipeline.close()

    thread = threading.Thread(target=as_dali)
    thread.start()
    number = thread.ident
    thread.join()
    assert ended.wait(10) and closing != [number]


# --- uploads ---------------------------------------------------------------------------------------------------------


def sent(uploads, number, nbytes=100):
    """Queue a copy of so many bytes of a number; where they are to be."""
    there = np.zeros(nbytes, np.uint8)
    uploads.queue([CopyOnDevice([np.full(nbytes, number, np.uint8)], there.ctypes.data)], SIDE)
    return there


def test_page_locked_memory_is_asked_for_once_while_a_busy_gpu_has_read_none(played):
    uploads = Uploads(0, prefetch=2)
    copies = [sent(uploads, number) for number in range(2 * 2 + SPARE)]
    assert len(played.page_locked) == 1
    copies.append(sent(uploads, 50))  # none is free: there is one more from then on
    assert len(played.page_locked) == 2 and not np.any(copies)
    played.stream(SIDE).run()
    assert [set(copy.tolist()) for copy in copies] == [{number} for number in [*range(8), 50]]
    for number in range(100, 130):
        copy = sent(uploads, number)
        played.stream(SIDE).run()
        assert set(copy.tolist()) == {number}
    copies = [sent(uploads, number) for number in range(9)]
    assert len(played.page_locked) == 2
    assert played.copies[:2] == [(TO_DEVICE, 112), (ON_DEVICE, 100)]
    played.stream(SIDE).run()
    assert [set(copy.tolist()) for copy in copies] == [{number} for number in range(9)]


def test_a_batch_larger_than_any_before_gets_a_larger_block(played):
    uploads = Uploads(0, prefetch=1)
    sent(uploads, 1)
    copies = [sent(uploads, number, 300_000) for number in (2, 3)]
    played.stream(SIDE).run()
    assert [set(copy.tolist()) for copy in copies] == [{2}, {3}]
    assert [nbytes for _, nbytes in played.page_locked[1:]] == [2**19, 2**19]


def test_pageable_memory_is_refused_by_the_played_gpu(played):
    with pytest.raises(AssertionError, match="pageable"):
        device.copy(0, np.zeros(4).ctypes.data, 32, TO_DEVICE, stream=SIDE)
