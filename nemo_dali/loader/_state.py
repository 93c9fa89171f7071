"""Where a loader stands: which samples were delivered, in terms that hold for any number of ranks, saved and loaded."""

import logging
from dataclasses import dataclass
from typing import Any

from nemo_dali.errors import StateError
from nemo_dali.plan.schedule import Schedule

logger = logging.getLogger("nemo_dali")

VERSION = 1
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
    try:
        version, other_seed, prints = state["version"], state["seed"], state["fingerprints"]
        epoch, seen = int(state["epoch"]), int(state["samples_seen"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"This is not a state of a nemo_dali Loader: {error!r}. Give what state_dict made.") from None
    if version != VERSION:
        raise StateError(f"The state is version {version}; this nemo-dali reads version {VERSION}.")
    if other_seed != seed:
        raise StateError(f"The state has seed {other_seed}, this loader {seed}. Make the loader with that seed.")
    for kind, here in fingerprints.items():
        there = prints.get(kind) if isinstance(prints, dict) else None
        if there != here:
            raise StateError(
                f"The state was saved with other files ({kind}): {_short(there)}, here {_short(here)}. Give the loader "
                "the files that the interrupted run used, or start without the state."
            )
    if not 0 <= epoch <= LAST_EPOCH or seen < 0:
        raise StateError(f"The state's epoch ({epoch}) and samples_seen ({seen}) are out of range.")
    return epoch, seen


def _short(prints: Any) -> str:
    """Fingerprints as a person compares them."""
    return ", ".join(str(one)[:12] for one in prints) if prints else "none"
