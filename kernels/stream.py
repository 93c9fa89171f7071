"""Table lookup and stores that go past the cache, for rows of a frame; for the CPU.

A batch of frames is larger than the cache and is read by somebody else, later. An ordinary store first fetches the line
that it is going to overwrite; a non-temporal one does not, which saves a third of the kernel's time.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

_LINE = 64  # bytes of a cache line; half a line past the cache costs more than it saves
_WORTH_IT = 512  # bytes of a row below which the lines cut at its ends eat up the gain


@intrinsic
def as_pointer(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer, for ``carray``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), codegen


@intrinsic
def _stream_line(typingctx: Any, target: Any, source: Any) -> Any:
    """Copy a line from address ``source`` to address ``target``, a multiple of ``_LINE``, past the cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), _LINE // 8)
        target, source = (builder.inttoptr(arg, line.as_pointer()) for arg in args)
        store = builder.store(builder.load(source, align=1), target, align=_LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Make this thread's non-temporal stores visible before anything that it stores later."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True, cache=True, error_model="numpy")
def _stream_row(row: Any, target: Any) -> None:
    """Copy ``row`` to address ``target``: whole lines past the cache, what is left at both ends the ordinary way."""
    line = np.uint64(_LINE)
    size = np.uint64(row.itemsize)
    source = np.uint64(row.ctypes.data)
    width = np.uint64(row.size)
    head = min((np.uint64(0) - target) % line // size, width)
    lines = (width - head) * size // line
    tail = head + lines * line // size
    values = carray(as_pointer(target), row.size, row.dtype)
    for x in range(head):
        values[x] = row[x]
    for k in range(lines):
        offset = head * size + np.uint64(k) * line
        _stream_line(target + offset, source + offset)
    for x in range(tail, width):
        values[x] = row[x]


@njit(nogil=True, cache=True, error_model="numpy")
def write_row(pixels: Any, step: int, offset: int, table: Any, buffer: Any, cell: Any, channel: int, y: int) -> None:
    """Set ``cell[channel, y, x]`` to ``table[channel, pixels[offset + step * x]]``.

    Args:
        pixels: uint8 [>= offset + step * w].
        table: [3, 256].
        buffer: [w] of the table's dtype, scratch.
        cell: [3, h, w] of the table's dtype, a view into a frame whose last axis is contiguous.
    """
    _, _, w = cell.shape
    if w * table.itemsize < _WORTH_IT:
        for x in range(w):
            cell[channel, y, x] = table[channel, pixels[np.uint64(offset) + np.uint64(step) * np.uint64(x)]]
        return
    for x in range(w):
        buffer[x] = table[channel, pixels[np.uint64(offset) + np.uint64(step) * np.uint64(x)]]
    _stream_row(buffer, np.uint64(cell.ctypes.data + channel * cell.strides[0] + y * cell.strides[1]))
