"""Ranking: blocks of proposed similarities in, the exact ranking out; its kernels are in ``topk``."""

from collections.abc import Callable
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any

import numpy as np

from nemo_dali.kernels.arrays import F32, I32, I64
from nemo_dali.kernels.ranking import keys, topk
from nemo_dali.kernels.ranking.rules import Rules

ROUNDING = 2.0**-24  # float32's


def slack_of(left_length: float, right_length: float, width: int) -> np.float32:
    """How far two proposed similarities can be off together, at most: a bound for any order of summation.

    A float32 dot product summed in any order is off by at most D * u * |a| * |b| with u = 2**-24; two of them by twice
    that, and rounding the exact ones to float32 adds one u each. The floor keeps the kernel's division finite.

    Args:
        left_length, right_length: largest Euclidean lengths of the vectors.
        width: D.
    """
    return np.float32(max((2.02 * width + 4) * ROUNDING * left_length * right_length, 1e-30))


class Ranking:
    """The ranking of some rows, photos taken in block by block.

    Args:
        text: float32 [R, D], contiguous, of about unit length; D is a multiple of 32.
        image: float32 [M, D], likewise, all photos.
        own: int32 [R], the photo row that each sentence does not get.
        groups: int64 [G + 1], where the rows of each group begin, and R.
        depth: photos kept per row.
        pool: an executor whose ``threads`` threads share the groups.
    """

    def __init__(
        self, text: F32, image: F32, own: I32, groups: I64, *, depth: int, pool: Executor, threads: int
    ) -> None:
        rows = len(text)
        self._text, self._image, self._own, self._groups = text, image, own, groups
        self._pool, self._threads = pool, threads
        self._keys = np.empty((rows, depth), np.uint64)
        self._counts = np.zeros(rows, np.int64)
        self._own_rank = np.ones(rows, np.int32)
        self._own_keys = np.empty(rows, np.uint64)
        self._run(topk.own_keys, rows, text, image, own, self._own_keys)

    def _run(self, kernel: Callable[..., None], count: int, *arguments: Any) -> None:
        """Call a kernel for shares of ``count`` things at once."""
        cuts = np.linspace(0, count, self._threads + 1).astype(int)
        jobs = [self._pool.submit(kernel, begin, end, *arguments) for begin, end in pairwise(cuts) if begin < end]
        for job in jobs:
            job.result()

    def own_bests(self, crop: F32, count: int) -> F32:
        """float32 [R]: the similarity of each row to the best of its own photo's crops.

        Args:
            crop: float32 [M * count, D], those of all photos.
        """
        best = np.empty(len(self._text), np.float32)
        self._run(topk.own_bests, len(best), self._text, crop, self._own, count, best)
        return best

    def take(self, scores: F32, first: int, slack: np.float32, rules: Rules) -> None:
        """Take a block of photos in.

        Args:
            scores: float32 [R, P], proposed similarities to the photos from row ``first`` on.
            slack: see ``slack_of``.
            rules: ``Rules`` of these photos.
        """
        block = self._image[first : first + scores.shape[1]]
        common = self._text, block, self._own, rules, self._own_keys, self._keys, self._counts, self._own_rank
        self._run(topk.rank_groups, len(self._groups) - 1, self._groups, scores, first, slack, *common)

    def take_candidates(self, candidates: I64, rules: Rules) -> None:
        """Rank given photos only.

        Args:
            candidates: int64 [R, C], distinct photo rows, -1 where there is none.
            rules: ``Rules`` of all photos, without ``similar``, for which their embeddings are used.
        """
        common = self._text, self._image, self._own, rules, self._own_keys, self._keys, self._counts, self._own_rank
        self._run(topk.rank_candidates, len(self._groups) - 1, self._groups, candidates, *common)

    def result(self) -> tuple[I32, F32, I32]:
        """The ranking of all photos taken in, as ``rank_reference`` returns it."""
        neighbors = np.empty(self._keys.shape, np.int32)
        similarity = np.empty(self._keys.shape, np.float32)
        self._run(keys.unpack, len(neighbors), self._keys, self._counts, neighbors, similarity)
        return neighbors, similarity, self._own_rank
