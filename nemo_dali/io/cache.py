"""A cache of arrays that can be made again: tokens, places of nouns in sentences, machine code.

A file of the cache is ``magic (16 bytes) | xxh3_64 of all after it (8) | 5 lengths (8 each, -1 for those beyond the
array's axes) | elements``, all little-endian. The folder is ``$NEMO_DALI_CACHE``, else ``$XDG_CACHE_HOME/nemo-dali``,
else ``~/.cache/nemo-dali``, and may be deleted.

Nobody else may write to it: folder and file must belong to this user or to root, and not be writable by others. The
checksum finds what a disk or a copy damaged.
"""

import functools
import hashlib
import logging
import math
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from nemo_dali.io.output import write_own

T = TypeVar("T", bound=np.integer[Any])

MAGIC = b"nemo-dali cache\n"
SUMMED = len(MAGIC) + 8  # bytes before those that the checksum covers
LENGTHS = struct.Struct("<5q")
BEGIN = SUMMED + LENGTHS.size  # of the elements

logger = logging.getLogger("nemo_dali")


class _Unusable(Exception):
    """Why a file of the cache is rebuilt."""


class _Distrusted(Exception):
    """The folder is not used."""


def cache_folder() -> Path:
    """The folder; it need not exist yet."""
    if folder := os.environ.get("NEMO_DALI_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nemo-dali"


def name_for(kind: str, depends_on: Sequence[object]) -> str:
    """The name of an array in the cache, made from everything that it depends on, each by its ``repr``."""
    return f"{kind}-{hashlib.sha256(repr(list(depends_on)).encode()).hexdigest()}"


def cached(
    name: str,
    dtype: type[T],
    shape: tuple[int | None, ...],
    *,
    make: Callable[[], npt.NDArray[T]],
    fits: Callable[[npt.NDArray[T]], bool],
    compare: bool = True,
) -> npt.NDArray[T]:
    """An array from the cache; if it is missing or cannot be used, it is made, and kept for the next time.

    Args:
        name: see ``name_for``.
        dtype: of the array.
        shape: of the array, None where a length is not known.
        make: makes it.
        fits: a last check of what was kept.
        compare: False: ignore the file's checksum, so that no elements are read. They must then have checksums of their
            own, and ``renewed`` replaces them.

    Returns:
        The array, or a read-only view of the mapped file.
    """
    folder, name = cache_folder(), f"{name}.cache"
    try:
        with _opened(folder) as inside:
            found = _read(inside, name, dtype, shape, compare)
            if fits(found):
                return found
            raise _Unusable("its content is not what it should be")
    except _Distrusted:
        return make()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (_Unusable, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning("%s is rebuilt: %s.", folder / name, reason)
    return _made(folder, name, make)


def renewed(name: str, reason: str, *, make: Callable[[], npt.NDArray[T]]) -> npt.NDArray[T]:
    """An array in place of one that was kept and turned out not to be what it should be; a warning says so."""
    folder, name = cache_folder(), f"{name}.cache"
    logger.warning("%s is rebuilt: %s.", folder / name, reason)
    return _made(folder, name, make)


def _made(folder: Path, name: str, make: Callable[[], npt.NDArray[T]]) -> npt.NDArray[T]:
    """Make an array, and keep it."""
    made = make()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(folder) as inside:
            _keep(inside, name, made)
    except _Distrusted:
        pass
    except OSError as error:
        _log_unwritable(str(folder), error.strerror or str(error))
    return made


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The descriptor of a folder that nobody else can write to."""
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if reason := _distrust(os.fstat(inside)):
            _warn_distrusted(str(folder), reason)
            raise _Distrusted
        yield inside
    finally:
        os.close(inside)


def _distrust(status: os.stat_result) -> str | None:
    """Why a file or folder may have been made by somebody else; None: it was not."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to another user ({status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "users other than its owner may write to it"
    return None


def _read(inside: int, name: str, dtype: type[T], shape: tuple[int | None, ...], compare: bool) -> npt.NDArray[T]:
    """Map a file. What is checked is what is mapped, whatever has the name by then."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=inside)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Unusable("it is not a regular file")
        if reason := _distrust(status):
            raise _Unusable(reason)
        head = os.pread(descriptor, BEGIN, 0)
        if len(head) < BEGIN or not head.startswith(MAGIC):
            raise _Unusable("it is not a cache file")
        lengths = LENGTHS.unpack_from(head, SUMMED)
        found, rest = lengths[: len(shape)], lengths[len(shape) :]
        wanted = [length if known is None else known for known, length in zip(shape, found, strict=True)]
        if min(found) < 0 or any(length != -1 for length in rest) or list(found) != wanted:
            raise _Unusable("it has a different shape")
        if BEGIN + np.dtype(dtype).itemsize * math.prod(found) != status.st_size:
            raise _Unusable("it was truncated or extended")
        mapped = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    expected = int.from_bytes(head[len(MAGIC) : SUMMED], "little")
    if compare and xxhash.xxh3_64_intdigest(memoryview(mapped)[SUMMED:]) != expected:
        raise _Unusable("its checksum does not match")
    return np.ndarray(found, dtype, mapped, BEGIN)


def _keep(inside: int, name: str, array: npt.NDArray[Any]) -> None:
    """Write a file, whole or not at all: many ranks may come here at once."""
    content = np.ascontiguousarray(array)
    lengths = LENGTHS.pack(*array.shape, *[-1] * (5 - array.ndim))
    digest = xxhash.xxh3_64(lengths)
    digest.update(content.data)
    head = MAGIC + digest.intdigest().to_bytes(8, "little") + lengths
    write_own(name, head, content.data, folder=inside)


@functools.cache
def _log_unwritable(folder: str, reason: str) -> None:
    """Once a process: a slower start is worth a line, not a line per file."""
    logger.info(
        "Nothing is cached, because %s cannot be written (%s); set NEMO_DALI_CACHE to a writable folder.",
        folder,
        reason,
    )


@functools.cache
def _warn_distrusted(folder: str, reason: str) -> None:
    logger.warning(
        "Nothing is cached in %s: %s. Remove that permission (chmod go-w), or set NEMO_DALI_CACHE to a folder of "
        "your own.",
        folder,
        reason,
    )
