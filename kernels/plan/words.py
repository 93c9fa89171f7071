"""Counter-based random words and what is drawn with one of them; for the CPU.

``philox`` is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with NumPy's
convention that the counter is raised before a block is made. What each word means is listed in ``nemo_dali.plan``.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from nemo_dali.kernels.arrays import I64, U64, Int
from nemo_dali.kernels.jit import intrinsic, jit

_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)  # multipliers of Philox4x64
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)  # key increments (Weyl)


@intrinsic
def multiply_high(typingctx: Any, a: Any, b: Any) -> Any:
    """Upper 64 bits of the product of two uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(arg, wide) for arg in args))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), codegen


@jit(error_model="python")
def philox(key0: np.uint64, key1: np.uint64, position: Int, block: Int, words: U64, use: int = 0) -> None:
    """Write words 4 * block .. 4 * block + 3 of ``Philox(key=[key0, key1], counter=[0, position, use, 0])``.

    ``use``: 0 the plan, 1 masked words, 2 black squares (``plan.erasing``).
    """
    c0, c1, c2, c3 = np.uint64(block + 1), np.uint64(position), np.uint64(use), np.uint64(0)
    for _ in range(10):
        high0, low0 = multiply_high(_M0, c0), _M0 * c0
        high1, low1 = multiply_high(_M1, c2), _M1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += _W0
        key1 += _W1
    words[0], words[1], words[2], words[3] = c0, c1, c2, c3


@jit(error_model="python")
def below(word: np.uint64, n: Int) -> np.int64:
    """A number in [0, n), uniform."""
    return np.int64(multiply_high(word, np.uint64(n)))


@jit(error_model="python")
def share(word: np.uint64) -> np.float64:
    """A number in [0, 1), uniform."""
    return np.float64(word >> np.uint64(11)) * 2.0**-53


@jit(error_model="python")
def draw_skipping(word: np.uint64, n: Int, taken: I64, count: int) -> np.int64:
    """A number in [0, n) that is none of ``taken[:count]`` (ascending), uniform; it is inserted into ``taken``."""
    value = below(word, n - count)
    place = 0
    while place < count and taken[place] <= value:
        value += 1
        place += 1
    for k in range(count, place, -1):
        taken[k] = taken[k - 1]
    taken[place] = value
    return value
