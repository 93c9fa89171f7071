"""Whether the rows of a negative table can be what they are said to be, whatever their checksums say."""

import numpy as np

from nemo_dali.kernels.arrays import F32, I32, I64
from nemo_dali.kernels.jit import jit


@jit()
def first_bad_row(own: I64, neighbors: I32, similarity: F32, seen: I32) -> int:
    """The first of some rows that is not of distinct photos by descending, finite similarity.

    A row may end early: from there on its photos are -1 and its similarities -inf.

    Args:
        own: int64 [n], a photo that may not be among a row's; -1: any may.
        neighbors: int32 [n, N].
        similarity: float32 [n, N].
        seen: int32 [photos + 1], scratch, zero at first: in which row a photo was seen last, and how many rows were.

    Returns:
        Which, or -1.
    """
    photos = len(seen) - 1
    for i in range(len(neighbors)):
        seen[photos] += 1
        mark = seen[photos]
        above = np.float32(np.inf)
        ended = False
        for j in range(neighbors.shape[1]):
            photo, value = neighbors[i, j], similarity[i, j]
            if photo == -1:
                ended = True
                if value != -np.inf:
                    return i
                continue
            if ended or photo < -1 or photo >= photos or photo == own[i] or seen[photo] == mark:
                return i
            seen[photo] = mark
            if not (-np.inf < value <= above) or value == np.inf:
                return i
            above = value
    return -1
