"""A loader's state: which samples have been delivered, in terms that hold for any number of ranks."""

from typing import Any

from nemo_dali.errors import StateError

VERSION = 1
LAST_EPOCH = 2**62  # the next one must still fit into 64 bits


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
