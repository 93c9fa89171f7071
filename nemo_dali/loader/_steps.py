"""StepPlanner: plan rows and their cells, made for many steps at once and given out step by step."""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError
from nemo_dali.kernels.plan.rows import PLAN, PlanRows
from nemo_dali.loader._cells import CellLayout, Cells
from nemo_dali.plan.planner import Planner, ShortPools
from nemo_dali.plan.schedule import Schedule

THREAD = "nemo-dali plan"
MOST_ROWS = 4096  # of a chunk: by then the calls into compiled code cost less than the code


@dataclass(frozen=True, eq=False)
class PlannedStep:
    """What a step shows.

    Attributes:
        epoch, seen: which step it is: ``seen`` samples of the epoch come before it, over all ranks.
        rows: dtype ``plan.PLAN`` [B].
        short: how many of them had too few candidates.
        cells: of the rows.
    """

    epoch: int
    seen: int
    rows: PlanRows
    short: ShortPools
    cells: Cells


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive steps of an epoch: the rows and cells of them all, and where each step's rows begin and end."""

    epoch: int
    steps: dict[int, tuple[int, int]]  # by ``seen``
    rows: PlanRows
    short: npt.NDArray[np.uint8]
    cells: Cells


@dataclass(frozen=True, eq=False)
class ChunkAhead:
    """A chunk that another thread makes, and where it begins."""

    place: tuple[int, int]  # epoch and ``seen``
    future: Future[Chunk]


class StepPlanner:
    """Plans the steps of this rank.

    The plan is pure, so steps may be asked for out of order. One that is out of order is a chunk of its own, and does
    not wait for the rows of others. While a chunk's steps are taken, a thread makes the next chunk, twice as long:
    compiled code runs alongside Python. An error there is raised with the step that it belongs to.

    Args:
        check_files: raises if a mapped file was cut short, which must be known before it is read.
    """

    def __init__(
        self, planner: Planner, schedule: Schedule, layout: CellLayout, *, check_files: Callable[[], None]
    ) -> None:
        self._planner, self._schedule, self._layout, self._check_files = planner, schedule, layout, check_files
        self._chunk: Chunk | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: ChunkAhead | None = None

    def plan(self, epoch: int, seen: int) -> PlannedStep:
        """The step after ``seen`` samples of an epoch.

        Raises:
            FileFormatError: a table is damaged, or was cut short.
        """
        chunk = self._chunk
        if chunk is None or chunk.epoch != epoch or seen not in chunk.steps:
            self._chunk = chunk = self._take(epoch, seen)
            self._make_ahead(*self._schedule.behind(epoch, max(chunk.steps)), most=2 * len(chunk.steps))
        begin, end = chunk.steps[seen]
        short = ShortPools.of(chunk.short[begin:end])
        rows = chunk.rows[begin:end].view(np.uint8).copy().view(PLAN)  # as bytes: NumPy copies records field by field
        return PlannedStep(epoch, seen, rows, short, chunk.cells.of(begin, end))

    def with_rows(self, step: PlannedStep, rows: PlanRows) -> PlannedStep:
        """A step with other rows."""
        return PlannedStep(step.epoch, step.seen, rows, step.short, self._layout.lay_out(rows))

    def close(self, *, wait: bool = True) -> None:
        """End the thread; the next step may start another one.

        Args:
            wait: return once it has ended. A finalizer must not wait: Python may run one wherever it allocates, even
                under a lock of ``threading`` that the joined thread needs, or that ``join`` itself takes.
        """
        thread, self._thread, self._ahead = self._thread, None, None
        if thread is not None:
            thread.shutdown(wait=wait, cancel_futures=True)

    def _take(self, epoch: int, seen: int) -> Chunk:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.place == (epoch, seen):
            with suppress(NemoError, CancelledError):  # possibly of a later step: those before it can be made
                return ahead.future.result()
        elif ahead is not None:
            ahead.future.cancel()
        return self._make(epoch, seen, most=1)

    def _make_ahead(self, epoch: int, seen: int, *, most: int) -> None:
        try:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix=THREAD)
            self._ahead = ChunkAhead((epoch, seen), self._thread.submit(self._make, epoch, seen, most=most))
        except RuntimeError:  # the system starts no more threads: this one makes the chunk when it is asked for
            self._thread = None

    def _make(self, epoch: int, seen: int, *, most: int) -> Chunk:
        """The chunk that begins with a step and has at most ``most`` steps, and no more than are left."""
        self._check_files()
        schedule = self._schedule
        count = max(1, min(most, MOST_ROWS // schedule.batch_size, schedule.steps_after(seen)))
        starts = [seen + step * schedule.global_batch for step in range(count)]
        positions = [schedule.positions(start) for start in starts]
        ends = np.cumsum([len(some) for some in positions]).tolist()
        rows, short = self._planner.draw(epoch, np.concatenate(positions))
        steps = dict(zip(starts, zip([0, *ends], ends, strict=False), strict=True))
        return Chunk(epoch, steps, rows, short, self._layout.lay_out(rows))
