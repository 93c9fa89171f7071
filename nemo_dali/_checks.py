"""Argument checks, which name the argument and its value, and values formatted for messages."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

PathLike = str | Path
T = TypeVar("T", bound=PathLike)
LONGEST_VALUE = 60  # characters of a value in a message
MOST = 2**31 - 1  # of anything that is counted
LARGEST_SEED = 2**64 - 1
LARGEST_BATCH = 65536  # samples, photos or sentences
LARGEST_FRAME = 16384  # pixels of a side; four times what any published model takes, and areas fit 32 bits


def integer(name: str, value: Any, *, least: int, most: int = LARGEST_SEED) -> int:
    """A value as an integer.

    Raises:
        ValueError: it is not an integer, or is out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} ({short_repr(value)}) must be an integer") from None
    if not least <= number <= most:
        text = str(number) if abs(number) < 10**LONGEST_VALUE else f"an integer of {number.bit_length()} bits"
        raise ValueError(f"{name} ({text}) must be >= {least}" + (f" and <= {most}" if number > most else ""))
    return number


def is_number(value: Any) -> bool:
    """Whether a value is a number that float arithmetic can take, unlike an integer of 400 digits. True is 1."""
    return (isinstance(value, float) and math.isfinite(value)) or (isinstance(value, int) and abs(value) < 2**64)


def as_list(given: T | Sequence[T] | None) -> list[T]:
    """One, several or no paths or names as a list."""
    if given is None:
        return []
    return [given] if isinstance(given, str | Path) else list(given)


def as_paths(name: str, given: Any, *, gaps: bool = False) -> list[Any]:
    """One, several or no paths as a list; with ``gaps``, some of several may be None.

    Raises:
        ValueError: anything else is given, alone or among them.
    """
    if given is None:
        return []
    paths = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    for path in paths:
        if not isinstance(path, str | Path) and not (gaps and path is None):
            raise ValueError(f"{name} ({short_repr(given)}) must be a path or a list of paths, not {short_repr(path)}")
    return paths


def one_of(name: str, choice: Any, choices: Sequence[Any]) -> None:
    """Refuse a choice that is not one of ``choices``."""
    if choice not in choices:
        raise ValueError(f"{name} ({choice!r}) must be one of {choices}")


def check_channels(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what cannot be a mean and a standard deviation per channel."""
    if len(mean) != 3 or not all(map(_is_finite, mean)):
        raise ValueError(f"mean ({mean!s:.{LONGEST_VALUE}}) must be three numbers, one per channel")
    if len(std) != 3 or not all(_is_finite(value) and value > 0 for value in std):
        raise ValueError(f"std ({std!s:.{LONGEST_VALUE}}) must be three numbers > 0, one per channel")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def short_repr(value: Any) -> str:
    """Any value for a message, on one line; one that may be endless, deep or huge is only described."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]!r}..."
    if isinstance(value, Mapping | Sequence) and len(value) > 12:
        return f"a {type(value).__name__} of {len(value)} values"
    try:
        text = ascii(value)
    except Exception:  # nested as deep as the stack, or it holds a number with too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 2 * LONGEST_VALUE else f"{text[: 2 * LONGEST_VALUE]}..."


def shorten(*values: str, longest: int = LONGEST_VALUE) -> list[str]:
    """Two values for a message that compares them; long ones are cut to the part where they begin to differ."""
    if max(map(len, values)) <= longest:
        return list(values)
    same = next((i for i, pair in enumerate(zip(*values, strict=False)) if len(set(pair)) > 1), min(map(len, values)))
    begin = max(same - longest // 3, 0)
    end = begin + longest
    before = "..." if begin else ""
    return [before + value[begin:end] + ("..." if len(value) > end else "") for value in values]
