"""The plan: which ref, sentence, mosaic and photos every sample of every epoch is made of.

A row is a pure function of (data set, table, policy, seed, epoch, position). Position p of an epoch owns 16 random
words: those that ``numpy.random.Philox(key=[seed, epoch], counter=[0, p, 0, 0]).random_raw(16)`` returns. They mean:

    word    use
    0       key of *item* p in the epoch's permutation: refs are put in the order of their keys
    1       sentence of the ref
    2       kind: single, random or mined
    3       grid of a mosaic
    4       cell of the target among those allowed
    5, 6    x and y of the crossing of a jittered 2x2
    7       not used
    8..15   the negatives, in the order of the free cells

A number below n is the high word of ``word * n``; a share is the upper 53 bits of a word. Distinct draws are made by
skipping what was drawn before, never by drawing again, so the number of words used does not depend on their values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.kernels.draws import fill_rows, shuffle_keys
from nemo_dali.policy import MosaicPolicy

SINGLE, RANDOM, MINED = 0, 1, 2
KINDS = ("single", "random", "mined")

PLAN = np.dtype(
    [
        ("position", "i8"),  # place in the epoch; at or beyond the epoch's length it pads the last step
        ("ref", "i4"),  # row in the data set's /refs; with several data sets, counted through them all
        ("sentence", "i4"),  # row in /sentences, likewise
        ("kind", "u1"),  # SINGLE, RANDOM or MINED; a mined one that the warm-up turned random has RANDOM
        ("grid", "u1"),  # 1, 2 or 3 cells a side
        ("cell", "u1"),  # the target's, row-major
        ("images", "i4", (9,)),  # row in /images per cell, likewise; -1 beyond grid * grid
        ("center", "i4", (2,)),  # x, y of the crossing in pixels for 2x2; -1 otherwise
    ]
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """What the plan must know of one data set.

    Attributes:
        ref_image: int32 [refs], photo row of each ref.
        sentence_begin: int64 [refs], first sentence row of each ref.
        sentence_count: int32 [refs], at least 1.
        photos: number of photos.
        neighbors: int32 [sentences, N], photo rows by descending similarity, -1 where there is none; None: no table.
        similarity: float32 or float16 [sentences, N], -inf where there is none.
        cells: for grids 2 and 3, uint16 [sentences] with bit c set where the target may lie in cell c; empty: anywhere.
    """

    ref_image: npt.NDArray[np.int32]
    sentence_begin: npt.NDArray[np.int64]
    sentence_count: npt.NDArray[np.int32]
    photos: int
    neighbors: npt.NDArray[np.int32] | None = None
    similarity: npt.NDArray[Any] | None = None
    cells: Mapping[int, npt.NDArray[np.uint16]] = field(default_factory=dict)


@dataclass(frozen=True)
class ShortPools:
    """Mined samples whose window held fewer candidates than cells to fill.

    Attributes:
        last_valid: filled with the last candidates of the table's row, beyond the window.
        random: those among them whose row was too short even so and that got random photos besides.
    """

    last_valid: int
    random: int


class Planner:
    """Makes plan rows for one or several data sets.

    Args:
        parts: the data sets, in the order in which their rows are counted.
        policy: the mosaic policy.
        seed: integer in [0, 2**64).
        size: frame height and width in pixels.

    Raises:
        NemoError: a data set has too few photos for the policy's mosaics, or no table where the policy mines.
    """

    def __init__(self, parts: Sequence[Part], policy: MosaicPolicy, *, seed: int, size: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed ({seed}) must be in [0, 2**64)")
        for part in parts:
            if part.photos <= policy.most_negatives:
                raise NemoError(
                    f"A {policy.largest_grid}x{policy.largest_grid} mosaic needs {policy.most_negatives + 1} photos, "
                    f"but a data set has {part.photos}. Use more photos or a smaller grid, or p_mined=0 and p_random=0."
                )
            if policy.p_mined > 0 and part.neighbors is None:
                raise NemoError(
                    "The policy draws mined negatives, but a data set has no negative table. Make one with 'nemo-dali "
                    "mine' and give it as negatives=..., or use p_mined=0."
                )
        self.policy = policy
        self.seed = seed
        self.size = size
        self.length = sum(len(part.ref_image) for part in parts)  # samples of an epoch
        self._parts = tuple(parts)
        self._ref_offset = np.cumsum([0, *(len(part.ref_image) for part in parts)])
        self._sentence_offset = np.cumsum([0, *(int(part.sentence_count.sum()) for part in parts)])
        self._image_offset = np.cumsum([0, *(part.photos for part in parts)])
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [length]: the ref at each position of the epoch, one permutation for all ranks."""
        if not 0 <= epoch < 2**63:
            raise ValueError(f"epoch ({epoch}) must be in [0, 2**63)")
        known, order = self._order
        if known != epoch:
            keys = np.empty(self.length, np.uint64)
            shuffle_keys(np.uint64(self.seed), np.uint64(epoch), keys)
            order = np.argsort(keys, kind="stable")
            self._order = (epoch, order)
        return order

    def plan(self, epoch: int, positions: npt.ArrayLike) -> npt.NDArray[Any]:
        """Plan rows, dtype ``PLAN`` [n], for positions of an epoch, int [n] or one int.

        A position at or beyond the epoch's length shows the ref of ``position % length``, with draws of its own.
        """
        return self.plan_and_count(epoch, positions)[0]

    def plan_and_count(self, epoch: int, positions: npt.ArrayLike) -> tuple[npt.NDArray[Any], ShortPools]:
        """``plan``, and how many of the rows met a pool that was too small."""
        positions = np.atleast_1d(np.asarray(positions, np.int64))
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions ({positions.min()}) must be >= 0")
        order = self.order(epoch)
        rows = np.zeros(len(positions), PLAN)
        rows["position"] = positions
        rows["ref"] = order[positions % self.length]
        short = np.zeros(2, np.int64)
        owner = np.searchsorted(self._ref_offset, rows["ref"], side="right") - 1
        for index, part in enumerate(self._parts):
            chosen = np.flatnonzero(owner == index)
            if chosen.size:
                some = rows[chosen]
                self._fill(index, part, epoch, some, short)
                rows[chosen] = some
        return rows, ShortPools(*short.tolist())

    def _fill(self, index: int, part: Part, epoch: int, rows: npt.NDArray[Any], short: npt.NDArray[np.int64]) -> None:
        """Fill everything but position and ref of rows that belong to one data set."""
        policy = self.policy
        neighbors, similarity = part.neighbors, part.similarity
        if neighbors is None or similarity is None:
            neighbors, similarity = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
        if similarity.dtype == np.float16:
            similarity = similarity.view(np.uint16)  # the kernel widens it: Numba has no half on the CPU
        anywhere = np.empty(0, np.uint16)
        two, three = (policy.grids.get(grid, 0.0) for grid in (2, 3))
        rows["ref"] -= self._ref_offset[index]
        fill_rows(
            np.uint64(self.seed),
            np.uint64(epoch),
            part.ref_image,
            part.sentence_begin,
            part.sentence_count,
            part.photos,
            neighbors,
            similarity,
            part.cells.get(2, anywhere),
            part.cells.get(3, anywhere),
            policy.p_mined,
            policy.p_random,
            epoch >= policy.mine_after_epoch,
            policy.top_k,
            np.inf if policy.max_similarity is None else policy.max_similarity,
            two / (two + three),
            int(policy.jitter * self.size),
            self.size,
            *(rows[name] for name in ("position", "ref", "sentence", "kind", "grid", "cell", "images", "center")),
            short,
        )
        if ((rows["images"] >= 0).sum(1) != rows["grid"].astype(int) ** 2).any() or rows["images"].max() >= part.photos:
            raise FileFormatError("A negative table is damaged: it names photos that do not exist. Mine it again.")
        rows["ref"] += self._ref_offset[index]
        rows["sentence"] += self._sentence_offset[index]
        rows["images"] += np.where(rows["images"] >= 0, self._image_offset[index], 0).astype(np.int32)
