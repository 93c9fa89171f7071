"""How Numba compiles the kernels for the CPU, and where their machine code is kept.

Numba keeps a function's machine code until the function's own file changes. A kernel is made of functions of several
files, so here it is kept until any kernel's file changes. It lies where Numba's own would: in ``NUMBA_CACHE_DIR``,
beside the sources, or in the user's cache; where none of them can be written, it is not kept.
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba.extending
from numba.core import caching
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

logger = logging.getLogger("nemo_dali.kernels")

F = TypeVar("F", bound=Callable[..., Any])


def jit(*, error_model: str = "numpy", **options: Any) -> Callable[[F], F]:
    """A decorator: compile at first use, run without the GIL, keep the machine code. Options are ``numba.njit``'s."""

    def compiled(function: F) -> F:
        dispatcher = numba.njit(nogil=True, error_model=error_model, **options)(function)
        dispatcher._cache = _cache_of(function)  # what cache=True would do
        kernel: F = dispatcher
        return kernel

    return compiled


def callback(signature: Any) -> Callable[[Callable[..., None]], int]:
    """A decorator: compile now, keep the machine code; in place of the function stands its address for C."""

    def compiled(function: Callable[..., None]) -> int:
        # Any: Numba's types leave out the cache.
        kernel: Any = CFunc(function, normalize_signature(signature), locals={}, options={"nopython": True})
        kernel._cache = _cache_of(function)
        kernel.compile()
        _callbacks.append(kernel)  # the code lives as long as this does
        address: int = kernel.address
        return address

    return compiled


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.extending.intrinsic``: what compiled code calls has all parameters but the first."""
    compiled: Callable[..., Any] = numba.extending.intrinsic(function)
    return compiled


def python_of(kernel: F) -> F:
    """The function that ``jit`` compiled, as Python runs it."""
    function: F = kernel.py_func  # type: ignore[attr-defined]  # jit keeps the function's own type
    return function


def cache_path(kernel: Callable[..., Any]) -> str | None:
    """The folder of a kernel's machine code; None: it is not kept."""
    path: str | None = kernel.stats.cache_path  # type: ignore[attr-defined]  # as above
    return path


_callbacks: list[CFunc] = []


@functools.cache
def _digest_of_sources() -> str:
    folder = Path(__file__).resolve().parent  # this file may be a link
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class _AllSources:
    """The part of a locator that tells by what machine code goes stale."""

    def get_source_stamp(self) -> str:
        return _digest_of_sources()


class _InFolderOfUsersChoice(_AllSources, caching.UserProvidedCacheLocator):
    pass


class _BesideSources(_AllSources, caching.InTreeCacheLocator):
    pass


class _InUsersCache(_AllSources, caching.UserWideCacheLocator):
    pass


class _Files(caching.CompileResultCacheImpl):
    _locator_classes = (_InFolderOfUsersChoice, _BesideSources, _InUsersCache)


class _Cache(caching.FunctionCache):
    _impl_class = _Files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The machine code that was kept, if it was: else it is compiled next."""
        found = super().load_overload(sig, target_context)
        if found is None:
            _report_once()
        return found


@functools.cache
def _report_once() -> None:
    logger.info("Compiling kernels for this machine, for some 20 s; later starts take them from a cache.")


def _cache_of(function: Callable[..., Any]) -> Any:
    try:
        return _Cache(function)
    except RuntimeError:  # Numba's "no locator available"
        _warn_once()
        return caching.NullCache()


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "Kernels are compiled again, for about 20 s: neither %s nor the user's cache can be written. Set "
        "NUMBA_CACHE_DIR to a persistent folder of your own.",
        Path(__file__).parent,
    )
