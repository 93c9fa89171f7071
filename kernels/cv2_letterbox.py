"""CRIS's letterbox: OpenCV 4's warpAffine on uint8, cubic for photos and linear for masks; for the CPU.

The photo keeps its proportions, its longer side fills the frame, and what is left on both sides gets the border colour
(CRIS utils/dataset.py, ``getTransformMat``). The rules, for a frame of w x h pixels (the oracle is OpenCV 4 itself):

* the matrix is the one from three float32 points, inverted in double; a source coordinate is its product times 1024,
  rounded half to even, and so lies on a grid of 1/32 pixel, rounded to nearest;
* the 4 x 4 (2 x 2) weights of each of the 32 x 32 fractions are products in float32 times 32768, rounded; what their
  sum lacks of 32768 goes to the largest of the four in the middle (what it has too much, to the smallest);
* ``(sum of weight * value + 16384) >> 15``, clamped to 0 to 255; outside the photo the value is the border's.

OpenCV 5 computes warpAffine in another way and its pixels differ.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from nemo_dali.kernels.normalise import normalise
from nemo_dali.kernels.stream import put_row

FRACTIONS = 32  # a source coordinate's steps per pixel: OpenCV's INTER_TAB_SIZE
CUBIC, LINEAR = 4, 2  # taps along one axis
_ONE = 1 << 15  # fixed-point one: OpenCV's INTER_REMAP_COEF_SCALE
_SHARPNESS = np.float32(-0.75)  # of OpenCV's cubic kernel


def warp_weights(taps: int) -> npt.NDArray[np.int16]:
    """int16 [32, 32, taps, taps]: of the fractions down and across, the weights down and across, in 1/32768."""
    x = np.arange(FRACTIONS, dtype=np.float32) / np.float32(FRACTIONS)
    one, a = np.float32(1), _SHARPNESS
    if taps == LINEAR:
        along = np.stack([one - x, x], axis=1)
    else:
        far = ((a * (x + one) - 5 * a) * (x + one) + 8 * a) * (x + one) - 4 * a
        near, behind = (((a + 2) * t - (a + 3)) * t * t + one for t in (x, one - x))
        along = np.stack([far, near, behind, one - far - near - behind], axis=1)
    products = along[:, None, :, None] * along[None, :, None, :] * np.float32(_ONE)
    weights = np.clip(np.rint(products), -_ONE, _ONE - 1).astype(np.int64).reshape(-1, taps, taps)
    for whole in weights:
        lacking = _ONE - whole.sum()
        middle = whole[taps // 2 : taps // 2 + 2, taps // 2 : taps // 2 + 2]
        middle[np.unravel_index(middle.argmax() if lacking > 0 else middle.argmin(), middle.shape)] += lacking
    return weights.astype(np.int16).reshape(FRACTIONS, FRACTIONS, taps, taps)


WEIGHTS_CUBIC, WEIGHTS_LINEAR = warp_weights(CUBIC), warp_weights(LINEAR)


@njit(nogil=True, cache=True, error_model="numpy")
def letterbox_sources(source_height: int, source_width: int, height: int, width: int, rows: Any, columns: Any) -> None:
    """Fill int32 [height] and [width] with the source coordinates of a frame's rows and columns, in 1/32 pixel."""
    scale = min(height / source_height, width / source_width)
    top, down = _placed(source_height, height, scale)
    left, across = _placed(source_width, width, scale)
    per_area = 1.0 / (across * down)  # OpenCV inverts the matrix by its determinant
    per_column, per_row = down * per_area, across * per_area
    half = 16  # of 1/32, in 1/1024: the shift rounds down
    for y in range(height):
        rows[y] = (np.int64(np.rint((per_row * y - per_row * top) * 1024)) + half) >> 5
    first = np.int64(np.rint(-per_column * left * 1024)) + half
    for x in range(width):  # rounded in two parts, unlike the rows
        columns[x] = (first + np.int64(np.rint(per_column * x * 1024))) >> 5


@njit(nogil=True, cache=True, error_model="numpy")
def _placed(source: int, size: int, scale: float) -> tuple[float, float]:
    """Where the photo begins along one axis of the frame, in pixels, and the frame's pixels per photo pixel."""
    shown = source * scale
    margin = (size - shown) / 2.0
    begin, end = np.float64(np.float32(margin)), np.float64(np.float32(shown + margin))
    return begin, (end - begin) / source


@njit(nogil=True, cache=True, error_model="numpy")
def write_letterbox(photo: Any, border: int, table: Any, recipe: Any, cell: Any) -> None:
    """Write a photo, letterboxed and normalised, into a cell of a frame.

    Args:
        photo: uint8 [H, W, 3], C-contiguous RGB.
        border: the border's colour, ``red | green << 8 | blue << 16``.
        table: [3, 256], the output value of each channel's uint8 value.
        recipe: how to compute it, ``normalise.RECIPE`` [1].
        cell: [3, h, w] of the table's dtype, a view into the frame.
    """
    height, width, _ = photo.shape
    _, h, w = cell.shape
    rows, columns = np.empty(h, np.int32), np.empty(w, np.int32)
    letterbox_sources(height, width, h, w, rows, columns)
    colour = np.array([border & 255, border >> 8 & 255, border >> 16 & 255], np.int32)
    pixels = np.empty((3, w), np.uint8)
    values = np.empty(w, table.dtype)
    half = np.int32(_ONE >> 1)
    for y in range(h):
        top = (rows[y] >> 5) - 1  # the first of four photo rows
        weights = WEIGHTS_CUBIC[rows[y] & 31]
        whole_rows = 0 <= top and top + 4 <= height
        for x in range(w):
            left = (columns[x] >> 5) - 1
            weight = weights[columns[x] & 31]
            red = green = blue = half
            if whole_rows and 0 <= left and left + 4 <= width:
                for i in range(4):
                    for j in range(4):
                        share = np.int32(weight[i, j])
                        red += share * np.int32(photo[top + i, left + j, 0])
                        green += share * np.int32(photo[top + i, left + j, 1])
                        blue += share * np.int32(photo[top + i, left + j, 2])
            elif top <= -4 or top >= height or left <= -4 or left >= width:
                red, green, blue = half + colour[0] * _ONE, half + colour[1] * _ONE, half + colour[2] * _ONE
            else:
                for i in range(4):
                    for j in range(4):
                        share = np.int32(weight[i, j])
                        inside = 0 <= top + i < height and 0 <= left + j < width
                        red += share * (np.int32(photo[top + i, left + j, 0]) if inside else colour[0])
                        green += share * (np.int32(photo[top + i, left + j, 1]) if inside else colour[1])
                        blue += share * (np.int32(photo[top + i, left + j, 2]) if inside else colour[2])
            pixels[0, x] = min(max(red >> 15, 0), 255)
            pixels[1, x] = min(max(green >> 15, 0), 255)
            pixels[2, x] = min(max(blue >> 15, 0), 255)
        for c in range(3):
            normalise(pixels[c], c, table, recipe, values)
            put_row(values, cell, c, y)


@njit(nogil=True, cache=True, error_model="numpy")
def write_letterbox_mask(runs: Any, height: int, width: int, soft: bool, cell: Any) -> None:
    """Write the mask of a letterboxed photo.

    Args:
        runs: uint32 [n] run lengths of the photo's mask, down the columns, background first.
        height, width: the photo's, in pixels.
        soft: write what warpAffine makes of a mask of 0 and 255; else 1 where that is 128 or more, and 0.
        cell: uint8 [h, w], a view into the sample's mask.
    """
    h, w = cell.shape
    rows, columns = np.empty(h, np.int32), np.empty(w, np.int32)
    letterbox_sources(height, width, h, w, rows, columns)
    mask = np.zeros((width, height), np.uint8)
    flat, begin = mask.ravel(), np.int64(0)
    for i in range(runs.size):
        end = min(begin + np.int64(runs[i]), flat.size)
        if i & 1:
            flat[begin:end] = 255
        begin = end
    for y in range(h):
        top = rows[y] >> 5
        for x in range(w):
            left = columns[x] >> 5
            weight = WEIGHTS_LINEAR[rows[y] & 31, columns[x] & 31]
            total = np.int32(_ONE >> 1)
            for i in range(2):
                for j in range(2):
                    if 0 <= top + i < height and 0 <= left + j < width:
                        total += np.int32(weight[i, j]) * np.int32(mask[left + j, top + i])
            value = total >> 15
            cell[y, x] = value if soft else value >> 7
