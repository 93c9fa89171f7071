"""Lazy imports: public names, so that importing a package imports little, and the packages of extras."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from nemo_dali.errors import NemoError


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


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Guard a block that imports packages of an extra of ``pyproject.toml``.

    Args:
        name: of the extra.
        what: what needs them, as the beginning of a sentence.

    Raises:
        NemoError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise NemoError(
            f"{what} needs the package '{error.name}', which is not installed. Install it with: "
            f"pip install 'nemo-dali[{name}]'"
        ) from error
