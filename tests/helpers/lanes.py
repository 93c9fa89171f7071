"""Parameters, some of which are for the fast lane."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def lanes(values: Iterable[Any], *, fast: Collection[Any]) -> list[Any]:
    """The values; those that are not ``fast`` are marked slow."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
