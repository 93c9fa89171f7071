"""Planner: plan rows, of (data set, table, policy, seed, epoch, position). ``nemo_dali.plan`` has the rules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import integer
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.kernels.plan.draws import fill_rows, shuffle_keys
from nemo_dali.kernels.plan.rows import MINED, PLAN, PlanRows
from nemo_dali.kernels.plan.substitution import replace_photos
from nemo_dali.kernels.tile import cell_edges
from nemo_dali.plan.part import Part
from nemo_dali.plan.policy import MosaicPolicy

LAST_POSITION = 2**63 - 1
RESTORE = "Restore the photos, or say where they are with images=..."


@dataclass(frozen=True)
class ShortPools:
    """Mined samples whose window held fewer candidates than cells to fill.

    Attributes:
        last_valid: filled with the last candidates of the table's row, beyond the window.
        random: those among them whose row was too short even so and that got random photos besides.
        single: mosaics of any kind that the exclusions left too few photos for, and that show the target's photo alone.
    """

    last_valid: int = 0
    random: int = 0
    single: int = 0

    def __add__(self, other: "ShortPools") -> "ShortPools":
        return ShortPools(self.last_valid + other.last_valid, self.random + other.random, self.single + other.single)

    def __str__(self) -> str:
        said = []
        if self.last_valid:
            said.append(
                f"{self.last_valid} mined samples had fewer candidates than cells and got the table's last ones, "
                f"{self.random} of them random photos too. Raise max_similarity or top_k, mine deeper, or use more "
                "photos."
            )
        if self.single:
            said.append(
                f"{self.single} mosaics were left out, and their target's photo shown alone, because the negative "
                "table's exclusions leave too few photos. Mine with fewer exclusions, or use more photos."
            )
        return " ".join(said)


@dataclass(frozen=True)
class Replaced:
    """What a substitution changed.

    Attributes:
        targets: rows that show another ref.
        negatives: cells that show another negative.
    """

    targets: int = 0
    negatives: int = 0

    def __add__(self, other: "Replaced") -> "Replaced":
        return Replaced(self.targets + other.targets, self.negatives + other.negatives)


class Planner:
    """Makes plan rows for one or several data sets.

    Args:
        parts: the data sets, in the order in which their rows are counted.
        policy: the mosaic policy.
        seed: integer in [0, 2**64).
        size: frame height and width in pixels.
        shuffle: draw an order for each epoch; else samples come in the order of the files.

    Raises:
        NemoError: a data set has too few photos for the policy's mosaics, or no table where the policy mines.
    """

    def __init__(
        self, parts: Sequence[Part], policy: MosaicPolicy, *, seed: int, size: int, shuffle: bool = True
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed ({seed}) must be in [0, 2**64)")
        for part in parts:
            part.check_photos(policy)
            if policy.p_mined > 0 and part.neighbors is None:
                raise NemoError(
                    "The policy draws mined negatives, but a data set has no negative table. Make one with 'nemo-dali "
                    "mine' and give it as negatives=..., or use p_mined=0."
                )
        self.policy = policy
        self._tau = np.inf if policy.max_similarity is None else policy.max_similarity
        other = policy.max_similarity_no_target
        self._tau_empty = self._tau if other is None else other
        self._shuffle = shuffle
        self.seed = seed
        self.size = size
        self.length = sum(part.length for part in parts)  # samples of an epoch
        self._parts = tuple(parts)
        self._exclusions = [part.exclusions() for part in parts]
        self.grids = policy.shown_grids | ({1} if any(part.excludes_by_ref for part in parts) else set())  # of its rows
        self._item_offset = np.cumsum([0, *(part.length for part in parts)])
        self._ref_offset = np.cumsum([0, *(len(part.ref_image) for part in parts)])
        self._sentence_offset = np.cumsum([0, *(part.sentences for part in parts)])
        self._image_offset = np.cumsum([0, *(part.photos for part in parts)])
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [length]: the item (ref, or sentence) at each position of the epoch, one permutation for all ranks."""
        epoch = integer("epoch", epoch, least=0, most=2**63 - 1)
        known, order = self._order
        if known != epoch and not self._shuffle:
            order = np.arange(self.length)
            self._order = (epoch, order)
        elif known != epoch:
            keys = np.empty(self.length, np.uint64)
            shuffle_keys(np.uint64(self.seed), np.uint64(epoch), keys)
            order = np.argsort(keys, kind="stable")
            self._order = (epoch, order)
        return order

    def plan(self, epoch: int, positions: npt.ArrayLike) -> PlanRows:
        """Plan rows, dtype ``PLAN`` [n], for positions of an epoch, int [n] or one int.

        A position at or beyond the epoch's length shows the item of ``position % length``, with draws of its own.
        """
        return self.plan_and_count(epoch, positions)[0]

    def plan_and_count(self, epoch: int, positions: npt.ArrayLike) -> tuple[PlanRows, ShortPools]:
        """``plan``, and how many of the rows met a pool that was too small."""
        positions = _as_positions(positions)
        short = np.zeros(3, np.int64)
        rows = self._make(epoch, positions, self.order(epoch)[positions % self.length], short)
        return rows, ShortPools(*short.tolist())

    def substitute(self, epoch: int, rows: PlanRows, bad: npt.NDArray[np.bool_]) -> tuple[PlanRows, Replaced]:
        """Plan rows without bad photos, by the rules in ``nemo_dali.plan``.

        Args:
            epoch: that of the rows.
            rows: what ``plan`` gave, dtype ``PLAN`` [n]; they are not changed.
            bad: bool [photos], through all data sets.

        Raises:
            NemoError: there are not enough photos left.
        """
        rows = rows.copy()
        order = self.order(epoch)
        replaced = np.zeros(len(rows), bool)
        for further in range(1, self.length + 1):
            target = np.arange(len(rows)), rows["cell"].astype(np.int64)
            gone = np.flatnonzero(_visible(rows, self.size)[target] & bad[rows["images"][target]])
            if not gone.size:
                break
            replaced[gone] = True
            position = rows["position"][gone]
            items = order[(position + further) % self.length]
            rows[gone] = self._make(epoch, position, items, np.zeros(3, np.int64))
        else:
            raise NemoError(f"None of the {self.length} samples has a photo that can be read. {RESTORE}")
        negatives = 0
        for index, chosen in _of_each_part(rows, self._ref_offset):
            some = rows[chosen]
            negatives += self._replace_negatives(index, epoch, some, bad)
            rows[chosen] = some
        return rows, Replaced(int(replaced.sum()), negatives)

    def _make(
        self, epoch: int, positions: npt.NDArray[np.int64], items: npt.NDArray[np.int64], short: npt.NDArray[np.int64]
    ) -> PlanRows:
        """Rows that show certain items at certain positions; adds to ``short``, the fields of ``ShortPools``."""
        rows = np.zeros(len(positions), PLAN)
        rows["position"] = positions
        rows["ref"] = items
        for index, chosen in _of_each_part(rows, self._item_offset):
            some = rows[chosen]
            self._fill(index, epoch, some, short)
            rows[chosen] = some
        return rows

    def _fill(self, index: int, epoch: int, rows: PlanRows, short: npt.NDArray[np.int64]) -> None:
        """Fill everything but the position of rows that belong to one data set; ``ref`` holds items."""
        policy, part = self.policy, self._parts[index]
        neighbors, similarity = _table(part)
        anywhere = np.empty(0, np.uint16)
        two, three = (policy.grids.get(grid, 0.0) for grid in (2, 3))
        rows["ref"] -= self._item_offset[index]
        fill_rows(
            np.uint64(self.seed),
            np.uint64(epoch),
            part.ref_image,
            part.empty,
            part.sentence_begin,
            part.sentence_count,
            np.empty(0, np.int32) if part.sentence_ref is None else part.sentence_ref,
            part.photos,
            self._exclusions[index],
            neighbors,
            similarity,
            part.cells.get(2, anywhere),
            part.cells.get(3, anywhere),
            policy.p_mined,
            policy.p_random,
            epoch >= policy.mine_after_epoch,
            policy.top_k,
            self._tau,
            self._tau_empty,
            two / (two + three),
            int(policy.jitter * self.size),
            self.size,
            rows["position"],
            rows["ref"],
            rows["sentence"],
            rows["kind"],
            rows["grid"],
            rows["cell"],
            rows["images"],
            rows["center"],
            short,
        )
        # What was drawn from is looked at now: before, it is not known which sentences are shown.
        if part.check_rows is not None and (mined := rows["kind"] == MINED).any():
            part.check_rows(rows["sentence"][mined], part.ref_image[rows["ref"][mined]])
        if ((rows["images"] >= 0).sum(1) != rows["grid"].astype(int) ** 2).any() or rows["images"].max() >= part.photos:
            raise FileFormatError("A negative table is damaged: it names photos that do not exist. Mine it again.")
        rows["ref"] += self._ref_offset[index]
        rows["sentence"] += self._sentence_offset[index]
        rows["images"] += np.where(rows["images"] >= 0, self._image_offset[index], 0).astype(np.int32)

    def _replace_negatives(self, index: int, epoch: int, rows: PlanRows, bad: npt.NDArray[np.bool_]) -> int:
        """Replace them in rows that belong to one data set, in place; how many there were."""
        part, first = self._parts[index], self._image_offset[index]
        rows["images"] -= np.where(rows["images"] >= 0, first, 0).astype(np.int32)
        replaced: int = replace_photos(
            np.uint64(self.seed),
            np.uint64(epoch),
            *_table(part),
            self.policy.top_k,
            self._tau,
            self._tau_empty,
            part.empty,
            self._exclusions[index],
            here := bad[first : first + part.photos],
            here if part.excluded is None else here | part.excluded,
            _visible(rows, self.size),
            rows["position"],
            rows["ref"] - self._ref_offset[index],
            rows["sentence"] - self._sentence_offset[index],
            *(rows[name] for name in ("kind", "grid", "cell", "images", "center")),
        )
        if replaced < 0:
            raise NemoError(f"Too few of a data set's {part.photos} photos can be read to fill a mosaic. {RESTORE}")
        rows["images"] += np.where(rows["images"] >= 0, first, 0).astype(np.int32)
        return replaced


def _as_positions(given: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Positions of an epoch, one or several, as int64 [n].

    Raises:
        ValueError: they are no such integers.
    """
    try:
        positions = np.atleast_1d(np.asarray(given))
    except (TypeError, ValueError):  # rows of different lengths, say
        positions = np.empty((0, 0))
    if positions.ndim != 1:
        raise ValueError(f"positions (a {type(given).__name__}) must be one integer, or integers in one dimension")
    if positions.size and positions.dtype.kind in "iu":
        for extreme in (positions.min(), positions.max()):
            integer("positions", extreme, least=0, most=LAST_POSITION)
    else:
        for value in positions.tolist():
            if isinstance(value, bool):
                raise ValueError(f"positions ({value}) must be an integer")
            integer("positions", value, least=0, most=LAST_POSITION)
    return positions.astype(np.int64)


def _of_each_part(rows: PlanRows, offset: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """The data sets that rows are of, and which rows those are; ``ref`` counts from ``offset``."""
    owner = np.searchsorted(offset, rows["ref"], side="right") - 1
    for index in range(len(offset) - 1):
        if (chosen := np.flatnonzero(owner == index)).size:
            yield index, chosen


def _table(part: Part) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Neighbors and similarities as the kernels take them."""
    neighbors, similarity = part.neighbors, part.similarity
    if neighbors is None or similarity is None:
        return np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
    if similarity.dtype == np.float16:
        similarity = similarity.view(np.uint16)  # the kernels widen it: Numba has no half on the CPU
    return neighbors, similarity


def _visible(rows: PlanRows, size: int) -> npt.NDArray[np.bool_]:
    """bool [n, 9]: whether a cell has pixels."""
    grid, cell = rows["grid"].astype(np.int64)[:, None], np.arange(9)
    seen = cell < grid**2
    for line, axis in ((cell % grid, 0), (cell // grid, 1)):
        center = rows["center"][:, axis, None].astype(np.int64)
        seen &= cell_edges(grid, line, center, size) < cell_edges(grid, line + 1, center, size)
    return seen
