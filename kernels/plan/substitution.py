"""Negatives in the place of bad photos; for the CPU. ``nemo_dali.plan`` has the rules."""

import numpy as np

from nemo_dali.kernels.arrays import I32, I64, U8, U64, Flags, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.draws import Similarity, window
from nemo_dali.kernels.plan.exclusions import Exclusions, may_stand_in, room
from nemo_dali.kernels.plan.rows import MINED, SINGLE
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
def replace_photos(  # noqa: PLR0913  # Numba takes arrays, not objects that hold them
    seed: np.uint64,
    epoch: np.uint64,
    neighbors: I32,
    similarity: Similarity,
    top_k: int,
    tau: float,
    tau_empty: float,
    empty: U8,
    rules: Exclusions,
    bad: Flags,
    barred: Flags,
    visible: Flags,
    position: I64,
    ref: I32,
    sentence: I32,
    kind: U8,
    grid: U8,
    cell: U8,
    images: I32,
    center: I32,
) -> int:
    """Replace the bad negatives in the plan's column ``images``; how many there were, or -1 if no photo was left.

    Where photos are left, but none that the ref's exclusions allow, the row becomes a single photo.

    ``bad`` is bool [photos], and ``barred`` those that may not take their place, the bad ones among them. Cells that
    have no pixels, False in ``visible`` bool [n, 9], are left alone.

    A photo that ``barred`` is asked about and that is not barred must be shown: see ``nemo_dali.plan``.
    """
    words = np.empty(4, np.uint64)
    replaced = 0
    for row in range(position.size):
        shown = images[row]
        own = np.int64(shown[cell[row]])
        cells = np.int64(grid[row]) * grid[row]
        free = -1
        for c in range(cells):
            if c == cell[row]:
                continue
            free += 1
            if not visible[row, c] or not bad[shown[c]]:
                continue
            photo: Int = -1
            if kind[row] == MINED:
                s = sentence[row]
                bound = tau_empty if empty[ref[row]] else tau
                photo = _next_candidate(
                    neighbors[s], similarity[s], top_k, bound, cells - 1, own, shown[c], shown, barred
                )
            if photo < 0:
                r = ref[row]
                photo = _random_other(seed, epoch, position[row], free, words, rules, r, own, shown, barred)
            if photo == -2:
                return -1
            replaced += 1
            if photo < 0:
                kind[row], grid[row], cell[row] = SINGLE, 1, 0
                shown[:] = -1
                shown[0] = own
                center[row, :] = -1
                break
            shown[c] = photo
    return replaced
