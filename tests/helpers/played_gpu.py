"""``device="cuda"`` without a GPU: the fixture ``played`` lets the host play its part.

What plays: DALI's CPU decoder and a Python function on the CPU in place of ``mixed`` and the GPU's, the CUDA sources
built by g++ in place of the kernels, the CPU's mask kernel in place of the GPU's, host memory in place of the device's.
A side stream does nothing until somebody waits for it, as late as a GPU may; torch's current stream and DALI's do their
work at once. Frames are full of rubbish until a kernel writes them, and only page-locked memory can be sent.
"""

import ctypes
import mmap
from collections import deque
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nemo_dali.kernels import cuda_source, device
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mask.cpu import TARGET, write_mask
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.kernels.text import gpu as text_gpu
from nemo_dali.loader._frames import Frames
from nemo_dali.pipeline import gpu
from tests.helpers import cuda_host

FREE = 10**9  # bytes of the GPU that the host plays
RUBBISH = 205
CURRENT, DALI, SIDE = 1, 2, 3  # addresses of streams; a further side stream has the next one


def array_at(address, dtype, count):
    """The array at an address."""
    memory = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (dtype.itemsize * count,))
    return memory.view(dtype)


def masks_on_host(targets, ends, masks, samples, *, frame_height, frame_width, **_):
    """``mask.gpu.write_masks`` with arrays for addresses."""
    frames = np.ctypeslib.as_array(
        ctypes.cast(masks, ctypes.POINTER(ctypes.c_uint8)), (samples, frame_height, frame_width)
    )
    frames[:] = 0
    for frame, target in zip(frames, targets, strict=True):
        stop = target["ends_begin"] + target["ends_count"]
        runs = np.diff(ends[target["ends_begin"] : stop].astype(np.int64), prepend=0).astype(np.uint32)
        cell = frame[target["y0"] : target["y1"], target["x0"] : target["x1"]]
        write_mask(runs, target["photo_height"], target["photo_width"], target["resample"], cell)


class Stream:
    """A stream; ``calls`` records who waited for whom."""

    def __init__(self, calls, address):
        self.calls, self.cuda_stream = calls, address
        self.late = address >= SIDE
        self.jobs, self.queued, self.done = deque(), 0, 0

    def put(self, job):
        self.jobs.append(job)
        self.queued += 1
        if not self.late:
            self.run()

    def run(self, until=None):
        """Do what was queued, up to the job of this number."""
        while self.jobs and (until is None or self.done < until):
            job = self.jobs.popleft()
            self.done += 1
            job()

    def record_event(self):
        event = Event()
        event.record(self)
        return event

    def synchronize(self):
        self.calls.append("the host for the stream")
        self.run()

    def wait_event(self, event):
        assert event is not None
        self.calls.append("the stream for an event")
        stream, number = event.stream, event.number  # as recorded now: it may be recorded again
        if stream is not None:
            self.put(lambda: stream.run(number))


class Event:
    def __init__(self):
        self.stream, self.number = None, 0

    def record(self, stream):
        stream.put(lambda: None)
        self.stream, self.number = stream, stream.queued

    def query(self):
        return self.stream is None or self.stream.done >= self.number


class Played(NamedTuple):
    """What a test may look at.

    Attributes:
        locked: the copies of memory whose pages were locked, by its address.
        calls: who waited for whom.
        streams: by address.
        launched: names of the kernels, in the order in which they were queued.
        copies: kind and bytes of the copies, in the order in which they were queued.
        page_locked: (address, bytes) of each piece of page-locked memory that was asked for.
    """

    locked: dict
    calls: list
    streams: dict
    launched: list
    copies: list
    page_locked: list

    def stream(self, address):
        return self.streams.setdefault(address, Stream(self.calls, address))


def kernels_of(library):
    """What the kernels do, by name, given (blocks, arguments) with host addresses."""

    def pointers(arguments):
        return map(ctypes.c_void_p, arguments)

    def mosaic(which):
        return lambda blocks, a: library.run(which, blocks[0], *pointers(a[:2]), int(a[2]))

    def gather(which):
        return lambda blocks, a: library.run_gather(which, blocks[0], *pointers(a))

    def letterbox(which):
        return lambda blocks, a: library.run_letterbox(which, blocks[0], *pointers(a))

    def text(which):
        return lambda blocks, a: cuda_host.launch_text(library, blocks, which, a[:4], int(a[4]), int(a[5]))

    return {
        name: kind(which)
        for kind, names in (
            (mosaic, cuda_host.KERNELS),
            (gather, cuda_host.GATHER_KERNELS),
            (letterbox, cuda_host.LETTERBOX_KERNELS),
            (text, cuda_host.TEXT_KERNELS),
        )
        for which, name in enumerate(names)
    }


def mask_kernel(blocks, arguments):
    targets, ends, masks, height, width, band = arguments
    assert blocks == mask_gpu.grid(blocks[2], height, width) and band == mask_gpu.BAND
    targets = array_at(targets, TARGET, blocks[2])
    ends = array_at(ends, np.dtype("u4"), targets["ends_count"].sum())
    masks_on_host(targets, ends, masks, blocks[2], frame_height=int(height), frame_width=int(width))


def play_launches(monkeypatch, found, library):
    """Copies and kernels become jobs of the streams."""
    kernels = kernels_of(library)
    threads = {module.SOURCE: module.THREADS for module in (mosaic_gpu, gather_gpu, letterbox_gpu, text_gpu)}

    def launcher(name, of, expected):
        def launch(blocks, given, arguments, *, shared_mem, stream):
            assert given == expected
            found.launched.append(name)
            stream.put(lambda: of(blocks, arguments))

        return launch

    def copy(to, source, nbytes, kind, *, stream):
        if kind == device.TO_DEVICE:
            assert any(at <= source and source + nbytes <= at + size for at, size in found.page_locked), "pageable"
        found.copies.append((kind, nbytes))
        found.stream(stream).put(lambda: ctypes.memmove(to, source, nbytes))

    monkeypatch.setattr(
        cuda_source, "load_kernel", lambda source, name, number: launcher(name, kernels[name], threads[source])
    )
    monkeypatch.setattr(
        mask_gpu, "load_kernel", lambda dtype, number: launcher("write_masks", mask_kernel, (mask_gpu.THREADS,))
    )
    monkeypatch.setattr(device, "on", lambda number: nullcontext())
    monkeypatch.setattr(device, "cupy_stream", found.stream)
    monkeypatch.setattr(device, "copy", copy)

    def upload(arrays, **_):
        copies = [np.ascontiguousarray(array).copy() for array in arrays]
        return copies, [copy.ctypes.data for copy in copies]

    monkeypatch.setattr(device, "upload", upload)


def play_memory(monkeypatch, found):
    """Page-locked memory and the device's memory become the host's."""

    def page_locked(nbytes):
        memory = torch.empty(nbytes, dtype=torch.uint8)
        found.page_locked.append((memory.data_ptr(), nbytes))
        return memory

    def lock_pages(memory, number):
        assert memory.ctypes.data % mmap.PAGESIZE == 0
        there = found.locked[memory.ctypes.data] = memory.copy()
        memory[:] = 255  # a device reads it at another address
        return there.ctypes.data

    def unlock_pages(memory, number):
        assert found.calls[-1] == "the host for the device"
        del found.locked[memory.ctypes.data]

    block = Frames._block
    monkeypatch.setattr(gpu, "place", lambda number: torch.device("cpu"))
    monkeypatch.setattr(gpu, "free_memory", lambda number: FREE)
    monkeypatch.setattr(gpu, "memory_for", lambda nbytes, number, stream: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(gpu, "send", lambda array, number: torch.from_numpy(array.copy()))
    monkeypatch.setattr(gpu, "page_locked", page_locked)
    monkeypatch.setattr(gpu, "lock_pages", lock_pages)
    monkeypatch.setattr(gpu, "unlock_pages", unlock_pages)
    monkeypatch.setattr(Frames, "_block", lambda self: block(self).fill_(RUBBISH))


@pytest.fixture
def played(monkeypatch, cuda_library):
    """Make ``device="cuda"`` mean the host."""
    found = play(monkeypatch, cuda_library)
    yield found
    for stream in found.streams.values():  # loaders may be collected later, when nothing plays any more
        stream.jobs.clear()


def play(monkeypatch, cuda_library):
    """Let the host play the GPU until ``monkeypatch`` undoes it."""
    import nvidia.dali
    import nvidia.dali.fn as fn
    import nvidia.dali.python_function_plugin as plugin

    found = Played({}, [], {}, [], [], [])
    pipeline, decode, call = nvidia.dali.Pipeline, fn.decoders.image, fn.dl_tensor_python_function

    def synchronize(number):
        found.calls.append("the host for the device")
        for stream in list(found.streams.values()):
            stream.run()

    monkeypatch.setattr(gpu, "cuda_device", lambda device: 0 if str(device) == "cuda" else None)
    monkeypatch.setattr(gpu, "current_stream", lambda number: found.stream(CURRENT))
    monkeypatch.setattr(gpu, "side_stream", lambda number: found.stream(max(SIDE, len(found.streams) + SIDE)))
    monkeypatch.setattr(gpu, "event", Event)
    monkeypatch.setattr(device, "torch_stream", lambda device, address: found.stream(address))
    monkeypatch.setattr(gpu, "on", lambda number: nullcontext())
    monkeypatch.setattr(gpu, "synchronize", synchronize)
    monkeypatch.setattr(nvidia.dali, "Pipeline", lambda **options: pipeline(**options | {"device_id": None}))
    share = pipeline.share_outputs
    monkeypatch.setattr(pipeline, "share_outputs", lambda self, cuda_stream=None: share(self))
    monkeypatch.setattr(plugin, "current_dali_stream", lambda: DALI)
    gpu_only = ("hw_decoder_load", "jpeg_fancy_upsampling")
    monkeypatch.setattr(
        fn.decoders,
        "image",
        lambda data, device="cpu", **options: decode(
            data, **{name: value for name, value in options.items() if name not in gpu_only}
        ),
    )
    monkeypatch.setattr(
        fn, "dl_tensor_python_function", lambda *inputs, device="cpu", **options: call(*inputs, device="cpu", **options)
    )
    play_memory(monkeypatch, found)
    play_launches(monkeypatch, found, cuda_library)
    return found
