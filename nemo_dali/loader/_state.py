"""The state of a loader, in terms that hold for any number of ranks: saved, and checked when it is loaded."""

import json
import logging
import operator
from collections.abc import Sequence
from typing import Any

from nemo_dali._checks import short_repr, shorten
from nemo_dali.errors import StateError
from nemo_dali.loader.options import LoaderOptions
from nemo_dali.plan.by_epoch import LAST_EPOCH

logger = logging.getLogger("nemo_dali")

VERSION = 1
SAMPLING = "sampling"  # among a state's fingerprints: what decides samples besides the files
_REMEDY = "Give what state_dict returned."


def make_state(*, seed: int, epoch: int, samples_seen: int, fingerprints: dict[str, list[str]]) -> dict[str, Any]:
    """The state after ``samples_seen`` samples of an epoch, over all ranks, in JSON types."""
    return {
        "version": VERSION,
        "seed": seed,
        "epoch": epoch,
        "samples_seen": samples_seen,
        "fingerprints": fingerprints,
    }


def sampling_facts(options: LoaderOptions) -> list[str]:
    """What decides which samples an epoch has, "name=value" each; batch size and ranks do not."""
    format = options.format
    facts: dict[str, Any] = {"samples": format.samples, "split_mode": options.split_mode, "size": format.size}
    facts |= json.loads(options.policy.to_json())
    if format.erase:  # only then: states saved before this option existed still load
        facts["erase"] = format.erase
    return [f"{name}={json.dumps(value)}" for name, value in facts.items()]


def read_state(state: Any, *, seed: int, fingerprints: dict[str, list[str]], strict: bool = True) -> tuple[int, int]:
    """Epoch and samples seen of a state.

    Args:
        seed, fingerprints: of the loader that is to continue.
        strict: refuse a state that was saved with a different policy, ``samples``, ``split_mode``, ``size`` or
            ``erase``; else warn.

    Raises:
        StateError: it is not a state, or has a different version, seed, data set or table, or different samples.
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
            "size. The epoch continues correctly only if they are the same."
        )
        return
    if not isinstance(there, list | tuple) or not all(isinstance(fact, str) for fact in there):
        raise StateError(f"The state's fingerprints of '{SAMPLING}' must be a list of strings. {_REMEDY}")
    old, new = (dict(fact.partition("=")[::2] for fact in facts) for facts in (there, here))
    differing = [name for name in old | new if not _say_the_same(old.get(name), new.get(name))]
    if not differing:
        return
    differences = []
    for name in differing[:4]:
        values = shorten(*(repr(facts.get(name, "none"))[1:-1] for facts in (old, new)), longest=28)
        differences.append("{} {}, here {}".format(repr(name)[1:-1][:28], *values))
    words = ", ".join(differences)
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    if strict:
        raise StateError(
            f"The state was saved with different samples: {words}{more}. Make the loader with the options of the "
            "interrupted run, or accept different samples with load_state_dict(state, strict=False)."
        )
    logger.warning("The epoch continues with different samples than it began with: %s%s.", words, more)


def _say_the_same(old: str | None, new: str | None) -> bool:
    """Whether the values of two facts are equal: 1 and 1.0 are one number."""
    if old is None or new is None or old == new:
        return old == new
    try:
        return bool(json.loads(old) == json.loads(new))
    except (ValueError, RecursionError):
        return False


def _whole_number(key: str, value: Any) -> int:
    """A number of a state, which may come back as a NumPy scalar or a tensor from where the state was saved."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or abs(number) >= 2**64:
        raise StateError(f"The state's '{key}' ({short_repr(value)}) must be a 64-bit integer. {_REMEDY}")
    return number


def _short(prints: Sequence[str]) -> str:
    """Fingerprints, shortened for a person to compare."""
    return ", ".join(repr(one[:12])[1:-1] for one in prints[:8]) or "none"
