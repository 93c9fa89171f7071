"""Negatives in the place of bad photos; for the CPU. ``nemo_dali.plan`` has the rules."""

import numpy as np

from nemo_dali.kernels.arrays import I32, U64, Flags, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.draws import Chances, Columns, Similarity, window
from nemo_dali.kernels.plan.exclusions import Exclusions, may_stand_in, room
from nemo_dali.kernels.plan.rows import MINED, SINGLE, PlanRows
from nemo_dali.kernels.plan.words import below, philox

_TRIES = 64  # draws of a random substitute before it is looked for in order: enough even if nine of ten photos are bad


@jit(error_model="python")
def _is_free(photo: Int, shown: I32, bad: Flags) -> bool:
    """Whether a photo can take a bad one's place: it exists, is not bad, and ``shown`` [9] does not hold it."""
    if photo < 0 or photo >= bad.size or bad[photo]:
        return False
    for other in shown:
        if other == photo:
            return False
    return True


@jit(error_model="python")
def _next_candidate(
    neighbors: I32,
    similarity: Similarity,
    top_k: int,
    tau: float,
    need: Int,
    own: Int,
    gone: Int,
    shown: I32,
    bad: Flags,
) -> Int:
    """The candidate behind ``gone`` that can take its place, or -1.

    Asked are the rest of the window, its beginning, and the row's last ``need`` entries from its end.
    """
    begin, end, valid, _ = window(neighbors, similarity, top_k, tau, need, own)
    first = begin
    for k in range(begin, end):
        if neighbors[k] == gone:
            first = k + 1
    for k in range(first, end):
        if _is_free(neighbors[k], shown, bad):
            return neighbors[k]
    for k in range(begin, first):
        if _is_free(neighbors[k], shown, bad):
            return neighbors[k]
    for k in range(valid - 1, max(valid - need, 0) - 1, -1):
        if _is_free(neighbors[k], shown, bad):
            return neighbors[k]
    return -1


@jit(error_model="python")
def _random_other(
    seed: np.uint64,
    epoch: np.uint64,
    position: Int,
    k: int,
    words: U64,
    rules: Exclusions,
    ref: Int,
    own: Int,
    shown: I32,
    bad: Flags,
) -> Int:
    """A random photo that can take the place of a bad one in the k-th free cell; ``words`` is room for four.

    -1: the ref's exclusions leave none, though others are free; -2: no photo is free.
    """
    photo: Int = 0
    _, vector, part = room(rules)
    for attempt in range(_TRIES):
        word = 16 + 8 * attempt + k
        philox(seed, epoch, position, word // 4, words)
        photo = below(words[word % 4], bad.size)
        if _is_free(photo, shown, bad) and may_stand_in(rules, ref, own, photo, vector, part):
            return photo
    none: Int = -2
    for _ in range(bad.size):
        photo = (photo + 1) % bad.size
        if _is_free(photo, shown, bad):
            if may_stand_in(rules, ref, own, photo, vector, part):
                return photo
            none = -1
    return none


@jit(error_model="python")
def replace_photos(
    seed: np.uint64,
    epoch: np.uint64,
    columns: Columns,
    rules: Exclusions,
    chances: Chances,
    bad: Flags,
    barred: Flags,
    visible: Flags,
    rows: PlanRows,
) -> int:
    """Replace the bad negatives in plan rows of one data set; how many there were, or -1 if no photo was left.

    Where photos are left, but none that the ref's exclusions allow, the row becomes a single photo.

    ``bad`` is bool [photos], and ``barred`` those that may not take their place, the bad ones among them. Cells that
    have no pixels, False in ``visible`` bool [n, 9], are left alone.

    A photo that ``barred`` is asked about and that is not barred must be shown: see ``nemo_dali.plan``.
    """
    neighbors, similarity = columns.neighbors, columns.similarity
    words = np.empty(4, np.uint64)
    shown = np.empty(9, np.int32)
    replaced = 0
    for i in range(rows.size):
        row = rows[i]
        shown[:] = row.images
        own = np.int64(shown[row.cell])
        cells = np.int64(row.grid) * row.grid
        free = -1
        for c in range(cells):
            if c == row.cell:
                continue
            free += 1
            if not visible[i, c] or not bad[shown[c]]:
                continue
            photo: Int = -1
            if row.kind == MINED:
                s = row.sentence
                bound = chances.tau_empty if columns.empty[row.ref] else chances.tau
                photo = _next_candidate(
                    neighbors[s], similarity[s], chances.top_k, bound, cells - 1, own, shown[c], shown, barred
                )
            if photo < 0:
                photo = _random_other(seed, epoch, row.position, free, words, rules, row.ref, own, shown, barred)
            if photo == -2:
                return -1
            replaced += 1
            if photo < 0:
                row.kind, row.grid, row.cell = SINGLE, 1, 0
                shown[:] = -1
                shown[0] = own
                row.center[:] = -1
                break
            shown[c] = photo
        row.images[:] = shown
    return replaced
