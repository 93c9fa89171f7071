"""Planner: plan rows from (data set, table, policy, seed, epoch, position). ``nemo_dali.plan`` has the rules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import integer
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.kernels.plan.draws import ALONE, BEYOND, RANDOM_TOO, Chances, fill_rows, shuffle_keys
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
        random: those among them whose row was too short even so, and that got random photos too.
        single: mosaics of any kind that the exclusions left too few photos for; they show the target's photo alone.
    """

    last_valid: int = 0
    random: int = 0
    single: int = 0

    @classmethod
    def of(cls, short: npt.NDArray[np.uint8]) -> "ShortPools":
        """Count the shortfalls of rows, uint8 [n] from ``Planner.draw``."""
        if not short.any():
            return cls()
        return cls(*(int(np.count_nonzero(short & bit)) for bit in (BEYOND, RANDOM_TOO, ALONE)))

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
            if policy.mines and part.neighbors is None:
                raise NemoError(
                    "The policy draws mined negatives, but a data set has no negative table. Make one with 'nemo-dali "
                    "mine' and give it as negatives=..., or use p_mined=0."
                )
        self.policy = policy
        self._shuffle = shuffle
        self.seed = seed
        self.size = size
        self.length = sum(part.length for part in parts)  # samples of an epoch
        self._parts = tuple(parts)
        self._columns = [part.columns() for part in parts]
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
        return self.draw(epoch, positions)[0]

    def draw(self, epoch: int, positions: npt.ArrayLike) -> tuple[PlanRows, npt.NDArray[np.uint8]]:
        """``plan``, and how each row fell short of candidates, uint8 [n], which ``ShortPools.of`` counts."""
        positions = _as_positions(positions)
        return self._draw(epoch, positions, self.order(epoch)[positions % self.length])

    def substitute(self, epoch: int, rows: PlanRows, bad: npt.NDArray[np.bool_]) -> tuple[PlanRows, Replaced]:
        """Plan rows without bad photos, by the rules in ``nemo_dali.plan``.

        Args:
            epoch: that of the rows.
            rows: what ``plan`` gave, dtype ``PLAN`` [n]; they are not changed.
            bad: bool [photos], across all data sets.

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
            rows[gone] = self._draw(epoch, position, items)[0]
        else:
            raise NemoError(f"None of the {self.length} samples has a photo that can be read. {RESTORE}")
        negatives = 0
        for index, chosen in _of_each_part(rows, self._ref_offset):
            some = rows[chosen]
            negatives += self._replace_negatives(index, epoch, some, bad)
            rows[chosen] = some
        return rows, Replaced(int(replaced.sum()), negatives)

    def _draw(
        self, epoch: int, positions: npt.NDArray[np.int64], items: npt.NDArray[np.int64]
    ) -> tuple[PlanRows, npt.NDArray[np.uint8]]:
        """Rows that show given items at given positions, and how each fell short of candidates."""
        rows, short = np.zeros(len(positions), PLAN), np.zeros(len(positions), np.uint8)
        rows["position"] = positions
        rows["ref"] = items
        for index, chosen in _of_each_part(rows, self._item_offset):
            some = rows[chosen]
            short[chosen] = self._fill(index, epoch, some)
            rows[chosen] = some
        return rows, short

    def _chances(self, epoch: int) -> Chances:
        policy, now = self.policy, self.policy.difficulty(epoch)
        tau = np.inf if now.max_similarity is None else float(now.max_similarity)
        other = now.max_similarity_no_target
        two, three = (float(policy.grids.get(grid, 0)) for grid in (2, 3))
        return Chances(
            p_mined=float(now.p_mined),
            p_random=float(now.p_random),
            top_k=int(now.top_k),
            tau=tau,
            tau_empty=tau if other is None else float(other),
            p_two=two / (two + three),
            shift=int(policy.jitter * self.size),
            size=self.size,
        )

    def _fill(self, index: int, epoch: int, rows: PlanRows) -> npt.NDArray[np.uint8]:
        """Fill everything but the position of rows that belong to one data set; ``ref`` holds items."""
        part, short = self._parts[index], np.empty(len(rows), np.uint8)
        rows["ref"] -= self._item_offset[index]
        seed, columns, exclusions = np.uint64(self.seed), self._columns[index], self._exclusions[index]
        fill_rows(seed, np.uint64(epoch), columns, exclusions, self._chances(epoch), rows, short)
        # Candidates are checked only now: before, it is not known which sentences are shown.
        if part.check_rows is not None and (mined := rows["kind"] == MINED).any():
            part.check_rows(rows["sentence"][mined], part.ref_image[rows["ref"][mined]])
        if ((rows["images"] >= 0).sum(1) != rows["grid"].astype(int) ** 2).any() or rows["images"].max() >= part.photos:
            raise FileFormatError("A negative table is damaged: it names photos that do not exist. Mine it again.")
        self._count_from(index, rows, 1)
        return short

    def _count_from(self, index: int, rows: PlanRows, sign: int) -> None:
        """Make rows of one data set count across all of them (1), or within that one (-1), in place."""
        rows["ref"] += sign * self._ref_offset[index]
        rows["sentence"] += sign * self._sentence_offset[index]
        rows["images"] += np.where(rows["images"] >= 0, sign * self._image_offset[index], 0).astype(np.int32)

    def _replace_negatives(self, index: int, epoch: int, rows: PlanRows, bad: npt.NDArray[np.bool_]) -> int:
        """Replace bad negatives in rows that belong to one data set, in place; returns how many there were."""
        part, first = self._parts[index], self._image_offset[index]
        here = bad[first : first + part.photos]
        self._count_from(index, rows, -1)
        replaced: int = replace_photos(
            np.uint64(self.seed),
            np.uint64(epoch),
            self._columns[index],
            self._exclusions[index],
            self._chances(epoch),
            here,
            here if part.excluded is None else here | part.excluded,
            _visible(rows, self.size),
            rows,
        )
        if replaced < 0:
            raise NemoError(f"Too few of a data set's {part.photos} photos can be read to fill a mosaic. {RESTORE}")
        self._count_from(index, rows, 1)
        return replaced


def _as_positions(given: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Positions of an epoch, one or several, as int64 [n].

    Raises:
        ValueError: they are not.
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
    """Each data set that rows belong to, and which rows those are; ``ref`` counts from ``offset``."""
    owner = np.searchsorted(offset, rows["ref"], side="right") - 1
    for index in range(len(offset) - 1):
        if (chosen := np.flatnonzero(owner == index)).size:
            yield index, chosen


def _visible(rows: PlanRows, size: int) -> npt.NDArray[np.bool_]:
    """bool [n, 9]: whether a cell has pixels."""
    grid, cell = rows["grid"].astype(np.int64)[:, None], np.arange(9)
    seen = cell < grid**2
    for line, axis in ((cell % grid, 0), (cell // grid, 1)):
        center = rows["center"][:, axis, None].astype(np.int64)
        seen &= cell_edges(grid, line, center, size) < cell_edges(grid, line + 1, center, size)
    return seen
