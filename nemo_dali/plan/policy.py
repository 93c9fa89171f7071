"""MosaicPolicy: which share of the samples become mosaics, of what kind, and where the target is in them.

A policy file is a JSON object with some or all of the policy's own keys, and optionally ``tuned_for`` (the fingerprint
of a negative table) and ``why`` (sentences), as ``nemo-dali tune`` writes them. A number that changes with the epoch is
an object in it: ``{"steps": {"0": 0.0, "5": 0.5}}`` or ``{"linear": ...}``.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from nemo_dali._checks import PathLike, integer, is_number, short_repr
from nemo_dali.errors import NemoError
from nemo_dali.io.files import read_regular
from nemo_dali.io.output import cannot_write, check_place, write_bytes
from nemo_dali.plan.by_epoch import LAST_EPOCH, ByEpoch

logger = logging.getLogger("nemo_dali")

POLICY = "a policy file"
MAX_FILE_BYTES = 1 << 20
MAX_WEIGHT = 1e100  # of a grid: so that the sum of weights stays finite
NOTES = ("tuned_for", "why")  # in a policy file, besides the policy
TargetCell = Literal["uniform", "positional"]


class Difficulty(NamedTuple):
    """The values of a policy that may change with the epoch, in one epoch; ``MosaicPolicy`` explains them."""

    p_mined: float
    p_random: float
    top_k: int
    max_similarity: float | None
    max_similarity_no_target: float | None


@dataclass(frozen=True, kw_only=True)
class MosaicPolicy:
    """How samples are drawn. Validated when created; ``dataclasses.replace`` makes variants.

    The probabilities, ``top_k`` and the bounds are the same in all epochs, or change with the epoch: a ``ByEpoch``, or
    the mapping that a policy file has for it. ``at`` gives the policy of an epoch. Single photos first, mosaics from
    epoch 5 on, and harder ones over time:

        MosaicPolicy(p_mined=ByEpoch({0: 0.0, 5: 0.5}), top_k=ByEpoch({0: 400, 30: 100}, "linear"))

    Attributes:
        p_mined: probability of a mosaic whose other photos are mined negatives.
        p_random: probability of a mosaic whose other photos are random ones; the rest of the samples are single photos.
        mine_after_epoch: before this epoch (counted from 0), random samples replace mined ones. ``mine_after_epoch=5,
            p_mined=0.5`` draws what ``p_mined=ByEpoch({0: 0.0, 5: 0.5}), p_random=ByEpoch({0: 0.5, 5: 0.0})`` draws.
        top_k: K, the number of candidates in the pool.
        max_similarity: tau, the largest similarity of a candidate; None for no bound.
        max_similarity_no_target: the same for expressions that fit nothing in their own photo (gRefCOCO, Ref-ZOM): a
            mined negative may well hold what they describe, and the mask would be wrong. None: as ``max_similarity``.
        grids: weight of each grid among the mosaics, keys 2 (2x2) and 3 (3x3).
        jitter: largest shift of the crossing of a 2x2 mosaic from the middle, as a share of the frame's size, 0 to 0.5.
            At 0.5 a cell may get no pixels; if it is the target's, that sample's mask is empty.
        target_cell: "uniform", or "positional": a cell that keeps "left", "top right", ... in the expression true.

    Raises:
        ValueError: an attribute is outside its range.
    """

    p_mined: float | ByEpoch = 0.5
    p_random: float | ByEpoch = 0.0
    mine_after_epoch: int = 0
    top_k: int | ByEpoch = 100
    max_similarity: float | ByEpoch | None = None
    max_similarity_no_target: float | ByEpoch | None = None
    grids: Mapping[int, float] = field(default_factory=lambda: {2: 1.0})
    jitter: float = 0.0
    target_cell: TargetCell = "uniform"

    def __post_init__(self) -> None:
        for name in Difficulty._fields:
            object.__setattr__(self, name, ByEpoch.of(name, getattr(self, name)))
        for name in ("p_mined", "p_random"):
            _number(name, getattr(self, name), least=0, most=1)
        _whole_number("mine_after_epoch", self.mine_after_epoch, least=0, most=LAST_EPOCH)
        self._check_shares()
        for name in ("max_similarity", "max_similarity_no_target"):
            _number(name, getattr(self, name), least=-1, most=1, instead="None or ")
        _check_grids(self.grids)
        object.__setattr__(self, "grids", dict(self.grids))
        _whole_number("top_k", self.top_k, least=self.most_negatives, most=2**31 - 1)
        _number("jitter", self.jitter, least=0, most=0.5)
        if not isinstance(self.target_cell, str) or self.target_cell not in get_args(TargetCell):
            raise ValueError(f"target_cell ({short_repr(self.target_cell)}) must be one of {get_args(TargetCell)}")

    def _check_shares(self) -> None:
        changing = isinstance(self.p_mined, ByEpoch) or isinstance(self.p_random, ByEpoch)
        for epoch in self.turns:
            share = self._value("p_mined", epoch) + self._value("p_random", epoch)
            if share > 1 + 1e-12:
                where = f" in epoch {epoch}" if changing else ""
                raise ValueError(f"p_mined + p_random ({share}{where}) must be at most 1")

    def __hash__(self) -> int:
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return hash(tuple(frozenset(value.items()) if isinstance(value, dict) else value for value in values))

    def at(self, epoch: int) -> "MosaicPolicy":
        """The policy of one epoch as a constant policy, which draws the same in that epoch."""
        return replace(self, **self.difficulty(epoch)._asdict(), mine_after_epoch=0)

    def difficulty(self, epoch: int) -> Difficulty:
        """The values that may change with the epoch, as they are in this one, with ``mine_after_epoch`` applied."""
        epoch = integer("epoch", epoch, least=0)
        now = Difficulty(*(self._value(name, epoch) for name in Difficulty._fields))
        if epoch < self.mine_after_epoch:
            return now._replace(p_mined=0.0, p_random=min(now.p_mined + now.p_random, 1.0))
        return now

    def _value(self, name: str, epoch: int) -> Any:
        value = getattr(self, name)
        return value.at(epoch, whole=name == "top_k") if isinstance(value, ByEpoch) else value

    @property
    def breakpoints(self) -> list[int]:
        """The first epochs of the stretches over which each number is constant or linear; [0]: none changes."""
        numbers = (getattr(self, name) for name in Difficulty._fields)
        epochs = (epoch for number in numbers if isinstance(number, ByEpoch) for epoch in number.values)
        return sorted({0, self.mine_after_epoch, *epochs})

    @property
    def turns(self) -> list[int]:
        """The first and last epochs of those stretches: what holds in all of them holds in every epoch."""
        first = self.breakpoints
        return sorted({*first, *(epoch - 1 for epoch in first[1:])})

    @property
    def mines(self) -> bool:
        """Whether it draws mined negatives in any epoch."""
        return any(self.difficulty(epoch).p_mined > 0 for epoch in self.turns)

    @property
    def largest_grid(self) -> int:
        """3 if a mosaic can be 3x3 in any epoch, 2 if it can only be 2x2, 1 if every sample is single."""
        if not any(share for name in ("p_mined", "p_random") for share, _ in _each(getattr(self, name))):
            return 1
        return max(grid for grid, weight in self.grids.items() if weight > 0)

    @property
    def most_negatives(self) -> int:
        """Photos besides the target's in the largest mosaic."""
        return self.largest_grid**2 - 1

    @property
    def shown_grids(self) -> set[int]:
        """The grids of the samples that it draws, over all epochs; 1 for single photos."""
        shares = [now.p_mined + now.p_random for now in map(self.difficulty, self.turns)]
        grids = {grid for grid, weight in self.grids.items() if weight > 0 and max(shares) > 0}
        return grids | {1} if min(shares) < 1 else grids

    def to_json(self) -> str:
        """The policy as a JSON object, keys sorted."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps(values, sort_keys=True, default=ByEpoch.as_mapping)

    @classmethod
    def from_json(cls, text: str) -> "MosaicPolicy":
        """The policy that ``to_json`` wrote; missing keys take their defaults.

        Raises:
            ValueError: not a JSON object, an unknown key, or a value out of range.
        """
        try:
            values = json.loads(text, object_pairs_hook=_object)
        except RecursionError as error:
            raise ValueError("a policy must not nest values") from error
        if not isinstance(values, dict) or not set(values) <= set(cls.__dataclass_fields__):
            raise ValueError(f"a policy must be a JSON object with keys among {sorted(cls.__dataclass_fields__)}")
        if isinstance(values.get("grids"), dict):
            names = {"2": 2, "3": 3}  # JSON's keys are text
            values["grids"] = {names.get(grid, grid): weight for grid, weight in values["grids"].items()}
        return cls(**values)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must all be different."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"the key {short_repr(name)} is in an object twice")
        made[name] = value
    return made


def _each(given: Any) -> Iterator[tuple[Any, str]]:
    """The values of an attribute, each with its epoch for messages."""
    if not isinstance(given, ByEpoch):
        yield given, ""
        return
    for epoch, value in given.values.items():
        yield value, f" in epoch {epoch}"


def _number(name: str, given: Any, *, least: float, most: float, instead: str = "") -> None:
    for value, where in _each(given):
        if value is None and instead:
            continue
        if not (is_number(value) and least <= value <= most):
            shown = f"{name} ({short_repr(value)}{where})"
            raise ValueError(f"{shown} must be {instead}a number between {least} and {most}")


def _whole_number(name: str, given: Any, *, least: int, most: int) -> None:
    for value, where in _each(given):
        if not (is_number(value) and isinstance(value, int) and least <= value <= most):
            raise ValueError(f"{name} ({short_repr(value)}{where}) must be a whole number between {least} and {most}")


def _check_grids(grids: Any) -> None:
    shown = short_repr(grids)
    if not isinstance(grids, Mapping) or not grids or not all(is_number(key) and key in (2, 3) for key in grids):
        raise ValueError(f"grids ({shown}) must weigh 2 (2x2), 3 (3x3) or both")
    if not all(is_number(weight) and 0 <= weight <= MAX_WEIGHT for weight in grids.values()):
        raise ValueError(f"grids ({shown}) must have numbers between 0 and {MAX_WEIGHT:g} as weights")
    if not any(grids.values()):
        raise ValueError(f"grids ({shown}) must have a weight > 0")


def read_policy(path: str | Path) -> tuple[MosaicPolicy, str | None]:
    """Read a policy file: the policy, and the fingerprint of the table that it was tuned for, if the file has it.

    Raises:
        NemoError: the file cannot be read, or is not a policy file.
    """
    remedy = f"Propose one with: nemo-dali tune F.ris.h5 F.neg.h5 -o {path}"
    try:
        content = json.loads(read_regular(path, MAX_FILE_BYTES).decode(), object_pairs_hook=_object)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        notes = {name: content.pop(name) for name in NOTES if name in content}
        tuned_for = notes.get("tuned_for")
        if not isinstance(tuned_for, str | None):
            raise ValueError(f"tuned_for ({short_repr(tuned_for)}) must be the fingerprint of a negative table")
        policy = MosaicPolicy.from_json(json.dumps(content))
    except OSError as error:
        raise NemoError(f"The policy file {path} cannot be read: {error.strerror}. {remedy}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise NemoError(f"The policy file {path} cannot be used: {error}. {remedy}") from error
    return policy, tuned_for


def check_policy_place(path: str | Path) -> None:
    """Check, before long work, that ``write_policy`` could write a file now; raises the same errors."""
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"output ({path}) must end in .json")
    check_place(path, is_ours=_is_policy, kind=POLICY)
    if path.exists():
        try:
            read_policy(path)
        except NemoError as error:
            raise cannot_write(path, f"it exists and is not {POLICY}") from error


def write_policy(path: str | Path, policy: MosaicPolicy, *, tuned_for: str, why: list[str]) -> None:
    """Write a policy file; an existing one is replaced, anything else is not.

    Raises:
        ValueError: the name does not end in .json.
        NemoError: it cannot be written, or something else has that name.
    """
    check_policy_place(path)
    content = json.loads(policy.to_json()) | {"tuned_for": tuned_for, "why": why}
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode(), is_ours=_is_policy, kind=POLICY)


def _is_policy(head: bytes) -> bool:
    return head.startswith(b"{") and any(f'"{name}"'.encode() in head for name in MosaicPolicy.__dataclass_fields__)


def policy_of(
    given: MosaicPolicy | PathLike | None, *, evaluate: bool
) -> tuple[MosaicPolicy, PathLike | None, str | None]:
    """A policy, the file that it was read from, and the fingerprint of the table that it was tuned for."""
    if given is None:
        return (MosaicPolicy(p_mined=0) if evaluate else MosaicPolicy()), None, None
    if isinstance(given, str | os.PathLike):
        policy, tuned_for = read_policy(given)
        return policy, given, tuned_for
    if not isinstance(given, MosaicPolicy):
        raise ValueError(f"policy ({given!r}) must be a MosaicPolicy")
    return given, None, None


def warn_if_tuned_elsewhere(path: PathLike | None, tuned_for: str | None, tables: Sequence[str]) -> None:
    """Warn if a policy file was tuned for none of the tables, given by fingerprint, that it is used with."""
    if tuned_for is not None and tuned_for not in tables:
        logger.warning(
            "The policy in %s was tuned for a different negative table than the one given. Propose one for this table "
            "with 'nemo-dali tune'.",
            path,
        )


def warn_if_unbounded(policy: MosaicPolicy) -> None:
    """Warn if a policy that mines has no bound in at least one epoch; each warning is given once per process."""
    for epoch in policy.turns:
        now = policy.difficulty(epoch)
        if now.p_mined > 0 and now.max_similarity is None:
            _warn_once(f" in epoch {epoch}" if isinstance(policy.max_similarity, ByEpoch) else "")
            return


@functools.cache
def _warn_once(where: str) -> None:
    logger.warning(
        "max_similarity is None%s: photos that hold the referent themselves may be drawn as negatives. "
        "'nemo-dali tune F.ris.h5 F.neg.h5 -o policy.json' proposes a bound, and 'nemo-dali report' shows it.",
        where,
    )
