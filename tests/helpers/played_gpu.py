"""``device="cuda"`` without a GPU: the fixture ``played`` lets the host play its part.

What plays: DALI's CPU decoder and a Python function on the CPU in place of ``mixed`` and the GPU's, the CUDA source
built by g++ in place of the mosaic, letterbox and gather kernels, the CPU's mask kernel in place of the GPU's, host
memory in place of the device's. Streams are not played.
"""

import ctypes
import mmap
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nemo_dali.kernels import device
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mask.cpu import write_mask
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.pipeline import gpu
from tests.helpers import cuda_host


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


FREE = 10**9  # bytes of the GPU that the host plays


class Stream:
    """A stream on which nothing is ever outstanding; ``calls`` tells who waited for whom."""

    cuda_stream = 0

    def __init__(self, calls):
        self.calls = calls

    def record_event(self):
        return self

    def synchronize(self):
        self.calls.append("the host for the stream")

    def wait_event(self, event):
        assert event is not None
        self.calls.append("the stream for an event")


class Played(NamedTuple):
    """What a test may look at: the page-locked memory, by its address on the host; and who waited for whom."""

    locked: dict
    calls: list


@pytest.fixture
def played(monkeypatch, cuda_library):
    """``device="cuda"`` then means the host."""
    return play(monkeypatch, cuda_library)


def play(monkeypatch, cuda_library):
    """Let the host play the GPU until ``monkeypatch`` undoes it."""
    import nvidia.dali
    import nvidia.dali.fn as fn
    import nvidia.dali.python_function_plugin as plugin

    found = Played({}, [])
    stream = Stream(found.calls)
    pipeline, decode, call = nvidia.dali.Pipeline, fn.decoders.image, fn.dl_tensor_python_function
    monkeypatch.setattr(gpu, "cuda_device", lambda device: 0 if str(device) == "cuda" else None)
    monkeypatch.setattr(gpu, "place", lambda number: torch.device("cpu"))
    monkeypatch.setattr(gpu, "current_stream", lambda number: stream)
    monkeypatch.setattr(device, "torch_stream", lambda device, address: stream)
    monkeypatch.setattr(gpu, "send", lambda tensor, number: tensor)
    monkeypatch.setattr(gpu, "on", lambda number: nullcontext())
    monkeypatch.setattr(gpu, "synchronize", lambda number: found.calls.append("the host for the device"))
    monkeypatch.setattr(nvidia.dali, "Pipeline", lambda **options: pipeline(**options | {"device_id": None}))
    share = pipeline.share_outputs
    monkeypatch.setattr(pipeline, "share_outputs", lambda self, cuda_stream=None: share(self))
    monkeypatch.setattr(plugin, "current_dali_stream", lambda: 0)
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

    def lock_pages(memory, number):
        assert memory.ctypes.data % mmap.PAGESIZE == 0
        there = found.locked[memory.ctypes.data] = memory.copy()
        memory[:] = 255  # a device reads it at another address
        return there.ctypes.data

    def unlock_pages(memory, number):
        assert found.calls[-1] == "the host for the device"
        del found.locked[memory.ctypes.data]

    monkeypatch.setattr(gpu, "free_memory", lambda number: FREE)
    monkeypatch.setattr(gpu, "copy_of", lambda array, number: torch.from_numpy(array.copy()))
    monkeypatch.setattr(gpu, "page_locked", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(gpu, "lock_pages", lock_pages)
    monkeypatch.setattr(gpu, "unlock_pages", unlock_pages)
    monkeypatch.setattr(gather_gpu, "write_tiles", lambda tiles, **_: cuda_host.launch_gather(cuda_library, tiles))
    monkeypatch.setattr(mosaic_gpu, "write_tiles", lambda tiles, **_: cuda_host.launch(cuda_library, tiles))
    monkeypatch.setattr(
        letterbox_gpu, "write_tiles", lambda tiles, **_: cuda_host.launch_letterbox(cuda_library, tiles)
    )
    monkeypatch.setattr(device, "upload", lambda arrays, **_: (None, arrays))
    monkeypatch.setattr(mask_gpu, "write_masks", masks_on_host)
    return found
