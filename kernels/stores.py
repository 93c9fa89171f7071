"""Stores that go past the cache, for rows of a frame; for the CPU.

A batch of frames is larger than the cache and is read by somebody else, later. An ordinary store first fetches the line
that it is going to overwrite; a non-temporal one does not, which saves a third of the kernel's time.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils

from nemo_dali.kernels.arrays import Bits, Int
from nemo_dali.kernels.jit import intrinsic, jit

Array = TypeVar("Array", bound=npt.NDArray[Any])

LINE = np.uint64(64)  # bytes of a cache line; half a line past the cache costs more than it saves
_WORTH_IT = 512  # bytes of a row below which the lines cut at its ends eat up the gain


@intrinsic
def as_pointer(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer, for ``carray``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), codegen


def store_past_cache(builder: Any, line: Any, target: Any) -> None:
    """In a compiled function: store a vector of ``LINE`` bytes at address ``target``, a multiple of ``LINE``."""
    store = builder.store(line, builder.inttoptr(target, line.type.as_pointer()), align=int(LINE))
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@jit()
def uncounted(array: Array) -> Array:
    """The same memory, contiguous, as an array whose references Numba does not count; ``keep`` the array behind it.

    To count one is an atomic operation, and that waits until all stores past the cache have reached memory.
    """
    return carray(as_pointer(np.uint64(array.ctypes.data)), array.shape, array.dtype)


@intrinsic
def keep(typingctx: Any, array: Any) -> Any:
    """Numba lets go of an array after its last use as one, which to it an address is not: here it is used."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), codegen


@intrinsic
def store_line(typingctx: Any, target: Any, source: Any) -> Any:
    """Copy a line from address ``source`` to address ``target``, a multiple of ``LINE``, past the cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source = args
        line = ir.VectorType(ir.IntType(64), int(LINE) // 8)
        store_past_cache(builder, builder.load(builder.inttoptr(source, line.as_pointer()), align=1), target)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), codegen


@intrinsic
def copy_bytes(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy bytes from address ``source`` to address ``target``; the two may overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memmove(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.uint64] * 3), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Make this thread's non-temporal stores visible before anything that it stores later."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _fetch_line(typingctx: Any, address: Any) -> Any:
    """Have the line at ``address``, which may be anything, brought into the cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To be read, into the nearest cache, as data.
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


@jit()
def fetch(address: np.uint64, nbytes: Int) -> None:
    """Have memory brought into the cache while other work goes on."""
    for offset in range(np.uint64(0), np.uint64(nbytes), LINE):
        _fetch_line(address + offset)


@jit()
def put_row(row: Bits, cell: Bits, channel: int, y: int) -> None:
    """Copy ``row`` [w] to ``cell[channel, y]``, a view into a frame whose last axis is contiguous.

    Whole cache lines go past the cache, what is left at both ends goes the ordinary way. The row should be
    ``uncounted``.
    """
    line, size, width = LINE, np.uint64(row.itemsize), np.uint64(row.size)
    if width * size < np.uint64(_WORTH_IT):
        for x in range(width):
            cell[channel, y, x] = row[x]
        return
    source = np.uint64(row.ctypes.data)
    target = np.uint64(cell.ctypes.data + channel * cell.strides[0] + y * cell.strides[1])
    head = min((np.uint64(0) - target) % line // size, width)
    lines = (width - head) * size // line
    for x in range(head):
        cell[channel, y, x] = row[x]
    for k in range(lines):
        offset = head * size + np.uint64(k) * line
        store_line(target + offset, source + offset)
    for x in range(head + lines * line // size, width):
        cell[channel, y, x] = row[x]
