"""The oracle: what every pixel of a mosaic must be, in plain NumPy.

Written to be read and compared, not to be fast. The Numba and CUDA kernels equal these functions bit for bit, and these
functions equal OpenCV, Pillow, pycocotools and torch, which the tests ask in turn. Photos are uint8 [height, width, 3].
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from nemo_dali._choices import DType

U8 = NDArray[np.uint8]
I4 = NDArray[np.int32]


# --- OpenCV: INTER_LINEAR on uint8, without antialiasing -------------------------------------------------------------


def _linear_taps(source: int, size: int, *, clamp_weight: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices [size, 2] and weights [size, 2], in units of 1/2048, of the two source values behind each output value.

    OpenCV clamps index and weight together along a row (`clamp_weight`), but only the index down a column.
    """
    place = ((np.arange(size) + 0.5) * (source / size) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    fraction = place - first.astype(np.float32)
    if clamp_weight:
        fraction[(first < 0) | (first >= source - 1)] = 0
    index = np.clip(np.stack([first, first + 1], axis=1), 0, source - 1)
    weight = np.rint(np.stack([np.float32(1) - fraction, fraction], axis=1) * np.float32(2048)).astype(np.int64)
    return index, weight


def resize_cv2_linear(photo: U8, height: int, width: int) -> U8:
    """Resize as ``cv2.resize(photo, (width, height), interpolation=cv2.INTER_LINEAR)`` does.

    Returns uint8 [height, width, 3]; either size may be 0.
    """
    if height == 0 or width == 0:
        return np.zeros((height, width, 3), np.uint8)
    column, a = _linear_taps(photo.shape[1], width, clamp_weight=True)
    row, b = _linear_taps(photo.shape[0], height, clamp_weight=False)
    across = photo[:, column[:, 0]] * a[:, :1] + photo[:, column[:, 1]] * a[:, 1:]  # [photo height, width, 3]
    upper = ((across[row[:, 0]] >> 4) * b[:, 0, None, None]) >> 16
    lower = ((across[row[:, 1]] >> 4) * b[:, 1, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def nearest_sources_cv2(source: int, size: int) -> I4:
    """Source index [size] of each output index, as OpenCV's ``INTER_NEAREST`` reads along one axis."""
    step = 1 / (size / source) if size else 0.0
    return np.minimum(np.floor(np.arange(size) * step), source - 1).astype(np.int32)


# --- Pillow: BILINEAR, antialiased, as versions up to 12 do it -------------------------------------------------------


def _antialias_taps(source: int, size: int) -> list[tuple[int, NDArray[np.int64]]]:
    """For each output index: the first source index, and the weights, in units of 2**-22, from there on."""
    scale = source / size
    support = max(scale, 1.0)  # half the width of the triangle, in source pixels
    taps = []
    for i in range(size):
        center = (i + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        end = min(int(center + support + 0.5), source)
        weight = np.maximum(1 - np.abs((np.arange(first, end) - center + 0.5) * (1 / support)), 0)
        weight /= weight.cumsum()[-1]  # summed in order: NumPy's sum() adds in pairs, which rounds differently
        taps.append((first, (0.5 + weight * (1 << 22)).astype(np.int64)))
    return taps


def _antialias_rows(photo: U8, size: int) -> U8:
    """Resize axis 0 to `size`, rounding to uint8; an axis that has this size already is left alone."""
    if photo.shape[0] == size:
        return photo
    rows = [np.tensordot(k, photo[first : first + len(k)], 1) for first, k in _antialias_taps(photo.shape[0], size)]
    return np.clip((np.stack(rows) + (1 << 21)) >> 22, 0, 255).astype(np.uint8)


def resize_pillow_bilinear(photo: U8, height: int, width: int) -> U8:
    """Resize as Pillow's ``Image.resize((width, height), Image.Resampling.BILINEAR)`` does: across, then down.

    Returns uint8 [height, width, 3]; either size may be 0. Pillow 12.2 and 12.3 go down first where a photo is more
    than a hundred times as tall as it is wide; this does not.
    """
    if height == 0 or width == 0:
        return np.zeros((height, width, 3), np.uint8)
    across = _antialias_rows(photo.swapaxes(0, 1), width).swapaxes(0, 1)
    return _antialias_rows(across, height).copy()


def nearest_sources_pillow(source: int, size: int) -> I4:
    """Source index [size] of each output index, as Pillow's ``NEAREST`` reads along one axis.

    Pillow adds up the step, one output pixel after the other, and the rounding of each sum counts.
    """
    steps = np.full(size, source / size if size else 0.0)
    steps[:1] /= 2
    return steps.cumsum().astype(np.int32)


# --- Masks, normalisation, and the frame -----------------------------------------------------------------------------


def mask_from_runs(counts: NDArray[np.uint32], shape: tuple[int, int], rows: I4, columns: I4) -> U8:
    """Read a mask at some source rows [h] and columns [w] only, without drawing the rest of it.

    `counts` are COCO run lengths over the mask of `shape` (height, width), column after column, outside first.
    Returns uint8 [h, w] in {0, 1}.
    """
    flat = columns.astype(np.int64)[None, :] * shape[0] + rows.astype(np.int64)[:, None]
    ends = counts.astype(np.int64).cumsum()
    return (np.searchsorted(ends, flat, side="right") % 2).astype(np.uint8)


def normalisation_table(mean: Sequence[float], std: Sequence[float], dtype: str) -> NDArray[np.generic]:
    """What each uint8 value of each channel becomes, [3, 256], computed by torch as torchvision would.

    float32 equals ``Normalize(mean, std)(ToTensor()(image))`` to the bit; float16 and bfloat16 are that, rounded by
    torch (bfloat16 comes as the bits in uint16, as NumPy has no such type); uint8 is the value itself.
    """
    import torch

    value = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    if dtype == "uint8":
        return value.numpy()
    center, spread = (torch.tensor(numbers, dtype=torch.float32)[:, None] for numbers in (mean, std))
    table = (value.float().div(255) - center) / spread
    if dtype == "float32":
        return table.numpy()
    if dtype == "float16":
        return table.half().numpy()
    if dtype == "bfloat16":
        return table.bfloat16().view(torch.uint16).numpy()
    raise ValueError(f"dtype ({dtype!r}) must be one of {get_args(DType)}")


def mosaic(
    photos: Sequence[U8],
    *,
    grid: int,
    center: tuple[int, int],
    counts: NDArray[np.uint32],
    cell: int,
    size: int,
    resample: str,
    table: NDArray[np.generic],
    channels_last: bool = False,
) -> tuple[NDArray[np.generic], U8]:
    """One sample: each photo stretched into its cell (row-major), and the mask of the photo in cell `cell`.

    `center` is where the edges cross in a 2x2 grid, (x, y) in pixels; other grids are regular. `counts` are the run
    lengths of the target in its own photo. Returns the frame [3, size, size] of the table's type, or [size, size, 3]
    with `channels_last`, and the mask, uint8 [size, size] in {0, 1}.
    """
    resize, sources = {
        "cv2-linear": (resize_cv2_linear, nearest_sources_cv2),
        "pillow-bilinear": (resize_pillow_bilinear, nearest_sources_pillow),
    }[resample]
    regular = [size * j // grid for j in range(grid + 1)]
    xs, ys = ([0, center[0], size], [0, center[1], size]) if grid == 2 else (regular, regular)
    frame = np.zeros((3, size, size), table.dtype)
    mask = np.zeros((size, size), np.uint8)
    for i, photo in enumerate(photos):
        y0, y1, x0, x1 = ys[i // grid], ys[i // grid + 1], xs[i % grid], xs[i % grid + 1]
        pixels = resize(photo, y1 - y0, x1 - x0)
        for channel in range(3):
            frame[channel, y0:y1, x0:x1] = table[channel][pixels[:, :, channel]]
        if i == cell:
            rows, columns = sources(photo.shape[0], y1 - y0), sources(photo.shape[1], x1 - x0)
            mask[y0:y1, x0:x1] = mask_from_runs(counts, (photo.shape[0], photo.shape[1]), rows, columns)
    return (np.ascontiguousarray(frame.transpose(1, 2, 0)) if channels_last else frame), mask
