"""The rows of the plan, drawn as ``nemo_dali.plan`` lists; for the CPU."""

import numpy as np
from numba import types
from numba.extending import overload

from nemo_dali.kernels.arrays import F32, I32, I64, U8, U16, U64, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.exclusions import MOST, Exclusions, random_photos, room
from nemo_dali.kernels.plan.rows import MINED, RANDOM, SINGLE
from nemo_dali.kernels.plan.words import below, draw_skipping, philox, share

Similarity = F32 | U16  # of a table's rows: float32, or the bits of float16

_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)  # multipliers of Philox4x64
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)  # key increments (Weyl)
_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # every float16, widened


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
def fill_rows(  # noqa: PLR0913  # Numba takes arrays, not objects that hold them
    seed: np.uint64,
    epoch: np.uint64,
    ref_image: I32,
    empty: U8,
    sentence_begin: I64,
    sentence_count: I32,
    sentence_ref: I32,
    photos: int,
    rules: Exclusions,
    neighbors: I32,
    similarity: Similarity,
    cells2: U16,
    cells3: U16,
    p_mined: float,
    p_random: float,
    mining: bool,
    top_k: int,
    tau: float,
    tau_empty: float,
    p_two: float,
    shift: int,
    size: int,
    position: I64,
    ref: I32,
    sentence: I32,
    kind: U8,
    grid: U8,
    cell: U8,
    images: I32,
    center: I32,
    short: I64,
) -> None:
    """Fill the plan's columns ``ref`` .. ``center`` from ``position`` and items; add to ``short`` int64 [3].

    ``ref`` holds the items: rows of refs or, where ``sentence_ref`` int32 [sentences] is not empty, of sentences. Refs
    that are 1 in ``empty`` uint8 [refs] have the bound ``tau_empty`` instead of ``tau``.
    """
    words = np.empty(16, np.uint64)
    found = np.empty(MOST, np.int64)
    work = room(rules)
    for row in range(position.size):
        for block in range(4):
            philox(seed, epoch, position[row], block, words[4 * block : 4 * block + 4])
        if sentence_ref.size:
            s = np.int64(ref[row])
            ref[row] = sentence_ref[s]
            r = ref[row]
        else:
            r = ref[row]
            s = sentence_begin[r] + below(words[1], sentence_count[r])
        own = np.int64(ref_image[r])
        sentence[row] = s
        images[row, :] = -1
        center[row, :] = -1
        drawn = share(words[2])
        kind[row], grid[row], cell[row], images[row, 0] = SINGLE, 1, 0, own
        if drawn >= p_mined + p_random:
            continue
        side = 2 if share(words[3]) < p_two else 3
        need = side * side - 1
        bits = _allowed(cells2 if side == 2 else cells3, s, side)
        choices = 0
        for bit in range(9):
            choices += bits >> bit & 1
        where = _nth_bit(bits, below(words[4], choices))
        have = np.int64(0)
        beyond: bool | np.bool_ = False
        mined = drawn < p_mined and mining
        if mined:
            bound = tau_empty if empty[r] else tau
            have, beyond = _mined_photos(words, neighbors[s], similarity[s], top_k, bound, found, need, own)
        if have < need and random_photos(words, photos, rules, r, found, have, need, own, *work) < need:
            short[2] += 1
            continue
        short[0] += beyond
        short[1] += beyond and have < need
        kind[row], grid[row], cell[row] = MINED if mined else RANDOM, side, where
        k = 0
        for c in range(side * side):
            if c == where:
                images[row, c] = own
            else:
                images[row, c] = found[k]
                k += 1
        if side == 2:
            center[row, 0] = size // 2 - shift + below(words[5], 2 * shift + 1)
            center[row, 1] = size // 2 - shift + below(words[6], 2 * shift + 1)
