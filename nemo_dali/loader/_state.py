"""Where a loader stands: which samples were delivered, in terms that hold for any number of ranks, saved and loaded."""

import json
import logging
import operator
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nemo_dali._checks import short_repr
from nemo_dali.errors import NemoError, StateError
from nemo_dali.loader.options import BatchFormat
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.plan.schedule import Schedule

logger = logging.getLogger("nemo_dali")

VERSION = 1
SAMPLING = "sampling"  # among a state's fingerprints: what decides samples besides the files
ONE_THREAD = "Make one Loader per thread, or let one thread iterate and hand its batches to the others in a queue."
_REMEDY = "Give what state_dict made."
_RESTARTED = (
    "Epoch %d is begun anew for the second time: passes that are given up early show its first samples each time. Call "
    "set_epoch before each pass, or keep one iterator of a Loader with infinite=True and take the steps from it."
)
JOIN = "Let that thread come to its end before close() is called."
PATIENCE_S = 60.0  # with a thread that finishes the last step of a pass that was given up
LAST_EPOCH = 2**62  # the next one must still fit into 64 bits


class Turns:
    """Sees to it that passes, which share a pipeline and a position, do not get into each other's way.

    A pass may go from thread to thread, and a thread may go on with several passes in turn: each step starts the
    pipeline where its pass stands. Threads with a pass each would throw it to and fro, and what an epoch shows would
    depend on which of them was faster.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a thread that was interrupted at a bad moment can still go on itself
        self._newest = 0  # number of the pass that was begun last
        self._thread = 0  # that began it, or took its last step

    def take(self, patience: float, remedy: str = ONE_THREAD) -> None:
        """Keep other threads out until ``give``.

        Args:
            patience: seconds to wait for the thread that is inside.
            remedy: for the message.

        Raises:
            NemoError: it is still inside then.
        """
        if not self._lock.acquire(timeout=patience):
            raise NemoError(f"Another thread waits for a batch of this Loader at this moment. {remedy}")

    def give(self) -> None:
        """Let other threads in again."""
        self._lock.release()

    @contextmanager
    def between(self, remedy: str = ONE_THREAD) -> Iterator[None]:
        """Between two steps: one that another thread takes at this moment is waited for.

        Raises:
            NemoError: it does not come to its end.
        """
        self.take(PATIENCE_S, remedy)
        try:
            yield
        finally:
            self.give()

    def begin(self, number: int) -> None:
        """The pass of this number is the newest from now on."""
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
    """A pass as whoever iterates has it: its batches, one thread at a time.

    Raises:
        NemoError: another thread waits for a batch of the same Loader, of this pass or of another.
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
        epoch: that the current or the next pass shows.
        seen: samples of it that were delivered, over all ranks.
        resumed: the next pass starts behind ``seen``, not at the epoch's beginning.
        confirmed: ``set_epoch`` has named the loaded epoch: it is shown even if nothing of it is left.
        passes: how often the position was moved; only the newest pass moves it on.
        restarts: passes over this epoch that were given up and begun anew since it was chosen.
        told: so much was said.
        turns: which pass may take a step.
    """

    epoch: int = 0
    seen: int = 0
    resumed: bool = False
    confirmed: bool = False
    passes: int = 0
    restarts: int = 0
    told: bool = False
    turns: Turns = field(default_factory=Turns)

    def move(self, epoch: int, seen: int, *, resumed: bool = False) -> None:
        """Go elsewhere; passes that are under way no longer move the position."""
        self.epoch, self.seen, self.resumed, self.confirmed = epoch, seen, resumed, False
        self.passes += 1

    def load(self, epoch: int, seen: int) -> None:
        """Let the next pass start behind these samples."""
        self.restarts = 0
        self.move(epoch, seen, resumed=True)

    def choose(self, epoch: int, schedule: Schedule) -> None:
        """Choose the epoch of the next pass. That of a loaded state keeps the loaded position.

        Named after its last batch was delivered, an epoch is shown again.
        """
        self.restarts = 0
        complete = self._is_complete(schedule)
        if epoch == self.epoch and not complete:
            self.confirmed = self.resumed
            return
        if epoch == self.epoch + 1 and complete:  # where the pass is about to go; one without end does go on
            self.epoch, self.seen = epoch, 0
            return
        if self.resumed and schedule.steps_after(self.seen):
            logger.warning(
                "set_epoch(%d) drops the loaded position: epoch %d, %d samples.", epoch, self.epoch, self.seen
            )
        self.move(epoch, 0)

    def begin(self, schedule: Schedule) -> tuple[int, int, int]:
        """Begin a pass: its number, its epoch, and the samples of it that it leaves out.

        It shows the next epoch if the last batch of this one was delivered, and otherwise begins it anew.

        Raises:
            NemoError: another thread takes a step, and does not come to its end.
        """
        with self.turns.between():
            epoch, seen = self.epoch, self.seen if self.resumed else 0
            saved_in_last_step = self.resumed and not self.confirmed and not schedule.steps_after(seen)
            if saved_in_last_step or self._is_complete(schedule):
                epoch, seen, self.restarts = epoch + 1, 0, 0
            elif self.seen and not self.resumed:
                self.restarts += 1
                if self.restarts > 1 and not self.told and schedule.pad:  # an evaluation shows the same anyway
                    self.told = True
                    logger.warning(_RESTARTED, epoch)
            self.move(epoch, seen)
            self.turns.begin(self.passes)
            return self.passes, epoch, seen

    def advance(self, number: int, epoch: int, seen: int) -> None:
        """A pass, by its number, has come this far."""
        if number == self.passes:
            if epoch != self.epoch:
                self.restarts = 0
            self.epoch, self.seen = epoch, seen

    def _is_complete(self, schedule: Schedule) -> bool:
        """Whether a pass has delivered the epoch's last batch, and perhaps was not asked for one more."""
        return self.seen > 0 and not self.resumed and not schedule.steps_after(self.seen)


def make_state(*, seed: int, epoch: int, samples_seen: int, fingerprints: dict[str, list[str]]) -> dict[str, Any]:
    """The state after so many samples of an epoch, over all ranks; of JSON's types."""
    return {
        "version": VERSION,
        "seed": seed,
        "epoch": epoch,
        "samples_seen": samples_seen,
        "fingerprints": fingerprints,
    }


def sampling_facts(policy: MosaicPolicy, format: BatchFormat, *, split_mode: str) -> list[str]:
    """What decides which samples an epoch has, "name=value" each; batch size and ranks do not."""
    facts = {"samples": format.samples, "split_mode": split_mode, "size": format.size, **json.loads(policy.to_json())}
    if format.erase:  # only then: states saved before there was such an option go on
        facts["erase"] = format.erase
    return [f"{name}={json.dumps(value)}" for name, value in facts.items()]


def read_state(state: Any, *, seed: int, fingerprints: dict[str, list[str]], strict: bool = True) -> tuple[int, int]:
    """Epoch and samples seen of a state.

    Args:
        seed, fingerprints: of the loader that is to go on.
        strict: refuse a state that was saved with another policy, ``samples``, ``split_mode`` or ``size``; else warn.

    Raises:
        StateError: it is no state, or one of another version, seed, data set or table, or of other samples.
    """
    if not isinstance(state, dict):
        raise StateError(f"This is not a state of a nemo_dali Loader: {short_repr(state)}. {_REMEDY}")
    for key in ("version", "seed", "fingerprints", "epoch", "samples_seen"):
        if key not in state:
            raise StateError(f"This is not a state of a nemo_dali Loader: it has no '{key}'. {_REMEDY}")
    version = _whole_number("version", state["version"])
    other_seed = _whole_number("seed", state["seed"])
    epoch, seen = _whole_number("epoch", state["epoch"]), _whole_number("samples_seen", state["samples_seen"])
    prints = state["fingerprints"]
    if version != VERSION:
        raise StateError(f"The state is version {version}; this nemo-dali reads version {VERSION}.")
    if other_seed != seed:
        raise StateError(f"The state has seed {other_seed}, this loader {seed}. Make the loader with that seed.")
    for kind, here in fingerprints.items():
        there = prints.get(kind) if isinstance(prints, dict) else None
        if not isinstance(there, list | tuple) or not all(isinstance(one, str) for one in there):
            there = []
        if kind != SAMPLING and list(there) != here:
            raise StateError(
                f"The state was saved with other files ({kind}): {_short(there)}, here {_short(here)}. Give the loader "
                "the files that the interrupted run used, or start without the state."
            )
    if not 0 <= epoch <= LAST_EPOCH or not 0 <= seen <= LAST_EPOCH:
        raise StateError(f"The state's epoch ({epoch}) and samples_seen ({seen}) are out of range. {_REMEDY}")
    _check_sampling(prints.get(SAMPLING), fingerprints.get(SAMPLING, []), strict=strict)
    return epoch, seen


def _check_sampling(there: Any, here: list[str], *, strict: bool) -> None:
    """Compare what decides samples, as ``sampling_facts`` gives it; None where the state is older than that."""
    if there is None:
        logger.warning(
            "The state was saved by an older nemo-dali and does not say with which policy, samples, split_mode and "
            "size. The epoch goes on rightly only if they are the same."
        )
        return
    if not isinstance(there, list | tuple) or not all(isinstance(fact, str) for fact in there):
        raise StateError(f"The state's fingerprints of '{SAMPLING}' must be a list of strings. {_REMEDY}")
    old, new = (dict(fact.partition("=")[::2] for fact in facts) for facts in (there, here))
    differing = [name for name in old | new if old.get(name) != new.get(name)]
    if not differing:
        return
    words = ", ".join(
        "{} {}, here {}".format(
            *(repr(part)[1:-1][:28] for part in (name, old.get(name, "none"), new.get(name, "none")))
        )
        for name in differing[:4]
    )
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    if strict:
        raise StateError(
            f"The state was saved with other samples: {words}{more}. Make the loader with the options of the "
            "interrupted run, or accept other samples by load_state_dict(state, strict=False)."
        )
    logger.warning("The epoch goes on with other samples than it began with: %s%s.", words, more)


def _whole_number(key: str, value: Any) -> int:
    """A number of a state, which may come back as a NumPy scalar or a tensor from where it was saved."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or abs(number) >= 2**64:
        raise StateError(f"The state's '{key}' ({short_repr(value)}) must be a whole number of 64 bits. {_REMEDY}")
    return number


def _short(prints: Sequence[str]) -> str:
    """Fingerprints as a person compares them."""
    return ", ".join(repr(one[:12])[1:-1] for one in prints[:8]) or "none"
