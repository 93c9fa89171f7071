"""Whether the rows of a negative table can be what they are said to be, whatever their checksums say."""

import numpy as np

from nemo_dali.kernels.arrays import F32, I32, I64
from nemo_dali.kernels.jit import jit


@jit()
def first_bad_row(rows: I64, own: I64, neighbors: I32, similarity: F32, seen: I32) -> int:
    """The first of some rows that is not of distinct photos by descending, finite similarity.

    A row may end early: from there on its photos are -1 and its similarities -inf.

    Args:
        rows: int64 [n], of the table.
        own: int64 [n], a photo that may not be among a row's; -1: any may.
        neighbors: int32 [S, N].
        similarity: float32 [S, N].
        seen: int32 [photos + 1], scratch, zero at first: in which row a photo was seen last, and how many rows were.

    Returns:
        Its place among ``rows``, or -1.
    """
    photos, width = len(seen) - 1, neighbors.shape[1]
    for i in range(len(rows)):
        row_photos, values, other = neighbors[rows[i]], similarity[rows[i]], own[i]
        end = width
        while end > 0 and row_photos[end - 1] == -1:
            end -= 1
        bad = False
        # Without a way out of the loops, so that they are vectorised.
        for j in range(end):
            bad |= (row_photos[j] < 0) | (row_photos[j] >= photos) | (row_photos[j] == other)
        for j in range(1, end):
            bad |= not (values[j] <= values[j - 1])  # as NaN is not
        for j in range(end, width):
            bad |= values[j] != -np.inf
        if bad or (end > 0 and not (values[0] < np.inf and values[end - 1] > -np.inf)):
            return i
        seen[photos] += 1
        mark = seen[photos]
        for j in range(end):
            bad |= seen[row_photos[j]] == mark
            seen[row_photos[j]] = mark
        if bad:
            return i
    return -1
