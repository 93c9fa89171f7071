"""A launch of an assembled kernel on the machine, and what it counted."""

import ctypes
from dataclasses import dataclass

import numpy as np

from tests.helpers.ptx import machine_library
from tests.helpers.ptx.assembler import RESERVED

COUNTS = np.dtype([(name, "u8") for name in ("issues", "lanes", "sectors", "wavefronts", "fewest")])
TOTALS = ("barriers", "most_in_flight", "sectors_read", "sectors_written")
LIMIT = 2 * 10**9  # issues, in case a kernel does not end


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("begin", "bytes", "writable")]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("static_shared", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("params", ctypes.c_void_p),
    ]


class Fault(Exception):
    """What is wrong with a launch, and which instruction caused it."""


@dataclass
class Counted:
    """What a launch did.

    Attributes:
        counts: dtype ``COUNTS`` [instructions of the kernel].
        blocks: of the launch.
        totals: of the launch, by the names in ``TOTALS``.
    """

    counts: np.ndarray
    blocks: int
    totals: dict[str, int]


def run(kernel, grid, block, parameters, *, readable=(), writable=(), dynamic_shared=0, seed=0, limit=LIMIT):
    """Run a kernel here and now.

    Args:
        kernel: ``assembler.Kernel``.
        grid, block: up to three numbers each.
        parameters: integers.
        readable, writable: (address, bytes) of the memory that it may use, in host memory.
        seed: of the order of warps, and of the initial content of shared memory.

    Raises:
        Fault: see ``machine.cpp``.
    """
    grid, block = ((*numbers, 1, 1)[:3] for numbers in (grid, block))
    packed = np.zeros(sum(kernel.parameters[-1]) if kernel.parameters else 1, np.uint8)
    for (offset, size), value in zip(kernel.parameters, parameters, strict=True):
        packed[offset : offset + size] = np.frombuffer((int(value) % 2**64).to_bytes(8, "little")[:size], np.uint8)
    arrays = [array for array in kernel.globals.values()]
    regions = [(begin, size, False) for begin, size in readable] + [(begin, size, True) for begin, size in writable]
    regions += [(array.ctypes.data, array.nbytes, False) for array in arrays]
    regions = [region for region in regions if region[1]]
    window = machine_library.library().ptx_shared_window()
    constants = np.array([_constant(value, window, kernel.globals) for value in kernel.constants] or [0], np.uint64)
    launch = _Launch(
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*block),
        kernel.shared,
        dynamic_shared,
        seed,
        limit,
        packed.ctypes.data,
    )
    counts, totals = np.zeros(len(kernel.code), COUNTS), (ctypes.c_uint64 * len(TOTALS))()
    message, where = ctypes.create_string_buffer(400), ctypes.c_int(-1)
    registers = len(kernel.register_bits)
    failed = machine_library.library().ptx_run(
        ctypes.c_void_p(kernel.code.ctypes.data),
        len(kernel.code),
        ctypes.c_void_p(kernel.register_bits.ctypes.data),
        ctypes.c_void_p(constants.ctypes.data),
        registers,
        registers - len(kernel.constants),
        ctypes.byref(launch),
        (_Region * max(len(regions), 1))(*(_Region(*region) for region in regions)),
        len(regions),
        ctypes.c_void_p(counts.ctypes.data),
        totals,
        message,
        len(message),
        ctypes.byref(where),
    )
    if failed:
        at = where.value
        raise Fault(f"{kernel.name}, line {kernel.lines[at]}, {kernel.texts[at]!r}: {message.value.decode()}")
    return Counted(counts, int(np.prod(grid)), dict(zip(TOTALS, totals, strict=True)))


def _constant(value, window, arrays):
    if isinstance(value, tuple):
        return window + value[0]
    return arrays[value].ctypes.data if isinstance(value, str) else value


assert RESERVED == 16  # as machine.cpp has it
