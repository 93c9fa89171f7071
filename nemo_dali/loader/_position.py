"""Position: where the passes over a loader's epochs stand, and which of them may take a step."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemo_dali.errors import NemoError
from nemo_dali.plan.schedule import Schedule

logger = logging.getLogger("nemo_dali")

ONE_THREAD = "Make one Loader per thread, or let one thread iterate and hand its batches to the others in a queue."
JOIN = "Let that thread finish before close() is called."
_RESTARTED = (
    "Epoch %d is restarted for the second time: passes that stop early show its first samples each time. Call "
    "set_epoch before each pass, or keep one iterator of a Loader with infinite=True and take the steps from it."
)
PATIENCE_S = 60.0  # for a thread to finish the last step of an abandoned pass


class Turns:
    """Keeps passes, which share a pipeline and a position, from getting in each other's way.

    A pass may move from thread to thread, and a thread may continue several passes in turn: each step starts the
    pipeline where its pass stands. Threads with a pass each would throw it back and forth, and what an epoch shows
    would depend on which of them was faster.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a thread that was interrupted at a bad moment can itself still continue
        self._newest = 0  # number of the pass that was begun last
        self._thread = 0  # the thread that began it, or took its last step

    def take(self, patience: float, remedy: str = ONE_THREAD) -> None:
        """Keep other threads out until ``give``.

        Args:
            patience: seconds to wait for the thread that is inside.
            remedy: for the message.

        Raises:
            NemoError: it is still inside then.
        """
        if not self._lock.acquire(timeout=patience):
            raise NemoError(f"Another thread is waiting for a batch of this Loader. {remedy}")

    def give(self) -> None:
        """Let other threads in again."""
        self._lock.release()

    @contextmanager
    def between(self, remedy: str = ONE_THREAD) -> Iterator[None]:
        """Between two steps: waits for a step that another thread is taking.

        Raises:
            NemoError: that step does not finish in time.
        """
        self.take(PATIENCE_S, remedy)
        try:
            yield
        finally:
            self.give()

    def begin(self, number: int) -> None:
        """Make the pass of this number the newest."""
        self._newest, self._thread = number, threading.get_ident()

    def check(self, number: int) -> None:
        """Let the pass of this number take a step.

        Raises:
            NemoError: it is not the newest, which is another thread's.
        """
        if number == self._newest:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            raise NemoError(f"Another thread has begun a newer pass over this Loader than this one. {ONE_THREAD}")


class Pass(Iterator[Any]):
    """A pass as its user sees it: its batches, one thread at a time.

    Raises:
        NemoError: another thread is waiting for a batch of the same Loader, of this pass or of another.
    """

    def __init__(self, turns: Turns, batches: Iterator[Any]) -> None:
        self._turns, self._batches = turns, batches

    def __next__(self) -> Any:
        self._turns.take(0)
        try:
            return next(self._batches)
        finally:
            self._turns.give()


@dataclass
class Position:
    """Where the newest pass over an epoch stands.

    Attributes:
        epoch: the one that the current or the next pass shows.
        seen: samples of it that were delivered, over all ranks.
        resumed: the next pass starts after ``seen``, not at the epoch's beginning.
        confirmed: ``set_epoch`` has named the loaded epoch: it is shown even if nothing of it is left.
        passes: how often the position was moved; only the newest pass moves it on.
        waiting: the pass that was begun last, by its number, until it has taken its first step; then 0.
        overtaken: the one that was waiting when a state was loaded: it shows what the state says.
        restarts: passes over this epoch that were abandoned and begun again since it was chosen.
        warned: whether a warning has reported them.
        turns: which pass may take a step.
    """

    epoch: int = 0
    seen: int = 0
    resumed: bool = False
    confirmed: bool = False
    passes: int = 0
    waiting: int = 0
    overtaken: int = -1
    restarts: int = 0
    warned: bool = False
    turns: Turns = field(default_factory=Turns)

    def move(self, epoch: int, seen: int, *, resumed: bool = False) -> None:
        """Set the position; passes that are under way no longer move it."""
        self.epoch, self.seen, self.resumed, self.confirmed = epoch, seen, resumed, False
        self.passes += 1

    def load(self, epoch: int, seen: int) -> None:
        """Let the next pass start after these samples, or the one that was begun and has shown nothing yet."""
        self.restarts = 0
        self.move(epoch, seen, resumed=True)
        if self.waiting:
            self.overtaken = self.waiting

    def choose(self, epoch: int, schedule: Schedule) -> None:
        """Choose the epoch of the next pass. Choosing the epoch of a loaded state keeps the loaded position.

        An epoch that is chosen after its last batch was delivered is shown again.
        """
        self.restarts = 0
        complete = self._is_complete(schedule)
        if epoch == self.epoch and not complete:
            self.confirmed = self.resumed
            return
        if epoch == self.epoch + 1 and complete:  # where the pass goes next anyway; an infinite one continues
            self.epoch, self.seen = epoch, 0
            return
        if self.resumed and schedule.steps_after(self.seen):
            logger.warning(
                "set_epoch(%d) drops the loaded position: epoch %d, %d samples.", epoch, self.epoch, self.seen
            )
        self.move(epoch, 0)

    def begin(self, schedule: Schedule) -> tuple[int, int, int]:
        """Begin a pass; returns its number, its epoch, and how many of the epoch's samples it skips.

        It shows the next epoch if the last batch of this one was delivered, and otherwise begins this one again.

        Raises:
            NemoError: another thread is taking a step, and does not finish in time.
        """
        with self.turns.between():
            epoch, seen = self.epoch, self.seen if self.resumed else 0
            saved_in_last_step = self.resumed and not self.confirmed and not schedule.steps_after(seen)
            if saved_in_last_step or self._is_complete(schedule):
                epoch, seen, self.restarts = epoch + 1, 0, 0
            elif self.seen and not self.resumed:
                self.restarts += 1
                if self.restarts > 1 and not self.warned and schedule.pad:  # an evaluation shows the same anyway
                    self.warned = True
                    logger.warning(_RESTARTED, epoch)
            self.move(epoch, seen)
            self.turns.begin(self.passes)
            self.waiting, self.overtaken = self.passes, -1
            return self.passes, epoch, seen

    def advance(self, number: int, epoch: int, seen: int) -> None:
        """Record how far a pass, given by its number, has come."""
        if number == self.waiting:
            self.waiting = 0
        if number == self.passes:
            if epoch != self.epoch:
                self.restarts = 0
            self.epoch, self.seen = epoch, seen

    def _is_complete(self, schedule: Schedule) -> bool:
        """Whether a pass has delivered the epoch's last batch, even if it was not asked for one more."""
        return self.seen > 0 and not self.resumed and not schedule.steps_after(self.seen)
