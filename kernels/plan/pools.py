"""The pools of many sentences, as ``draws.window`` finds one: windows of the rows of a negative table."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.arrays import I64, Int
from nemo_dali.kernels.jit import jit, python_of
from nemo_dali.kernels.plan.draws import Similarity, first_at_most, pool_end

Similarities = npt.NDArray[np.floating[Any]]  # [n, N], descending along each row, -inf behind the last photo

pool_ends = cast(Callable[[I64, I64, Int], I64], python_of(pool_end))  # the same for arrays


def pools(similarity: Similarities, tau: float, top_k: int) -> tuple[I64, I64]:
    """Half-open windows, ``(begin int64 [n], end int64 [n])``: from the first similarity <= tau, ``top_k`` at most."""
    begin = pool_begins(similarity, tau)
    return begin, pool_ends(begin, valid_ends(similarity), top_k)


def pool_begins(similarity: Similarities, tau: float) -> I64:
    """Per row the first column whose similarity is at most tau, or the number of columns; int64 [n]."""
    half = similarity.dtype == np.float16  # which Numba does not have on the CPU
    stored: Any = similarity.view(np.uint16) if half else similarity.view()
    stored.flags.writeable = False  # as a mapped table's: Numba would compile for each kind
    begin = np.empty(len(stored), np.int64)
    _fill_begins(stored, float(tau), begin)  # in the table's own type 0.3 would become 0.30000001, or more
    return begin


def valid_ends(similarity: Similarities) -> I64:
    """Per row where its valid entries end; int64 [n]."""
    return pool_begins(similarity, -np.inf)


@jit(error_model="python")
def _fill_begins(similarity: Similarity, bound: float, begin: I64) -> None:
    for row in range(begin.size):
        begin[row] = first_at_most(similarity[row], bound)
