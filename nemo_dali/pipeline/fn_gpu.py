"""The operators of ``fn`` on a GPU: Python functions that DALI calls, and that launch the CUDA kernels on its stream.

A launch depends on some numbers of each sample: where the edges cross, where the target is. They are CPU data, but a
function on a GPU is given GPU data, and copying numbers back would mean waiting for the GPU. So they come as the
*shape* of an empty tensor, which the host knows without asking the GPU.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn as dali
from nvidia.dali import math, types
from nvidia.dali.data_node import DataNode

import nemo_dali.kernels.callbacks as callbacks
from nemo_dali.errors import NemoError
from nemo_dali.kernels.dlpack import _get_pointer, read_tensors
from nemo_dali.kernels.mask.cpu import TARGET, Targets
from nemo_dali.kernels.plan.rows import PLAN
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.pipeline.fn_cpu import (
    Geometry,
    Normalisation,
    Target,
    call,
    checked,
    failure,
    normalising,
    target_inputs,
)
from nemo_dali.pipeline.operators import no_collection

if TYPE_CHECKING:
    import torch

_UNSIGNED = 1  # DLPack's kDLUInt
_SHIFT = 2**30  # added to a center: a wrong one may be negative, a dimension cannot


def mosaic(
    images: list[DataNode], geometry: Geometry, *, normalisation: Normalisation, channels_last: bool
) -> DataNode:
    """See ``fn.mosaic``."""
    from nemo_dali.kernels.mosaic import gpu as mosaic_gpu

    cells, size, center = len(images), geometry.size, geometry.center
    inputs = list(images)
    if isinstance(center, DataNode):
        numbers = math.clamp(center, -_SHIFT, _SHIFT - 1) + _SHIFT
        inputs.append(_told(dali.cat(types.Constant(np.zeros(1, np.int32), device="cpu"), numbers)))

    def write(device: int, stream: int, *batches: list[Any]) -> "torch.Tensor":
        samples = len(batches[0])
        photos, sizes = read_tensors([capsule for batch in batches[:cells] for capsule in batch])
        rows = np.zeros(samples, PLAN)
        rows["grid"] = geometry.grid
        rows["images"][:, :cells] = np.arange(len(photos)).reshape(cells, samples).T
        rows["center"] = _centers(batches[cells], size) if batches[cells:] else center
        _check_photos(batches[:cells], sizes)
        frames = _allocate((samples, 3 * size * size), normalisation[2], device, stream)
        tiles, sample, photo = lay_out(
            rows,
            size,
            table=_table_on(device, *normalisation).data_ptr(),
            itemsize=frames.itemsize,
            resample=geometry.resample,
            channels_last=channels_last,
        )
        tiles["image"] = frames.data_ptr() + sample * frames.stride(0) * frames.itemsize
        tiles["photo"] = photos[photo]
        tiles["photo_height"], tiles["photo_width"] = sizes[photo, 0], sizes[photo, 1]
        mosaic_gpu.write_tiles(tiles, device=device, stream=stream)
        return frames.view(samples, *((size, size, 3) if channels_last else (3, size, size)))

    return _call_on_gpu(write, inputs, layout="HWC" if channels_last else "CHW")


def mask(target: Target, geometry: Geometry, *, dtype: str) -> DataNode:
    """See ``fn.remap_mask``."""
    from nemo_dali.kernels.device import upload
    from nemo_dali.kernels.mask import gpu as mask_gpu

    size = geometry.size
    runs = (dali.reshape(target[2], shape=[1, -1]), types.INT64, 2)  # the first input gives the first output's shape
    run_ends, verdict = call(callbacks.run_target, [runs, *target_inputs(target, geometry)], types.UINT32, 1)

    def write(device: int, stream: int, ends: list[Any], numbers: list[Any]) -> "torch.Tensor":
        samples = len(ends)
        masks = _allocate((samples, size, size), dtype, device, stream)
        targets, first = _targets(ends, numbers, geometry.resample)
        _owner, (address,) = upload([targets], device=device, stream=stream)
        mask_gpu.write_masks(
            address,
            first,
            masks.data_ptr(),
            samples,
            frame_height=size,
            frame_width=size,
            dtype=dtype,
            device=device,
            stream=stream,
        )
        return masks

    return _call_on_gpu(write, [run_ends.gpu(), _told(checked("remap_mask", verdict))], layout="HW")


def _told(numbers: DataNode) -> DataNode:
    """Integers >= 0 [n] on the CPU, the first of them 0, as the shape of empty GPU data."""
    return dali.zeros(shape=numbers, dtype=types.UINT8).gpu()


class _Head(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


def _head(capsule: Any) -> _Head:
    # Not through torch: the strides that it computes for an empty tensor overflow where the numbers are large.
    return _Head.from_address(_get_pointer(capsule, b"dltensor"))


def _numbers(capsules: list[Any]) -> npt.NDArray[np.int64]:
    """What ``_told`` was given, after the 0: int64 [samples, n - 1]."""
    heads = [_head(capsule) for capsule in capsules]
    return np.array([head.shape[1 : head.ndim] for head in heads], np.int64)


def _call_on_gpu(write: Callable[..., "torch.Tensor"], inputs: list[DataNode], *, layout: str) -> DataNode:
    """Call a Python function with each batch, on DALI's thread and without waiting for the GPU.

    Args:
        write: called with the number of the pipeline's GPU, the address of DALI's stream and a list of DLPack capsules
            for each input. Returns a tensor [samples, ...], ready for what comes later on that stream.
    """
    import torch
    from nvidia.dali.python_function_plugin import current_dali_stream

    gpu.cuda_device("cuda")  # raises where the GPU cannot be used

    def function(*batches: list[Any]) -> list[Any]:
        with no_collection():
            samples = write(torch.cuda.current_device(), current_dali_stream(), *batches)
            return [sample.__dlpack__(stream=-1) for sample in samples]

    return dali.dl_tensor_python_function(
        *inputs, function=function, device="gpu", batch_processing=True, synchronize_stream=False, output_layouts=layout
    )


def _allocate(shape: tuple[int, ...], dtype: str, device: int, stream: int) -> "torch.Tensor":
    """Uninitialised memory for work on a stream. torch reuses it only for later work there."""
    import torch

    from nemo_dali.kernels.device import torch_stream

    with torch.cuda.stream(torch_stream(device, stream)):
        return torch.empty(shape, dtype=getattr(torch, dtype), device=gpu.place(device))


@functools.cache
def _table_on(device: int, mean: tuple[float, ...], std: tuple[float, ...], dtype: str) -> "torch.Tensor":
    import torch

    table, _ = normalising(mean, std, dtype)
    return torch.from_numpy(table.view(np.uint8)).to(gpu.place(device))


def _centers(capsules: list[Any], size: int) -> npt.NDArray[np.int64]:
    """x and y of each sample, int64 [samples, 2]."""
    centers = _numbers(capsules) - _SHIFT
    if centers.shape[1] != 2:
        raise failure("mosaic", 0, callbacks.CENTER_COUNT)
    for i, center in enumerate(centers.tolist()):
        for kind, value in zip((callbacks.CENTER_X, callbacks.CENTER_Y), center, strict=True):
            if not 0 <= value <= size:
                raise failure("mosaic", i, kind, value)
    return centers


def _check_photos(batches: Sequence[list[Any]], sizes: npt.NDArray[np.int64]) -> None:
    """Refuse what is not uint8 [H, W, 3] with some pixels; ``sizes`` is int64 [photos, 3], batch by batch."""
    for i in np.flatnonzero((sizes[:, 2] != 3) | (sizes == 0).any(axis=1)).tolist():
        cell, sample = divmod(i, len(batches[0]))
        if (channels := int(sizes[i, 2])) != 3:
            raise failure("mosaic", sample, callbacks.CHANNELS, cell, channels)
        raise failure("mosaic", sample, callbacks.NO_PIXELS, cell)
    for cell, batch in enumerate(batches):
        if (head := _head(batch[0])).bits != 8 or head.kind != _UNSIGNED:
            raise NemoError(f"nemo_dali.fn.mosaic: images[{cell}] must be uint8, not numbers of {head.bits} bits.")


def _targets(ends: list[Any], numbers: list[Any], resample: int) -> tuple[Targets, int]:
    """What the mask kernel reads of each sample, and the device address that ``ends_begin`` counts from."""
    addresses, _ = read_tensors(ends)
    targets = np.zeros(len(ends), TARGET)
    names = ("ends_count", "y0", "x0", "y1", "x1", "photo_height", "photo_width")  # as the callback orders them
    for name, column in zip(names, _numbers(numbers).T, strict=True):
        targets[name] = column
    targets["resample"] = resample
    shown = targets["ends_count"] > 0
    if not shown.any():
        return targets, 0
    first = addresses[shown].min()
    targets["ends_begin"][shown] = (addresses[shown] - first) // np.dtype(np.uint32).itemsize
    return targets, int(first)
