"""The GPU benchmarks without a GPU: the host launches the kernels and keeps the time."""

import ctypes
from types import SimpleNamespace

import numpy as np
import torch

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mask.cpu import TARGET
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from tests.helpers.cuda_host import GATHER_KERNELS, KERNELS
from tests.helpers.played_gpu import FREE, array_at, masks_on_host


class Event:
    """An event of a GPU that needs 2 ms for a round."""

    def __init__(self, enable_timing=True):
        assert enable_timing

    def record(self):
        pass

    def query(self):
        return False

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 2.0


def play_clock(monkeypatch):
    """What the benchmarks ask torch of a GPU."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=3000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, FREE))


def play_at_once(monkeypatch, cuda_library, batches):
    """Let the host run at once what ``batches``, the module kernel_batches, launches."""

    def load_kernel(source, name, device):
        def mosaic(blocks, threads, arguments, shared_mem, stream=None):
            *pointers, stage_bytes = arguments
            assert threads == mosaic_gpu.THREADS and stage_bytes == shared_mem
            cuda_library.run(KERNELS.index(name), *blocks, *map(ctypes.c_void_p, pointers), int(stage_bytes))

        def gather(blocks, threads, pointers, shared_mem=0, stream=None):
            assert threads == gather_gpu.THREADS and shared_mem == 0
            cuda_library.run_gather(GATHER_KERNELS.index(name), *blocks, *map(ctypes.c_void_p, pointers))

        return {mosaic_gpu.SOURCE: mosaic, gather_gpu.SOURCE: gather}[source]

    def write_masks(targets, ends, masks, samples, **frame):
        targets = array_at(targets, TARGET, samples)
        masks_on_host(targets, array_at(ends, np.dtype("u4"), targets["ends_count"].sum()), masks, samples, **frame)

    def mask_kernel(blocks, threads, arguments, shared_mem, stream=None):
        *pointers, height, width, band = arguments
        assert blocks == mask_gpu.grid(blocks[2], height, width) and band == mask_gpu.BAND
        write_masks(*pointers, blocks[2], frame_height=int(height), frame_width=int(width))

    def upload(arrays, **_):
        copies = [array.copy() for array in arrays]
        return copies, [copy.ctypes.data for copy in copies]

    monkeypatch.setattr(cuda_source, "load_kernel", load_kernel)
    monkeypatch.setattr(mask_gpu, "load_kernel", lambda dtype, device: mask_kernel)
    monkeypatch.setattr(mask_gpu, "write_masks", write_masks)
    monkeypatch.setattr(batches, "upload", upload)
    monkeypatch.setattr(batches, "PHOTO", (48, 64))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
