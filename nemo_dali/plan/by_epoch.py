"""ByEpoch: a number of the mosaic policy that changes with the epoch."""

import bisect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from nemo_dali._checks import integer, is_number, short_repr

LAST_EPOCH = 2**62  # the next one must still fit into 64 bits
MOST_VALUES = 1000  # every state includes them, and ranks compare them
Interpolation = Literal["steps", "linear"]


@dataclass(frozen=True)
class ByEpoch:
    """A number of a ``MosaicPolicy`` that changes with the epoch, and depends on nothing else.

        ByEpoch({0: 0.0, 5: 0.5})  # 0 in epochs 0 to 4, 0.5 from epoch 5 on
        ByEpoch({0: 400, 30: 100}, "linear")  # 400 in epoch 0, 250 in epoch 15, 100 from epoch 30 on

    Attributes:
        values: by the epochs, counted from 0, from which they hold; epoch 0 must be among them, and there may be at
            most 1,000. None, where that means no bound, is allowed with "steps" only.
        interpolation: "steps": a value holds until the next one. "linear": values change linearly from one to the next,
            and the last one holds from there on. Whole numbers are rounded to the nearest, halves up.

    Raises:
        ValueError: invalid epochs or values.
    """

    values: Mapping[int, float | None]
    interpolation: Interpolation = "steps"

    def __post_init__(self) -> None:
        shown = short_repr(self.values)
        if not isinstance(self.interpolation, str) or self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"interpolation ({short_repr(self.interpolation)}) must be one of {get_args(Interpolation)}"
            )
        if not isinstance(self.values, Mapping) or not 0 < len(self.values) <= MOST_VALUES:
            raise ValueError(f"values ({shown}) must be 1 to {MOST_VALUES:,} values by epoch, as in {{0: 0.0, 5: 0.5}}")
        try:
            values = {operator.index(epoch): value for epoch, value in self.values.items()}
        except TypeError:
            values = {}
        if not all(0 <= epoch <= LAST_EPOCH for epoch in values) or 0 not in values:
            raise ValueError(f"values ({shown}) must have epochs as keys, whole numbers from 0 on, and 0 among them")
        for epoch, value in values.items():
            if not is_number(value) and (value is not None or self.interpolation == "linear"):
                also = "" if self.interpolation == "linear" else " or None"
                raise ValueError(f"values ({short_repr(value)} in epoch {epoch}) must be numbers{also}")
        object.__setattr__(self, "values", dict(sorted(values.items())))

    def __hash__(self) -> int:
        return hash((self.interpolation, *self.values.items()))

    @classmethod
    def of(cls, name: str, given: Any) -> Any:
        """The value given for an attribute; a mapping, as a policy file has it, becomes a ``ByEpoch``.

        Raises:
            ValueError: a mapping that is not ``{"steps": {"0": 0.0, "5": 0.5}}`` or ``{"linear": ...}``.
        """
        if not isinstance(given, Mapping):
            return given
        interpolation, values = next(iter(given.items()), (None, None))
        if len(given) != 1 or interpolation not in get_args(Interpolation) or not isinstance(values, Mapping):
            raise ValueError(
                f"{name} ({short_repr(given)}) must be a number, or numbers by their epochs as in "
                '{"steps": {"0": 0.0, "5": 0.5}} or {"linear": {"0": 0.0, "5": 0.5}}'
            )
        by_epoch = {_epoch(key): value for key, value in values.items()}
        if len(by_epoch) < len(values):
            raise ValueError(f"{name} ({short_repr(values)}) must have each epoch once")
        try:
            return cls(by_epoch, cast(Interpolation, interpolation))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def as_mapping(self) -> dict[str, dict[int, float | None]]:
        """The mapping that a policy file has for it."""
        return {self.interpolation: dict(self.values)}

    def at(self, epoch: int, *, whole: bool = False) -> float | None:
        """The value in an epoch; ``whole``: as a whole number. Exact, then rounded once: the same on every machine."""
        epoch, epochs = integer("epoch", epoch, least=0), list(self.values)
        behind = bisect.bisect_right(epochs, epoch)
        first = epochs[behind - 1]
        if self.interpolation == "steps" or behind == len(epochs) or epoch == first:
            return self.values[first]
        then = epochs[behind]
        # Numbers are fractions of integers, and Python rounds the quotient of two integers to the nearest float.
        (a, b), (c, d) = (cast(float, self.values[end]).as_integer_ratio() for end in (first, then))
        above, below = a * d * (then - epoch) + c * b * (epoch - first), b * d * (then - first)
        return (2 * above + below) // (2 * below) if whole else above / below


def _epoch(key: Any) -> Any:
    """A key as a number if it is an epoch in text, as in JSON; any other key as it is."""
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20 and str(int(key)) == key:
        return int(key)
    return key
