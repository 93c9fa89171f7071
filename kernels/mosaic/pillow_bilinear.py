"""Pillow's antialiased BILINEAR on one CPU thread: bit for bit that of Pillow up to 12, and several times as fast.

Pillow resizes across, rounds to uint8, then down. Each output value is a sum of neighbouring source values times
weights in units of 2**-22. Down, LLVM vectorises a plain loop over the row. Across, the neighbours of each pixel start
somewhere else, which defeats it; so four rows are taken at once, and their bytes share one vector:

    row y      R G B x ─┐
    row y + 1  R G B x ─┼─▶ 16 int32 lanes, times one weight, added to 16 sums
    row y + 2  R G B x ─┤       (x is the next pixel's red: computed with the others, then dropped)
    row y + 3  R G B x ─┘

Numba has no vector type, hence the three intrinsics. A CPU with shorter registers than sixteen lanes takes several.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from nemo_dali.kernels.arrays import I32, I64, U8
from nemo_dali.kernels.jit import intrinsic, jit

_I8, _I32 = ir.IntType(8), ir.IntType(32)
_V4X32, _V16X8, _V16X32 = ir.VectorType(_I32, 4), ir.VectorType(_I8, 16), ir.VectorType(_I32, 16)


class _SumsType(types.Type):
    """Sixteen int32 sums: four channels of four pixels."""

    def __init__(self) -> None:
        super().__init__(name="nemo_dali.Sums")


@register_model(_SumsType)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _V16X32)


_sums = _SumsType()


def _four_pixels(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, line: Any) -> Iterator[Any]:
    """Pointers to the four bytes at `offset` into a flat uint8 array, and at one, two and three times `line` beyond."""
    data = context.make_array(array_type)(context, builder, array).data
    for _ in range(4):
        yield builder.bitcast(builder.gep(data, [offset]), _I32.as_pointer())
        offset = builder.add(offset, line)


@intrinsic
def _half(typing_context: Any) -> Any:
    """The sums at the start: one half, so that the shift at the end rounds."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_V16X32, [1 << 21] * 16)

    return _sums(), codegen


@intrinsic
def _add(typing_context: Any, sums: Any, pixels: Any, offset: Any, line: Any, weight: Any) -> Any:
    """Add `weight` times the four pixels at byte `offset` of pixels, uint8 [n], and the three lines below."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, pixels, offset, line, weight = arguments
        four = ir.Constant(_V4X32, ir.Undefined)
        for i, pointer in enumerate(_four_pixels(context, builder, signature.args[1], pixels, offset, line)):
            four = builder.insert_element(four, builder.load(pointer, align=1), _I32(i))
        values = builder.zext(builder.bitcast(four, _V16X8), _V16X32)
        first = builder.insert_element(ir.Constant(_V16X32, ir.Undefined), weight, _I32(0))
        weights = builder.shuffle_vector(first, first, ir.Constant(_V16X32, [0] * 16))
        return builder.add(sums, builder.mul(values, weights))

    return _sums(_sums, pixels, types.uintp, types.uintp, types.int32), codegen


@intrinsic
def _store(typing_context: Any, sums: Any, pixels: Any, offset: Any, line: Any) -> Any:
    """Round the sums to uint8, as the four pixels at byte `offset` of pixels, uint8 [n], and the three lines below."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, pixels, offset, line = arguments
        whole = builder.lshr(sums, ir.Constant(_V16X32, [22] * 16))
        most = ir.Constant(_V16X32, [255] * 16)
        clipped = builder.select(builder.icmp_unsigned("<", whole, most), whole, most)
        four = builder.bitcast(builder.trunc(clipped, _V16X8), _V4X32)
        for i, pointer in enumerate(_four_pixels(context, builder, signature.args[1], pixels, offset, line)):
            builder.store(builder.extract_element(four, _I32(i)), pointer, align=1)
        return context.get_dummy_value()

    return types.void(_sums, pixels, types.uintp, types.uintp), codegen


_compile = jit()


@_compile
def _antialias_taps(source: int, size: int) -> tuple[I64, I64, I32]:
    """First source index [size], how many there are [size], and their weights, int32 [size, most], unset beyond."""
    scale = source / size
    support = max(scale, 1.0)  # half the width of the triangle, in source pixels
    per_support = 1 / support
    most = 2 * int(np.ceil(support)) + 1
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights, triangle = np.empty((size, most), np.int32), np.empty(most, np.float64)
    for i in range(size):
        center = (i + 0.5) * scale
        first[i] = max(int(center - support + 0.5), 0)
        count[i] = min(int(center + support + 0.5), source) - first[i]
        total = 0.0
        for j in range(count[i]):
            triangle[j] = max(1 - abs((j + first[i] - center + 0.5) * per_support), 0.0)
            total += triangle[j]
        for j in range(count[i]):
            weights[i, j] = int(0.5 + triangle[j] / total * (1 << 22))
    return first, count, weights


@_compile
def _across(source: U8, line: np.uintp, first: I64, count: I64, weights: I32, between: U8) -> None:
    """Resize the rows of source, uint8 [n], along x into between, uint8 [rows, 4 * width]; rows is a multiple of 4.

    A row of the source is `line` bytes long. One byte beyond the last one is read, and not used.
    """
    target = between.reshape(between.size)
    target_line = np.uintp(between.shape[1])
    for y in range(np.uintp(0), np.uintp(between.shape[0]), np.uintp(4)):
        row, target_row = y * line, y * target_line
        for x in range(np.uintp(len(first))):
            o = row + np.uintp(3) * np.uintp(first[x])
            sums = _half()
            for j in range(np.uintp(count[x])):
                sums = _add(sums, source, o, line, weights[x, j])
                o += np.uintp(3)
            _store(sums, target, target_row + np.uintp(4) * x, target_line)


@_compile
def _down(between: U8, first: I64, count: I64, weights: I32, out: U8) -> None:
    """Resize between, uint8 [rows, 4 * width], along y into out, uint8 [3, height, width]."""
    sums = np.empty(between.shape[1], np.int32)
    pixels = np.empty(between.shape[1], np.uint8)
    for y in range(np.uintp(len(first))):
        for i in range(np.uintp(len(sums))):
            sums[i] = 1 << 21
        for j in range(count[y]):
            row, weight = between[first[y] + j], weights[y, j]
            for i in range(np.uintp(len(sums))):
                sums[i] += weight * np.int32(row[i])
        for i in range(np.uintp(len(sums))):
            pixels[i] = min(sums[i] >> 22, 255)
        for x in range(out.shape[2]):  # signed: as 4 * x cannot wrap then, LLVM parts the channels with vectors
            out[0, y, x] = pixels[4 * x]
            out[1, y, x] = pixels[4 * x + 1]
            out[2, y, x] = pixels[4 * x + 2]


@_compile
def resize_pillow_bilinear(photo: U8, out: U8) -> None:
    """Resize photo, uint8 [H, W, 3] and C-contiguous, into out, uint8 [3, height, width], whose sizes may be 0."""
    height, width = out.shape[1], out.shape[2]
    if height == 0 or width == 0:
        return
    rows, line = photo.shape[0], 3 * photo.shape[1]
    first_x, count_x, weights_x = _antialias_taps(photo.shape[1], width)
    first_y, count_y, weights_y = _antialias_taps(rows, height)

    # The last one to four rows go through a copy: it fills up the four, and has the one byte more that is read.
    body = (rows - 1) // 4 * 4
    flat = photo.reshape(photo.size)
    tail = np.zeros(4 * line + 1, np.uint8)
    for i in range((rows - body) * line):  # a loop, as a slice assignment compiles for three seconds
        tail[i] = flat[body * line + i]
    between = np.empty((body + 4, 4 * width), np.uint8)
    _across(flat, np.uintp(line), first_x, count_x, weights_x, between[:body])
    _across(tail, np.uintp(line), first_x, count_x, weights_x, between[body:])
    _down(between, first_y, count_y, weights_y, out)
