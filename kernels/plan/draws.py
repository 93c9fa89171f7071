"""The rows of the plan, drawn as ``nemo_dali.plan`` lists; for the CPU."""

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from nemo_dali.kernels.arrays import F32, I32, I64, U8, U16, U64, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.exclusions import MOST, Exclusions, random_photos, room
from nemo_dali.kernels.plan.rows import MINED, RANDOM, SINGLE, PlanRows
from nemo_dali.kernels.plan.words import below, draw_skipping, philox, share

Similarity = F32 | U16  # of a table's rows: float32, or the bits of float16

BEYOND, RANDOM_TOO, ALONE = 1, 2, 4  # how a row met too few candidates; see ``planner.ShortPools``
_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # every float16, widened


class Columns(NamedTuple):
    """What rows of one data set are drawn from; ``plan.part.Part`` says more. An empty array: there is none.

    Attributes:
        ref_image: int32 [refs]. empty: uint8 [refs], 1: the bound is ``tau_empty``.
        sentence_begin, sentence_count: int64 and int32 [refs]. sentence_ref: int32 [sentences].
        photos: how many there are.
        neighbors: int32 [sentences, N]. similarity: float32 [sentences, N], or the bits of float16.
        cells2, cells3: uint16 [sentences], where a target may lie.
    """

    ref_image: I32
    empty: U8
    sentence_begin: I64
    sentence_count: I32
    sentence_ref: I32
    photos: int
    neighbors: I32
    similarity: Similarity
    cells2: U16
    cells3: U16


class Chances(NamedTuple):
    """A policy in an epoch.

    Attributes:
        top_k, tau, tau_empty: of ``window``.
        p_two: share of 2x2 among the mosaics.
        shift: largest one of the crossing of a 2x2, in pixels of a frame of ``size``.
    """

    p_mined: float
    p_random: float
    top_k: int
    tau: float
    tau_empty: float
    p_two: float
    shift: int
    size: int


@jit(error_model="python")
def shuffle_keys(seed: np.uint64, epoch: np.uint64, keys: U64) -> None:
    """Fill uint64 [items] with word 0 of every item."""
    words = np.empty(4, np.uint64)
    for item in range(keys.size):
        philox(seed, epoch, item, 0, words)
        keys[item] = words[0]


def _wide(value: np.float32 | np.uint16) -> float:
    """A similarity as a float, whether stored as float32 or as the bits of a float16."""
    raise NotImplementedError  # compiled code takes what follows


@overload(_wide)
def _overload_wide(value):  # type: ignore[no-untyped-def]  # Numba compares this signature with the lambda's
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: _HALF[value]


@jit(error_model="python")
def first_at_most(row: Similarity, bound: float) -> int:
    """First index of a descending row whose value is <= bound, or its size."""
    low, high = 0, row.size
    if high and _wide(row[high - 1]) > bound:  # the usual case of a full row: one cache miss instead of ten
        return high
    step = 8
    while low + step < high and _wide(row[low + step]) > bound:  # the bound is usually near the beginning
        low += step + 1
        step *= 2
    high = min(high, low + step)
    while low < high:
        middle = (low + high) // 2
        if _wide(row[middle]) <= bound:
            high = middle
        else:
            low = middle + 1
    return low


@jit(error_model="python")
def pool_end(begin: Int, valid: Int, top_k: Int) -> Int:
    """Where a pool ends that begins at ``begin``, in a row whose valid entries end at ``valid``."""
    return begin + np.minimum(top_k, valid - begin)


@jit(error_model="python")
def window(
    neighbors: I32, similarity: Similarity, top_k: int, tau: float, need: Int, own: Int
) -> tuple[Int, Int, int, bool | np.bool_]:
    """The candidates in one row of the table: begin, end, where the row's valid entries end, whether it was too short.

    The pool starts at the first similarity <= tau and has at most ``top_k`` entries; ``pools`` finds those of many
    rows, and the report's page.html has this rule once more. A pool with fewer than ``need`` entries gives way to the
    row's last ``need`` ones. ``own`` does not count should a table contain it.
    """
    valid = first_at_most(similarity, -np.inf)
    begin = 0 if tau == np.inf else first_at_most(similarity[:valid], tau)
    end = pool_end(begin, valid, top_k)
    enough = end - begin
    for k in range(begin, end):
        enough -= neighbors[k] == own
    short = enough < need
    if short:
        begin, end = max(valid - need, 0), valid
        for k in range(begin, end):
            if neighbors[k] == own and begin > 0:
                begin -= 1
    return begin, end, valid, short


@jit(error_model="python")
def _mined_photos(
    words: U64, neighbors: I32, similarity: Similarity, top_k: int, tau: float, found: I64, need: int, own: Int
) -> tuple[np.int64, bool | np.bool_]:
    """Fill ``found`` from one row of the table; return how many were found, and whether the window was too short.

    The candidates are those of ``window``, without ``own``.
    """
    begin, end, _, short = window(neighbors, similarity, top_k, tau, need, own)
    taken = np.empty(MOST + 1, np.int64)
    count = 0
    for k in range(begin, end):
        if neighbors[k] == own and count == 0:
            taken[0] = k - begin
            count = 1
    have = np.int64(min(need, end - begin - count))
    for k in range(have):
        found[k] = neighbors[begin + draw_skipping(words[8 + k], end - begin, taken, count + k)]
    return have, short


@jit(error_model="python")
def _nth_bit(bits: Int, n: Int) -> int:
    """Index of the n-th set bit, n counted from 0."""
    index = 0
    while True:
        if bits >> index & 1:
            if n == 0:
                return index
            n -= 1
        index += 1


@jit(error_model="python")
def _allowed(cells: U16, sentence: Int, grid: int) -> Int:
    everywhere = (1 << grid * grid) - 1
    return np.int64(cells[sentence]) & everywhere if cells.size else everywhere


@jit(error_model="python")
def fill_rows(
    seed: np.uint64, epoch: np.uint64, columns: Columns, rules: Exclusions, chances: Chances, rows: PlanRows, short: U8
) -> None:
    """Draw plan rows of one data set.

    Args:
        rows: dtype ``PLAN`` [n], with ``position`` and, as ``ref``, items: rows of refs or, where every sentence is a
            sample, of sentences. The rest is filled.
        short: uint8 [n], filled with what each row met: 0, or some of BEYOND, RANDOM_TOO and ALONE.
    """
    neighbors, similarity, sentence_ref = columns.neighbors, columns.similarity, columns.sentence_ref
    cells2, cells3 = columns.cells2, columns.cells3
    words = np.empty(16, np.uint64)
    found = np.empty(MOST, np.int64)
    work = room(rules)
    for i in range(rows.size):
        row = rows[i]
        for block in range(4):
            philox(seed, epoch, row.position, block, words[4 * block : 4 * block + 4])
        item = np.int64(row.ref)
        if sentence_ref.size:
            r, s = np.int64(sentence_ref[item]), item
        else:
            r = item
            s = columns.sentence_begin[r] + below(words[1], columns.sentence_count[r])
        own = np.int64(columns.ref_image[r])
        row.ref, row.sentence = r, s
        row.images[:] = -1
        row.center[:] = -1
        row.kind, row.grid, row.cell, row.images[0] = SINGLE, 1, 0, own
        short[i] = 0
        drawn = share(words[2])
        if drawn >= chances.p_mined + chances.p_random:
            continue
        side = 2 if share(words[3]) < chances.p_two else 3
        need = side * side - 1
        bits = _allowed(cells2 if side == 2 else cells3, s, side)
        choices = 0
        for bit in range(9):
            choices += bits >> bit & 1
        where = _nth_bit(bits, below(words[4], choices))
        have = np.int64(0)
        beyond: bool | np.bool_ = False
        mined = drawn < chances.p_mined
        if mined:
            bound = chances.tau_empty if columns.empty[r] else chances.tau
            have, beyond = _mined_photos(words, neighbors[s], similarity[s], chances.top_k, bound, found, need, own)
        if have < need and random_photos(words, columns.photos, rules, r, found, have, need, own, *work) < need:
            short[i] = ALONE
            continue
        short[i] = BEYOND * beyond | RANDOM_TOO * (beyond and have < need)
        row.kind, row.grid, row.cell = MINED if mined else RANDOM, side, where
        k = 0
        for c in range(side * side):
            if c == where:
                row.images[c] = own
            else:
                row.images[c] = found[k]
                k += 1
        if side == 2:
            middle = chances.size // 2 - chances.shift
            row.center[0] = middle + below(words[5], 2 * chances.shift + 1)
            row.center[1] = middle + below(words[6], 2 * chances.shift + 1)
