"""Where a loader stands: which samples were delivered, in terms that hold for any number of ranks, saved and loaded."""

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_dali._checks import short_repr
from nemo_dali.errors import StateError
from nemo_dali.plan.schedule import Schedule

logger = logging.getLogger("nemo_dali")

VERSION = 1
_REMEDY = "Give what state_dict made."
LAST_EPOCH = 2**62  # the next one must still fit into 64 bits


@dataclass
class Position:
    """Where the newest pass over an epoch stands.

    Attributes:
        epoch: that the current or the next pass shows.
        seen: samples of it that were delivered, over all ranks.
        resumed: the next pass starts behind ``seen``, not at the epoch's beginning.
        confirmed: ``set_epoch`` has named the loaded epoch: it is shown even if nothing of it is left.
        passes: how often the position was moved; only the newest pass moves it on.
    """

    epoch: int = 0
    seen: int = 0
    resumed: bool = False
    confirmed: bool = False
    passes: int = 0

    def move(self, epoch: int, seen: int, *, resumed: bool = False) -> None:
        """Go elsewhere; passes that are under way no longer move the position."""
        self.epoch, self.seen, self.resumed, self.confirmed = epoch, seen, resumed, False
        self.passes += 1

    def choose(self, epoch: int, schedule: Schedule) -> None:
        """Choose the epoch of the next pass. That of a loaded state keeps the loaded position."""
        if epoch == self.epoch:
            self.confirmed = self.resumed
            return
        if self.resumed and schedule.steps_after(self.seen):
            logger.warning(
                "set_epoch(%d) drops the loaded position: epoch %d, %d samples.", epoch, self.epoch, self.seen
            )
        self.move(epoch, 0)

    def begin(self, schedule: Schedule) -> tuple[int, int, int]:
        """Begin a pass: its number, its epoch, and the samples of it that it leaves out."""
        epoch, seen = self.epoch, self.seen if self.resumed else 0
        if self.resumed and not self.confirmed and not schedule.steps_after(seen):
            epoch, seen = epoch + 1, 0  # the state was saved in the last step of its epoch
        self.move(epoch, seen)
        return self.passes, epoch, seen

    def advance(self, number: int, epoch: int, seen: int) -> None:
        """A pass, by its number, has come this far."""
        if number == self.passes:
            self.epoch, self.seen = epoch, seen


def make_state(*, seed: int, epoch: int, samples_seen: int, fingerprints: dict[str, list[str]]) -> dict[str, Any]:
    """The state after so many samples of an epoch, over all ranks; of JSON's types."""
    return {
        "version": VERSION,
        "seed": seed,
        "epoch": epoch,
        "samples_seen": samples_seen,
        "fingerprints": fingerprints,
    }


def read_state(state: Any, *, seed: int, fingerprints: dict[str, list[str]]) -> tuple[int, int]:
    """Epoch and samples seen of a state.

    Args:
        seed, fingerprints: of the loader that is to go on.

    Raises:
        StateError: it is no state, or one of another version, seed, data set or table.
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
        if list(there) != here:
            raise StateError(
                f"The state was saved with other files ({kind}): {_short(there)}, here {_short(here)}. Give the loader "
                "the files that the interrupted run used, or start without the state."
            )
    if not 0 <= epoch <= LAST_EPOCH or not 0 <= seen <= LAST_EPOCH:
        raise StateError(f"The state's epoch ({epoch}) and samples_seen ({seen}) are out of range. {_REMEDY}")
    return epoch, seen


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
