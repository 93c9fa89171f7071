"""The ranking in plain NumPy, by a full sort: the oracle."""

import numpy as np

from nemo_dali.kernels.arrays import F32, I32, Flags, Integers


def similarity_reference(left: F32, right: F32) -> F32:
    """The exact similarities float32 [n, m] of float32 [n, D] to float32 [m, D]; D is a multiple of 32."""
    rows = []
    for vector in left.astype(np.float64):
        a, b, c, d, e, f, g, h = np.split(right.astype(np.float64) * vector, 8, axis=1)
        a, b, c, d = np.split(((a + b) + (c + d)) + ((e + f) + (g + h)), 4, axis=1)
        part = (a + c) + (b + d)
        total = np.zeros(len(right))
        for column in part.T:
            total += column
        rows.append(total.astype(np.float32))
    return np.array(rows, np.float32).reshape(len(left), len(right))


def rank_reference(
    text: F32, image: F32, own: Integers, *, depth: int, excluded: Flags | None = None
) -> tuple[I32, F32, I32]:
    """The ranking by a full sort.

    Args:
        text, image: float32 [S, D] and [M, D]; D is a multiple of 32.
        own: integer [S], the photo row that each sentence does not get.
        excluded: bool [S, M], further photos that it does not get.

    Returns:
        ``(neighbors int32 [S, depth], similarity float32 [S, depth], own_rank int32 [S])``; short rows end in -1 and
        -inf; the last is the own photo's place among all M, from 1.
    """
    exact = similarity_reference(text, image)
    neighbors = np.full((len(text), depth), -1, np.int32)
    similarity = np.full((len(text), depth), -np.inf, np.float32)
    own_rank = np.empty(len(text), np.int32)
    for row, photo in enumerate(own):
        order = np.argsort(-exact[row], kind="stable")
        own_rank[row] = 1 + np.flatnonzero(order == photo)[0]
        left_out = order == photo if excluded is None else (order == photo) | excluded[row, order]
        best = order[~left_out][:depth]
        neighbors[row, : len(best)], similarity[row, : len(best)] = best, exact[row, best]
    return neighbors, similarity, own_rank
