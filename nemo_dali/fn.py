"""DALI operators for pipelines of your own: mosaics, and masks that follow their photos into them.

    image = nemo_dali.fn.mosaic([a, b, c, d])                      uint8 [H, W, 3] each ──▶ float32 [3, 480, 480]
    mask = nemo_dali.fn.remap_mask(runs, shape, cell=2, grid=2)    uint32 [n] ──▶ uint8 [480, 480], of photo c

Pixels and masks equal the Loader's, bit for bit. On the CPU they are made per sample on DALI's threads, without the
GIL; on a GPU, by one launch per batch on DALI's stream.

If a sample cannot be drawn, DALI raises a RuntimeError when the batch is fetched; its text names the sample and what is
wrong with it. As with DALI's own Python operators, a pipeline that has these cannot be serialized.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from nvidia.dali import fn as dali
from nvidia.dali import types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from nemo_dali._checks import check_channels, one_of
from nemo_dali._choices import GRIDS, DaliDType, MaskDType, Resample
from nemo_dali.kernels.tile import RESAMPLE
from nemo_dali.pipeline import fn_cpu, fn_gpu
from nemo_dali.pipeline.fn_cpu import Geometry
from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD

Device = Literal["cpu", "gpu"]

__all__ = ["mosaic", "remap_mask"]

_GRIDS = {grid * grid: grid for grid in GRIDS}  # by number of photos


@do_not_convert  # type: ignore[untyped-decorator]  # DALI's has no types
def mosaic(
    images: Sequence[DataNode],
    *,
    size: int = 480,
    center: DataNode | Sequence[int] | None = None,
    resample: Resample = "cv2-linear",
    dtype: DaliDType = "float32",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    channels_last: bool = False,
) -> DataNode:
    """Stretch 1, 4 or 9 photos into the cells of a square frame, and normalise them.

    On the CPU, looking for failures takes the GIL for a moment per batch, and 9 photos cost one more copy of the frame,
    because they are drawn in three parts. On a GPU, DALI copies each frame once more, and photos must be at most 8,192
    pixels wide and high.

    Args:
        images: DALI data, uint8 [H, W, 3] a sample, RGB, of any sizes, all on one device; the cells row by row.
        size: height and width of the frame in pixels.
        center: where the edges of a 2x2 grid cross, x and y in pixels: two integers, or DALI data of two integers a
            sample. They may be 0 and ``size``, where cells get no pixels. None: ``size // 2``. Other grids are regular.
        resample: "cv2-linear" (OpenCV's INTER_LINEAR) or "pillow-bilinear" (Pillow's antialiased BILINEAR).
        dtype: "float32" or "float16", which are ``(value / 255 - mean) / std``, or "uint8", which is not normalised.
            DALI has no bfloat16.
        mean, std: per channel RGB, in units of the full range 0 to 1; ImageNet's by default.
        channels_last: whether a frame is [size, size, 3], of layout "HWC", instead of [3, size, size], "CHW".

    Returns:
        One frame a sample, on the device of the photos.

    Raises:
        ValueError: an argument out of range.
        NemoError: the photos are on a GPU that torch does not see, or CuPy is missing.
    """
    images = list(images)
    if len(images) not in _GRIDS:
        raise ValueError(f"images ({len(images)} of them) must be 1, 4 or 9")
    if len(devices := {image.device for image in images}) > 1:
        raise ValueError("images must be on one device, not some on the CPU and some on a GPU")
    check_channels(mean, std)
    one_of("dtype", dtype, get_args(DaliDType))
    geometry = _geometry(size, _GRIDS[len(images)], center, resample)
    draw = fn_gpu.mosaic if devices == {"gpu"} else fn_cpu.mosaic
    return draw(images, geometry, normalisation=(tuple(mean), tuple(std), dtype), channels_last=bool(channels_last))


@do_not_convert  # type: ignore[untyped-decorator]  # DALI's has no types
def remap_mask(
    runs: DataNode,
    shape: DataNode | Sequence[int],
    *,
    cell: DataNode | int = 0,
    grid: int = 1,
    size: int = 480,
    center: DataNode | Sequence[int] | None = None,
    resample: Resample = "cv2-linear",
    dtype: MaskDType = "uint8",
    device: Device | None = None,
) -> DataNode:
    """Make the mask that belongs to a mosaic, from the run lengths of the target in its own photo.

    The photo's own mask is never drawn: pixels are looked up where the library of ``resample`` reads its nearest
    neighbours. Looking for failures takes the GIL for a moment per batch, on the CPU and on a GPU. On a GPU, DALI
    copies each mask once more, and the host does not wait, except for inputs that are on the GPU already: run lengths,
    shape, cell and center belong on the CPU.

    Args:
        runs: DALI data, uint32 or int32 [n] a sample, COCO's run lengths: column by column, zeros first. They must
            add up to the photo's pixels; no run lengths at all mean an empty mask.
        shape: the photo's height and width: integers, or DALI data of integers a sample, as ``fn.shapes`` and
            ``fn.peek_image_shape`` return them; any after the first two are ignored.
        cell: number of the target's cell, row by row: an integer, or DALI data of one integer a sample.
        grid: cells a side, 1, 2 or 3.
        size, center, resample: as given to ``mosaic``.
        dtype: "uint8", "int64" or "float32".
        device: where to make the mask, "cpu" or "gpu"; None: where ``runs`` is.

    Returns:
        [size, size] a sample of 0 and 1, layout "HW"; all 0 if the cell has no pixels.

    Raises:
        ValueError: an argument out of range.
        NemoError: the mask is to be made on a GPU that torch does not see, or CuPy is missing.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid ({grid!r}) must be 1, 2 or 3")
    if not isinstance(cell, DataNode) and cell not in range(grid * grid):
        raise ValueError(f"cell ({cell!r}) must be an integer from 0 to {grid * grid - 1}")
    device = runs.device if device is None else device
    one_of("device", device, get_args(Device))
    one_of("dtype", dtype, get_args(MaskDType))
    target = (
        dali.reshape(_integers(cell, types.INT32), shape=[-1]),
        _integers(shape, types.INT64),
        _integers(runs, types.INT64),
    )
    make = fn_gpu.mask if device == "gpu" else fn_cpu.mask
    return make(target, _geometry(size, grid, center, resample), dtype=dtype)


def _integers(numbers: Any, dtype: Any) -> DataNode:
    """DALI data of integers on the CPU, from DALI data on any device or from plain integers."""
    if not isinstance(numbers, DataNode):
        numbers = types.Constant(np.array(numbers, np.int32), device="cpu")
    return dali.cast(numbers.cpu() if numbers.device == "gpu" else numbers, dtype=dtype)


def _geometry(size: int, grid: int, center: Any, resample: str) -> Geometry:
    one_of("resample", resample, get_args(Resample))
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size ({size!r}) must be an integer >= 1")
    if center is None:
        center = (size // 2, size // 2)
    elif grid != 2:
        raise ValueError("center is where the edges of a 2x2 cross; leave it out for other grids")
    elif isinstance(center, DataNode):
        center = _integers(center, types.INT32)
    elif len(center) != 2 or not all(value in range(size + 1) for value in center):
        raise ValueError(f"center ({center!r}) must be two integers from 0 to {size}")
    return Geometry(size, grid, center, RESAMPLE[resample])
