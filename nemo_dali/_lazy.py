"""Public names that are imported when first used, so that importing a package imports nothing heavy."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        homes: the module that each public name is in, below the package or, with a dot before it, beside the package;
            "" for a name that is a module itself.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f".{homes[name] or name}", package)
        return getattr(module, name) if homes[name] else module

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
