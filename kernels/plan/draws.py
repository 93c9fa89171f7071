"""Counter-based random draws and the rows of the plan; for the CPU.

``philox`` is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with NumPy's
convention that the counter is raised before a block is made. What each word means is listed in ``nemo_dali.plan``.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload

from nemo_dali.kernels.arrays import F32, I32, I64, U8, U16, U64, Int
from nemo_dali.kernels.jit import intrinsic, jit
from nemo_dali.kernels.plan.rows import MINED, RANDOM, SINGLE

Similarity = F32 | U16  # of a table's rows: float32, or the bits of float16

_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)  # multipliers of Philox4x64
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)  # key increments (Weyl)
_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)  # every float16, widened
_MOST = 8  # negatives of a 3x3 mosaic


@intrinsic
def multiply_high(typingctx: Any, a: Any, b: Any) -> Any:
    """Upper 64 bits of the product of two uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(arg, wide) for arg in args))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), codegen


@jit(error_model="python")
def philox(key0: np.uint64, key1: np.uint64, position: Int, block: Int, words: U64) -> None:
    """Write words 4 * block .. 4 * block + 3 of ``Philox(key=[key0, key1], counter=[0, position, 0, 0])``."""
    c0, c1, c2, c3 = np.uint64(block + 1), np.uint64(position), np.uint64(0), np.uint64(0)
    for _ in range(10):
        high0, low0 = multiply_high(_M0, c0), _M0 * c0
        high1, low1 = multiply_high(_M1, c2), _M1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += _W0
        key1 += _W1
    words[0], words[1], words[2], words[3] = c0, c1, c2, c3


@jit(error_model="python")
def shuffle_keys(seed: np.uint64, epoch: np.uint64, keys: U64) -> None:
    """Fill uint64 [items] with word 0 of every item."""
    words = np.empty(4, np.uint64)
    for item in range(keys.size):
        philox(seed, epoch, item, 0, words)
        keys[item] = words[0]


@jit(error_model="python")
def _below(word: np.uint64, n: Int) -> np.int64:
    return np.int64(multiply_high(word, np.uint64(n)))


@jit(error_model="python")
def _share(word: np.uint64) -> np.float64:
    return np.float64(word >> np.uint64(11)) * 2.0**-53


def _wide(value: np.float32 | np.uint16) -> float:
    """A similarity as a float, whether stored as float32 or as the bits of a float16."""
    raise NotImplementedError  # compiled code takes what follows


@overload(_wide)
def _overload_wide(value):  # type: ignore[no-untyped-def]  # Numba compares this signature with the lambda's
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: _HALF[value]


@jit(error_model="python")
def _first_at_most(row: Similarity, bound: float) -> int:
    """First index of a descending row whose value is <= bound."""
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
def _draw_skipping(word: np.uint64, n: Int, taken: I64, count: int) -> np.int64:
    """A number in [0, n) that is none of ``taken[:count]`` (ascending), uniform; it is inserted into ``taken``."""
    value = _below(word, n - count)
    place = 0
    while place < count and taken[place] <= value:
        value += 1
        place += 1
    for k in range(count, place, -1):
        taken[k] = taken[k - 1]
    taken[place] = value
    return value


@jit(error_model="python")
def _random_photos(words: U64, photos: int, allowed: I32, found: I64, have: int, need: Int, own: Int) -> None:
    """Fill ``found[have:need]`` with distinct photos that are neither ``own`` nor in ``found[:have]``.

    Drawn are places in ``allowed``, int32 ascending: photos that may be shown. If it is empty, all ``photos`` may.
    """
    taken = np.empty(_MOST + 1, np.int64)
    count = 0
    for k in range(-1, have):
        photo = own if k < 0 else found[k]
        place = np.searchsorted(allowed, photo) if allowed.size else photo
        if allowed.size == 0 or (place < allowed.size and allowed[place] == photo):
            taken[count] = place
            count += 1
    taken[:count].sort()
    among = allowed.size if allowed.size else photos
    for k in range(have, need):
        place = _draw_skipping(words[8 + k], among, taken, count)
        count += 1
        found[k] = allowed[place] if allowed.size else place


@jit(error_model="python")
def _window(
    neighbors: I32, similarity: Similarity, top_k: int, tau: float, need: Int, own: Int
) -> tuple[Int, Int, int, bool | np.bool_]:
    """The candidates in one row of the table: begin, end, where the row's valid entries end, whether it was too short.

    The window starts at the first similarity <= tau and has at most ``top_k`` entries. A window with fewer than
    ``need`` entries gives way to the row's last ``need`` ones. ``own`` does not count should a table contain it.
    """
    valid = _first_at_most(similarity, -np.inf)
    begin = 0 if tau == np.inf else _first_at_most(similarity[:valid], tau)
    end = begin + min(top_k, valid - begin)
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
) -> int:
    """Fill ``found`` from one row of the table; return how many were found, negative if the window was too short.

    The candidates are those of ``_window``, without ``own``.
    """
    begin, end, _, short = _window(neighbors, similarity, top_k, tau, need, own)
    taken = np.empty(_MOST + 1, np.int64)
    count = 0
    for k in range(begin, end):
        if neighbors[k] == own and count == 0:
            taken[0] = k - begin
            count = 1
    have = min(need, end - begin - count)
    for k in range(have):
        found[k] = neighbors[begin + _draw_skipping(words[8 + k], end - begin, taken, count + k)]
    return -1 - have if short else have


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
    allowed: I32,
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
    """Fill the plan's columns ``ref`` .. ``center`` from ``position`` and items; add to ``short`` int64 [2].

    ``ref`` holds the items: rows of refs or, where ``sentence_ref`` int32 [sentences] is not empty, of sentences. Refs
    that are 1 in ``empty`` uint8 [refs] have the bound ``tau_empty`` instead of ``tau``. For ``allowed`` see
    ``_random_photos``.
    """
    words = np.empty(16, np.uint64)
    found = np.empty(_MOST, np.int64)
    for row in range(position.size):
        for block in range(4):
            philox(seed, epoch, position[row], block, words[4 * block : 4 * block + 4])
        if sentence_ref.size:
            s = np.int64(ref[row])
            ref[row] = sentence_ref[s]
            r = ref[row]
        else:
            r = ref[row]
            s = sentence_begin[r] + _below(words[1], sentence_count[r])
        own = np.int64(ref_image[r])
        sentence[row] = s
        images[row, :] = -1
        center[row, :] = -1
        share = _share(words[2])
        if share >= p_mined + p_random:
            kind[row], grid[row], cell[row] = SINGLE, 1, 0
            images[row, 0] = own
            continue
        side = 2 if _share(words[3]) < p_two else 3
        need = side * side - 1
        bits = _allowed(cells2 if side == 2 else cells3, s, side)
        choices = 0
        for bit in range(9):
            choices += bits >> bit & 1
        where = _nth_bit(bits, _below(words[4], choices))
        have = 0
        if share < p_mined and mining:
            kind[row] = MINED
            bound = tau_empty if empty[r] else tau
            have = _mined_photos(words, neighbors[s], similarity[s], top_k, bound, found, need, own)
            if have < 0:
                have = -1 - have
                short[0] += 1
                short[1] += have < need
        else:
            kind[row] = RANDOM
        if have < need:
            _random_photos(words, photos, allowed, found, have, need, own)
        grid[row], cell[row] = side, where
        k = 0
        for c in range(side * side):
            if c == where:
                images[row, c] = own
            else:
                images[row, c] = found[k]
                k += 1
        if side == 2:
            center[row, 0] = size // 2 - shift + _below(words[5], 2 * shift + 1)
            center[row, 1] = size // 2 - shift + _below(words[6], 2 * shift + 1)
