"""CRIS's letterbox: OpenCV 4's warpAffine on uint8, cubic for photos and linear for masks; for the CPU.

The photo keeps its proportions, its longer side fills the frame, and what is left on both sides gets the border colour
(CRIS utils/dataset.py, ``getTransformMat``). The rules, for a frame of w x h pixels (the oracle is OpenCV 4 itself):

* the matrix is the one from three float32 points, inverted in double; a source coordinate is its product times 1024,
  rounded half to even, and so lies on a grid of 1/32 pixel, rounded to nearest;
* the 4 x 4 (2 x 2) weights of each of the 32 x 32 fractions are products in float32 times 32768, rounded; what their
  sum lacks of 32768 goes to the largest of the four in the middle (what it has too much, to the smallest);
* ``(sum of weight * value + 16384) >> 15``, clamped to 0 to 255; outside the photo the value is the border's.

OpenCV 5 computes warpAffine in another way and its pixels differ.

Photo rows are staged with border pixels around them, so that a tap outside the photo is none of the loop's business:

    lines  b b b b │ row 4n     │ b b b b      A frame's row shows four neighbouring photo rows: each has its place, by
           b b b b │ row 4n + 1 │ b b b b      its number modulo 4, and stays there until another one needs it.
           ...                                 The fifth line is border alone, for rows outside the photo.

A frame's pixel takes 12 consecutive bytes of each of the four. Numba would widen the products to 64 bits; an intrinsic
spreads the bytes to pairs of neighbouring taps, so that LLVM multiplies and adds them by one instruction a row
(benchmarks/NOTES.md).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from nemo_dali.kernels.arrays import I32, U8, U32, Int
from nemo_dali.kernels.jit import intrinsic, jit
from nemo_dali.kernels.warp_weights import CUBIC, FRACTIONS, ONE, WEIGHTS_CUBIC, WEIGHTS_LINEAR

_AROUND = 4  # border pixels at each end of a staged photo row: as many as there are taps
_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))


@jit()
def letterbox_sources(source_height: int, source_width: int, height: Int, width: Int, rows: I32, columns: I32) -> None:
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


@jit()
def _placed(source: int, size: Int, scale: float) -> tuple[float, float]:
    """Where the photo begins along one axis of the frame, in pixels, and the frame's pixels per photo pixel."""
    shown = source * scale
    margin = (size - shown) / 2.0
    begin, end = np.float64(np.float32(margin)), np.float64(np.float32(shown + margin))
    return begin, (end - begin) / source


@intrinsic
def _sum_taps(
    typingctx: Any, first: Any, second: Any, third: Any, fourth: Any, offset: Any, weights: Any, out: Any
) -> Any:
    """uint8 [4] at ``out`` = RGB- of the 4 x 4 pixels at the four rows + offset, weighted by int16 [4, 4].

    All arguments are addresses but the offset, which is in bytes. 16 bytes of each row are read.
    """
    signature = types.void(*[types.uint64] * 7)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        *rows, offset, weights, out = args

        def vector(element: Any, count: int) -> Any:
            return ir.VectorType(element, count)

        def constant(element: Any, values: Any) -> Any:
            return ir.Constant(vector(element, len(values)), list(values))

        def pick(a: Any, lanes: Any) -> Any:
            return builder.shuffle_vector(a, a, constant(_I32, lanes))

        def load(address: Any, what: Any, align: int) -> Any:
            return builder.load(builder.inttoptr(address, what.as_pointer()), align=align)

        weight = load(weights, vector(_I16, 16), 2)
        total = constant(_I32, [ONE >> 1] * 4 + [0] * 4)  # sums of the first and the last two columns
        for i, row in enumerate(rows):
            taps = load(builder.add(row, offset), vector(_I8, 16), 1)
            spread = pick(taps, [6 * half + k for half in range(2) for k in (0, 3, 1, 4, 2, 5, 2, 5)])
            share = pick(weight, [4 * i + 2 * half + k for half in range(2) for k in (0, 1) * 4])
            product = builder.mul(builder.zext(spread, vector(_I32, 16)), builder.sext(share, vector(_I32, 16)))
            pairs = builder.add(pick(product, range(0, 16, 2)), pick(product, range(1, 16, 2)))
            total = builder.add(total, pairs)
        total = builder.add(pick(total, range(4)), pick(total, range(4, 8)))
        total = builder.ashr(total, constant(_I32, [15] * 4))
        for limit, beyond in ((0, "<"), (255, ">")):
            bound = constant(_I32, [limit] * 4)
            total = builder.select(builder.icmp_signed(beyond, total, bound), bound, total)
        builder.store(builder.trunc(total, vector(_I8, 4)), builder.inttoptr(out, vector(_I8, 4).as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, codegen


@jit()
def _copy(source: U8, target: U8) -> None:
    """An assignment of slices, but by vectors."""
    for i in range(source.size):
        target[i] = source[i]


@jit()
def warp_letterbox(photo: U8, border: int, out: U8) -> None:
    """Letterbox a photo.

    Args:
        photo: uint8 [H, W, 3], C-contiguous RGB.
        border: the border's colour, ``red | green << 8 | blue << 16``.
        out: uint8 [h, w, 3], C-contiguous, what is written.
    """
    height, width, _ = photo.shape
    h, w, _ = out.shape
    rows, columns = np.empty(h, np.int32), np.empty(w, np.int32)
    letterbox_sources(height, width, h, w, rows, columns)
    offset, across = np.empty(w, np.uint64), np.empty(w, np.uint64)  # in bytes, of taps and of weights
    for x in range(w):
        left = (columns[x] >> 5) - 1  # further out there is nothing but border either
        offset[x] = 3 * (min(max(left, -_AROUND), width) + _AROUND)
        across[x] = (columns[x] & 31) * CUBIC * CUBIC * 2
    lines = np.empty((5, 3 * (width + 2 * _AROUND) + 4), np.uint8)  # 16 bytes are read where 12 are used
    for i in range(lines.shape[1]):
        lines[:, i] = border >> 8 * (i % 3) & 255
    held = np.full(4, -1, np.int64)  # which photo rows the first four lines are
    address, pitch = np.uint64(lines.ctypes.data), np.uint64(lines.shape[1])
    weights = np.uint64(WEIGHTS_CUBIC.ctypes.data)
    four = np.empty(4, np.uint64)
    pixels = np.empty(4 * w, np.uint8)
    target = np.uint64(pixels.ctypes.data)
    for y in range(h):
        top = (rows[y] >> 5) - 1
        for i in range(4):
            row, line = top + i, (top + i) & 3
            if row < 0 or row >= height:
                line = 4
            elif held[line] != row:
                held[line] = row
                _copy(photo[row].ravel(), lines[line, 3 * _AROUND : 3 * (_AROUND + width)])
            four[i] = address + np.uint64(line) * pitch
        down = weights + np.uint64((rows[y] & 31) * FRACTIONS * CUBIC * CUBIC * 2)
        first, second, third, fourth = four[0], four[1], four[2], four[3]
        for x in range(w):
            _sum_taps(first, second, third, fourth, offset[x], down + across[x], target + np.uint64(4 * x))
        for x in range(w):
            out[y, x, 0] = pixels[4 * x]
            out[y, x, 1] = pixels[4 * x + 1]
            out[y, x, 2] = pixels[4 * x + 2]
    # Numba lets go of an array after its last use as one, which to it the address is: this is one more.
    lines[0, 0] = pixels[0]


@jit()
def write_letterbox_mask(runs: U32, height: int, width: int, soft: bool, cell: U8) -> None:
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
    begin: Any  # an integer: mypy cannot tell what min() makes of two kinds of them
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
            total = np.int32(ONE >> 1)
            for i in range(2):
                for j in range(2):
                    if 0 <= top + i < height and 0 <= left + j < width:
                        total += np.int32(weight[i, j]) * np.int32(mask[left + j, top + i])
            value = total >> 15
            cell[y, x] = value if soft else value >> 7
