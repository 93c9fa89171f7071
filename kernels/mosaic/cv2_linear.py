"""OpenCV's INTER_LINEAR on uint8, fused with normalisation and the change of layout; for the CPU.

The rules, for a length ``source`` that becomes ``size`` (the oracle is ``reference.resize_cv2_linear``):

* source coordinate of output ``d``: ``(d + 0.5) * (source / size) - 0.5`` in double, then rounded to float32;
* weights ``1 - f`` and ``f``, each times 2048, rounded half to even; columns outside the photo clamp index *and*
  weight, rows the index only;
* horizontal pass ``(p * w0 + q * w1) >> 4``, kept in int16 (at most 255 * 2048 / 16 = 32640);
* vertical pass ``(((a * b0) >> 16) + ((b * b1) >> 16) + 2) >> 2``.

A row of the photo is interleaved RGB. Two neighbouring pixels are six consecutive bytes, so the horizontal pass loads
eight bytes per output pixel, spreads them to (r0 r1 g0 g1 b0 b1 - -) and multiplies by (w0 w1 w0 w1 w0 w1 0 0):
LLVM turns this into one shuffle and one multiply-add per two pixels. Left to its own vectoriser the same loop is four
times slower, and the vertical pass, which Numba widens to 64 bits, two times (benchmarks/NOTES.md).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from nemo_dali.kernels.arrays import I16, I32, U8, Bits
from nemo_dali.kernels.jit import intrinsic, jit
from nemo_dali.kernels.normalise import Recipe, normalise
from nemo_dali.kernels.stores import fetch, keep, put_row, uncounted

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LANES = 4  # output pixels per step of the horizontal pass
_MIXED = 16  # values per step of the vertical pass: those of _LANES pixels, RGB-
_ONE = np.float32(2048)  # fixed-point one: OpenCV's INTER_RESIZE_COEF_SCALE


@intrinsic
def _blend4(typingctx: Any, row: Any, offsets: Any, weights: Any, out: Any) -> Any:
    """int16 [4, 4] at ``out`` = RGB- of the two pixels at ``row`` plus each of int32 [4], by int16 [4, 8], >> 4."""
    signature = types.void(*[types.uint64] * 4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, offsets, weights, out = args

        def vector(element: Any, count: int) -> Any:
            return ir.VectorType(element, count)

        def pick(a: Any, b: Any, lanes: Any) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(vector(_I32, len(lanes)), [int(k) for k in lanes]))

        def load(address: Any, what: Any, align: int) -> Any:
            return builder.load(builder.inttoptr(address, what.as_pointer()), align=align)

        pixels = []
        for k in range(4):
            offset = builder.zext(load(builder.add(offsets, ir.Constant(_I64, 4 * k)), _I32, 4), _I64)
            pixels.append(builder.bitcast(load(builder.add(row, offset), _I64, 1), vector(_I8, 8)))
        halves = []
        for half in range(2):
            pair = pick(pixels[2 * half], pixels[2 * half + 1], range(16))
            spread = pick(pair, pair, [8 * p + k for p in range(2) for k in (0, 3, 1, 4, 2, 5, 6, 7)])
            weight = load(builder.add(weights, ir.Constant(_I64, 32 * half)), vector(_I16, 16), 2)
            product = builder.mul(builder.zext(spread, vector(_I32, 16)), builder.sext(weight, vector(_I32, 16)))
            total = builder.add(
                pick(product, product, range(0, 16, 2)),
                pick(product, product, range(1, 16, 2)),
            )
            shifted = builder.ashr(total, ir.Constant(vector(_I32, 8), [4] * 8))
            halves.append(builder.trunc(shifted, vector(_I16, 8)))
        whole = pick(halves[0], halves[1], range(16))
        builder.store(whole, builder.inttoptr(out, vector(_I16, 16).as_pointer()), align=2)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _mix16(typingctx: Any, upper: Any, lower: Any, b0: Any, b1: Any, out: Any) -> Any:
    """uint8 [16] at ``out`` from int16 [16] at ``upper`` and ``lower``: the vertical pass with weights b0 and b1."""
    signature = types.void(types.uint64, types.uint64, types.int16, types.int16, types.uint64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half, whole, byte = (ir.VectorType(element, _MIXED) for element in (_I16, _I32, _I8))

        def same(element: Any, vector: Any) -> Any:
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), element, ir.Constant(_I32, 0))
            return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, _MIXED), [0] * _MIXED))

        def share(address: Any, weight: Any) -> Any:
            row = builder.load(builder.inttoptr(address, half.as_pointer()), align=2)
            product = builder.mul(builder.sext(row, whole), builder.sext(same(weight, half), whole))
            return builder.trunc(builder.ashr(product, ir.Constant(whole, [16] * _MIXED)), half)

        total = builder.add(share(args[0], args[2]), share(args[1], args[3]))
        rounded = builder.lshr(builder.add(total, ir.Constant(half, [2] * _MIXED)), ir.Constant(half, [2] * _MIXED))
        builder.store(builder.trunc(rounded, byte), builder.inttoptr(args[4], byte.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, codegen


@jit()
def _coordinate(d: int, scale: float) -> tuple[int, np.float32]:
    """Lower source index (may be outside the photo) and float32 fraction of output ``d``."""
    position = np.float32((d + 0.5) * scale - 0.5)
    index = int(np.floor(position))
    return index, position - np.float32(index)


@jit()
def _columns(source: int, size: int, offset: I32, weight: I16) -> None:
    """Fill byte offset int32 [>= size] and weights int16 [>= size, 8] of every output column; the rest stays 0."""
    scale = source / size
    for d in range(size):
        index, fraction = _coordinate(d, scale)
        if index < 0:
            index, fraction = 0, np.float32(0)
        if index >= source - 1:
            index, fraction = source - 1, np.float32(0)
        offset[d] = 3 * index
        for k in range(0, 6, 2):
            weight[d, k] = np.int16(np.rint((np.float32(1) - fraction) * _ONE))
            weight[d, k + 1] = np.int16(np.rint(fraction * _ONE))


@jit()
def _blend_columns(row: np.uint64, columns: int, offsets: np.uint64, weights: np.uint64, out: np.uint64) -> None:
    """Horizontal pass of one photo row, all by address: offsets and weights of ``_columns``, out int16 [columns, 4]."""
    for x in range(np.uint64(0), np.uint64(columns), np.uint64(_LANES)):
        _blend4(row, offsets + np.uint64(4) * x, weights + np.uint64(16) * x, out + np.uint64(8) * x)


@jit()
def _blend_rows(upper: np.uint64, lower: np.uint64, b0: np.int16, b1: np.int16, out: np.uint64, columns: int) -> None:
    """Vertical pass, all by address: uint8 [columns, 4] from two rows int16 [columns, 4]."""
    for i in range(np.uint64(0), np.uint64(4 * columns), np.uint64(_MIXED)):
        _mix16(upper + np.uint64(2) * i, lower + np.uint64(2) * i, b0, b1, out + i)


@jit()
def _row(first_row: np.uint64, safe_row: np.uint64, y: int, safe: int, width: int) -> np.uint64:
    """Address of photo row ``y``; from row ``safe`` on in the copy."""
    if y >= safe:
        return safe_row + np.uint64(y - safe) * np.uint64(3 * width)
    return first_row + np.uint64(y) * np.uint64(3 * width)


@jit()
def write_cv2_linear(photo: U8, table: Bits, recipe: Recipe, cell: Bits) -> None:
    """Resize a photo and write it, normalised, into a cell of a frame.

    Args:
        photo: uint8 [H, W, 3], C-contiguous RGB.
        table: [3, 256], the output value of each channel's uint8 value.
        recipe: how to compute it, ``normalise.RECIPE`` [1].
        cell: [3, h, w] of the table's dtype, a view into the frame; h or w may be 0.
    """
    height, width, _ = photo.shape
    _, h, w = cell.shape
    if h == 0 or w == 0:
        return
    padded = (w + _LANES - 1) // _LANES * _LANES
    offset = np.zeros(padded, np.int32)
    weight = np.zeros((padded, 8), np.int16)
    _columns(width, w, offset, weight)
    blended, mixed = np.empty((2, 4 * padded), np.int16), np.empty(4 * padded, np.uint8)
    parted, normalised = np.empty((3, w), np.uint8), np.empty((3, w), table.dtype)
    pixels, planes, values = uncounted(mixed), uncounted(parted), uncounted(normalised)
    # Eight bytes are loaded where six are used. Behind the last row that is outside the photo, and behind the last but
    # one where a row is a single pixel: these two are read from a longer copy.
    safe = max(height - 2, 0)
    copied = np.zeros((height - safe) * 3 * width + 8, np.uint8)
    copied[:-8] = photo[safe:].ravel()
    first_row = np.uint64(photo.ctypes.data)
    safe_row = np.uint64(copied.ctypes.data)
    offsets, weights = np.uint64(offset.ctypes.data), np.uint64(weight.ctypes.data)
    upper = np.uint64(blended.ctypes.data)
    lower = upper + np.uint64(8 * padded)
    upper_index = lower_index = -1
    scale = height / h
    for y in range(h):
        index, fraction = _coordinate(y, scale)
        b0 = np.int16(np.rint((np.float32(1) - fraction) * _ONE))
        b1 = np.int16(np.rint(fraction * _ONE))
        y0 = min(max(index, 0), height - 1)
        y1 = min(max(index + 1, 0), height - 1)
        if y0 != upper_index:
            if y0 == lower_index:
                upper, lower = lower, upper
                upper_index, lower_index = lower_index, upper_index
            else:
                row = _row(first_row, safe_row, y0, safe, width)
                _blend_columns(row, padded, offsets, weights, upper)
                upper_index = y0
        if y1 != lower_index:
            row = _row(first_row, safe_row, y1, safe, width)
            _blend_columns(row, padded, offsets, weights, lower)
            lower_index = y1
        following, _ = _coordinate(y + 1, scale)
        for later in range(max(following, y1 + 1), min(following + 2, height)):  # those that the next row is made of
            fetch(_row(first_row, safe_row, later, safe, width), 3 * width)
        _blend_rows(upper, lower, b0, b1, np.uint64(mixed.ctypes.data), padded)
        for x in range(w):  # signed: as 4 * x cannot wrap then, LLVM parts the channels with vectors
            planes[0, x] = pixels[4 * x]
            planes[1, x] = pixels[4 * x + 1]
            planes[2, x] = pixels[4 * x + 2]
        for c in range(3):
            normalise(planes[c], c, table, recipe, values[c])
        for c in range(3):  # by now the first values have left the processor's store buffer
            put_row(values[c], cell, c, y)
    keep(offset)
    keep(weight)
    keep(blended)
    keep(mixed)
    keep(parted)
    keep(normalised)
    keep(copied)
