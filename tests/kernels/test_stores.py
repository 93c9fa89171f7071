import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types

from nemo_dali.kernels.jit import intrinsic
from nemo_dali.kernels.stores import fetch, keep, put_row, uncounted

ROWS, WIDTH = 64, 240


@intrinsic
def counter(typing_context, array):
    """The address of the counter of an array's references; 0: they are not counted."""

    def codegen(context, builder, signature, arguments):
        counts = context.make_array(signature.args[0])(context, builder, arguments[0]).meminfo
        return builder.ptrtoint(counts, ir.IntType(64))

    return types.uint64(array), codegen


@njit
def write(cell):
    own = np.empty((3, WIDTH), cell.dtype)
    values = uncounted(own)
    counters = counter(own[1]), counter(values[1])
    for y in range(ROWS):
        other = np.zeros((3, WIDTH), cell.dtype)  # would get the memory of ``own`` if that had been given up
        for c in range(3):
            for x in range(WIDTH):
                values[c, x] = 7 * c + y + x
        other[:] = 0
        for c in range(3):
            put_row(values[c], cell, c, y)
    keep(own)
    return counters


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
def test_uncounted_rows_last_as_long_as_their_array_is_kept(dtype):
    c, y, x = np.ogrid[:3, :ROWS, :WIDTH]
    frame = np.zeros((3, ROWS, 2 * WIDTH + 5), dtype)
    counters = write(frame[:, :, 5 : 5 + WIDTH])
    assert counters[0] != 0 and counters[1] == 0
    assert np.array_equal(frame[:, :, 5 : 5 + WIDTH], (7 * c + y + x).astype(dtype))
    assert not frame[:, :, :5].any() and not frame[:, :, 5 + WIDTH :].any()


def test_any_address_can_be_fetched():
    fetch(np.uint64(0), 4096)
    fetch(np.uint64(2**64 - 64), 64)
