"""Random negatives that no exclusion forbids; for the CPU.

    place      0   1   2   3   4   5   6   7      photos that anybody may get, ascending: ``allowed``
    bike           x       x       x              of them, those that show a category: ``shown``
    free       0       1       2       3   4      for a target of that category: drawn, and found by bisection

Photos like the target's own one are met one by one: each gives way to the next free place.
"""

from typing import NamedTuple

import numpy as np

from nemo_dali.kernels.arrays import F32, F64, I32, I64, U64, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.words import draw_skipping
from nemo_dali.kernels.ranking.topk import similarity_of

MOST = 8  # negatives of a 3x3 mosaic


class Exclusions(NamedTuple):
    """Photos that a ref may not be shown with besides its own. Empty arrays, and an infinite bound, exclude none.

    Attributes:
        allowed: int32 [A], ascending: photos that anybody may get; empty: all.
        category: int32 [refs], of the target: photos that show it are excluded; -1: unknown.
        begin: int64 [categories + 1], where each category's places begin in ``shown``.
        shown: int32, places in ``allowed`` (or photos) that show a category, ascending.
        twins: int32 [photos], equal for photos of one content.
        embedding: float32 [photos, D], D a multiple of 32.
        similar_above: photos more similar than this to the ref's own photo are excluded.
    """

    allowed: I32
    category: I32
    begin: I64
    shown: I32
    twins: I32
    embedding: F32
    similar_above: float


@jit(error_model="python")
def _category(rules: Exclusions, ref: Int) -> tuple[np.int64, np.int64]:
    """The range of ``shown`` that is excluded for a ref."""
    if rules.category.size == 0 or rules.category[ref] < 0:
        return np.int64(0), np.int64(0)
    return rules.begin[rules.category[ref]], rules.begin[rules.category[ref] + 1]


@jit(error_model="python")
def _photo_of(allowed: I32, shown: I32, begin: Int, end: Int, free: Int) -> np.int64:
    """The photo at a free place: as many places lie before it as are free, and the excluded ones between them."""
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        if shown[middle] - (middle - begin) <= free:
            low = middle + 1
        else:
            high = middle
    place = free + low - begin
    return np.int64(allowed[place]) if allowed.size else np.int64(place)


@jit(error_model="python")
def _first_at_least(values: I32, low: Int, high: Int, value: Int) -> np.int64:
    """The first of ``values[low:high]``, ascending, that is not below a value; ``high``: none is."""
    while low < high:
        middle = (low + high) // 2
        if values[middle] < value:
            low = middle + 1
        else:
            high = middle
    return np.int64(low)


@jit(error_model="python")
def _free_of(rules: Exclusions, begin: Int, end: Int, photo: Int) -> np.int64:
    """The inverse; -1 for a photo that is at no free place."""
    place = np.int64(photo)
    if rules.allowed.size:
        place = _first_at_least(rules.allowed, 0, rules.allowed.size, photo)
        if place == rules.allowed.size or rules.allowed[place] != photo:
            return np.int64(-1)
    nearest = _first_at_least(rules.shown, begin, end, place)
    if nearest < end and rules.shown[nearest] == place:
        return np.int64(-1)
    return place - (nearest - begin)


@jit(error_model="python")
def _is_like(twins: I32, embedding: F32, bound: float, own: Int, photo: Int, vector: F64, part: F64) -> bool:
    """Whether a photo is the own one once more, or too similar to it."""
    if twins.size and twins[photo] == twins[own]:
        return True
    if embedding.size == 0:
        return False
    return bool(similarity_of(vector, embedding, photo, part) > bound)


@jit(error_model="python")
def room(rules: Exclusions) -> tuple[I64, F64, F64]:
    """What the functions below work in: int64 [9], float64 [D] and [D / 8]."""
    width = rules.embedding.shape[1]
    return np.empty(MOST + 1, np.int64), np.empty(width), np.empty(width // 8)


@jit(error_model="python")
def may_stand_in(rules: Exclusions, ref: Int, own: Int, photo: Int, vector: F64, part: F64) -> bool:
    """Whether a photo may be a random negative of a ref whose own photo is ``own``; for the last two see ``room``."""
    begin, end = _category(rules, ref)
    if _free_of(rules, begin, end, photo) < 0:
        return False
    if rules.embedding.size:
        vector[:] = rules.embedding[own]
    return not _is_like(rules.twins, rules.embedding, rules.similar_above, own, photo, vector, part)


@jit(error_model="python")
def random_photos(  # noqa: PLR0913  # Numba takes no dataclass, and a tuple used once is no shorter
    words: U64,
    photos: int,
    rules: Exclusions,
    ref: Int,
    found: I64,
    have: Int,
    need: Int,
    own: Int,
    taken: I64,
    vector: F64,
    part: F64,
) -> Int:
    """Fill ``found[have:need]`` with distinct photos that are neither ``own`` nor in ``found[:have]``.

    For ``taken``, ``vector`` and ``part`` see ``room``.

    Returns:
        How many are in ``found`` now: fewer than ``need`` where the exclusions leave no more.
    """
    begin, end = _category(rules, ref)
    allowed, shown, twins = rules.allowed, rules.shown, rules.twins  # to hand over few arrays: each is counted
    embedding, bound = rules.embedding, rules.similar_above
    for i in range(embedding.shape[1]):
        vector[i] = embedding[own, i]
    all_free = rules.allowed.size == 0 and begin == end
    alone = rules.embedding.size == 0 and rules.twins.size == 0
    count = 0
    for k in range(-1, have):
        free = own if k < 0 else found[k]
        if not all_free:
            free = _free_of(rules, begin, end, free)
        if free >= 0:
            taken[count] = free
            count += 1
    taken[:count].sort()
    free_places = (rules.allowed.size if rules.allowed.size else photos) - (end - begin)
    for k in range(have, need):
        if count >= free_places:
            return k
        free = draw_skipping(words[8 + k], free_places, taken, count)
        photo = free if all_free else _photo_of(allowed, shown, begin, end, free)
        if not alone and _is_like(twins, embedding, bound, own, photo, vector, part):
            free = _next(rules, begin, end, own, free, free_places, taken[: count + 1], vector, part)
            if free < 0:
                return k
            photo = _photo_of(allowed, shown, begin, end, free)
        count += 1
        found[k] = photo
    return need


@jit(error_model="python")
def _next(
    rules: Exclusions, begin: Int, end: Int, own: Int, free: Int, free_places: Int, taken: I64, vector: F64, part: F64
) -> np.int64:
    """The first free place behind ``free`` whose photo will do, in whose place it is put into ``taken``; -1: none."""
    for step in range(1, free_places):
        other = (free + step) % free_places
        place = np.searchsorted(taken, other)
        if place < taken.size and taken[place] == other:
            continue
        photo = _photo_of(rules.allowed, rules.shown, begin, end, other)
        if not _is_like(rules.twins, rules.embedding, rules.similar_above, own, photo, vector, part):
            taken[np.searchsorted(taken, free)] = other
            taken.sort()
            return np.int64(other)
    return np.int64(-1)
