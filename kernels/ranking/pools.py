"""How often each photo is drawn from the pools of many sentences: NumPy reference, Numba kernel.

From one tau to the next the window of a sentence moves a little: only what leaves and what comes in is counted.
"""

import numpy as np

from nemo_dali.kernels.arrays import F64, I32, I64, Int, Integers
from nemo_dali.kernels.jit import jit


def draws_reference(neighbors: I32, begin: Integers, end: Integers, weight: F64, photos: int) -> F64:
    """Expected draws float64 [photos]: each sentence draws ``weight`` photos, evenly from its window.

    Args:
        neighbors: int32 [n, N], photo rows.
        begin, end: integer [n], the half-open windows, which hold no -1.
        weight: float64 [n].
    """
    counts = np.zeros(photos)
    for row, (first, last) in enumerate(zip(begin, end, strict=True)):
        np.add.at(counts, neighbors[row, first:last], weight[row] / max(last - first, 1))
    return counts


@jit(error_model="python")
def _add(counts: F64, neighbors: I32, row: Int, first: Int, last: Int, amount: float) -> None:
    for i in range(first, last):
        counts[neighbors[row, i]] += amount


@jit(error_model="python")
def move_windows(neighbors: I32, old_begin: I64, old_end: I64, begin: I64, end: I64, weight: F64, counts: F64) -> None:
    """Turn the draws of the old windows into those of the new ones, in place; arguments as in the reference."""
    for row in range(len(weight)):
        size, old_size = end[row] - begin[row], old_end[row] - old_begin[row]
        if size == old_size:
            if size == 0:
                continue
            share = weight[row] / size
            _add(counts, neighbors, row, old_begin[row], min(old_end[row], begin[row]), -share)
            _add(counts, neighbors, row, max(old_begin[row], end[row]), old_end[row], -share)
            _add(counts, neighbors, row, begin[row], min(end[row], old_begin[row]), share)
            _add(counts, neighbors, row, max(begin[row], old_end[row]), end[row], share)
        else:
            if old_size:
                _add(counts, neighbors, row, old_begin[row], old_end[row], -weight[row] / old_size)
            if size:
                _add(counts, neighbors, row, begin[row], end[row], weight[row] / size)
