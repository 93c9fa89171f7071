"""Output files: each appears under its name, or replaces one of its own kind, only when it is complete.

    F.partial ──▶ opened and locked ──▶ written ──▶ fsync ──▶ renamed to F ──▶ fsync of the folder

Anything of another kind with the name F or F.partial was not meant: it is never overwritten. A killed run leaves
F.partial, which the next one takes over. Every file that is to be kept is written through this module, and every
message that a file cannot be written is made here.
"""

import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemo_dali.errors import FileFormatError

IsOurs = Callable[[bytes], bool]  # judges by the first bytes of a file, at most HEAD of them

HEAD = 4096  # bytes
ELSEWHERE = "Choose another place with -o."
FREE_SPACE = "Free some space or choose another place with -o."
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)


def partial_name(path: Path) -> Path:
    """What a file is called until it is complete."""
    return path.with_name(path.name + ".partial")


def check_inputs(path: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to overwrite an input, by whatever name it was given.

    Raises:
        FileFormatError: the output is one of the inputs.
    """
    for given in inputs:
        for name in (path, partial_name(path)):
            with suppress(OSError, ValueError):  # one of them does not exist: reported where it is opened
                if os.path.samefile(name, given):
                    raise cannot_write(path, f"it is the input {given}")


def check_place(path: Path, *, is_ours: IsOurs, kind: str) -> None:
    """Find out before long work whether ``write_bytes`` could write a file now.

    Raises:
        FileFormatError: as ``write_bytes``.
    """
    check_target(path, is_ours, kind)
    descriptor = open_partial(path, is_ours)
    try:
        if os.fstat(descriptor).st_size == 0:
            partial_name(path).unlink()
    finally:
        os.close(descriptor)


def check_target(path: Path, is_ours: IsOurs, kind: str) -> None:
    """Refuse to replace anything but a file of the same kind.

    Args:
        kind: what the file is, for the message, such as "a negative table".

    Raises:
        FileFormatError: something else has that name.
    """
    try:
        found = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        status = os.fstat(found)
        if stat.S_ISDIR(status.st_mode):
            raise cannot_write(path, "it is a folder")
        if not stat.S_ISREG(status.st_mode) or (status.st_size and not is_ours(os.pread(found, HEAD, 0))):
            raise cannot_write(path, f"it exists and is not {kind}")
    finally:
        os.close(found)


def open_partial(path: Path, is_ours: IsOurs) -> int:
    """Open F.partial for reading and writing, locked; a new one is empty, an old one is as it was left.

    Returns:
        Its descriptor; closing it gives up the lock.

    Raises:
        FileFormatError: it cannot be made, another run is writing it, or something else has that name.
    """
    partial = partial_name(path)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(partial, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            descriptor = os.open(partial, flags)
    except FileNotFoundError as error:
        raise cannot_write(path, "its folder does not exist") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _in_the_way(path, "a symbolic link") from error
        if error.errno in (errno.EISDIR, errno.ENXIO):
            raise _in_the_way(path, "not a regular file") from error
        raise cannot_write(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _in_the_way(path, "not a regular file")
        if not _locked(descriptor, partial):
            raise cannot_write(path, "another run is writing it", "Wait for it or end it.")
        if status.st_nlink != 1:
            raise _in_the_way(path, "a file that also has another name")
        if status.st_size and not is_ours(os.pread(descriptor, HEAD, 0)):
            raise _in_the_way(path, "not an unfinished file of this kind")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def output_file(path: Path, *, is_ours: IsOurs, kind: str, keep: Callable[[], bool] | None = None) -> Iterator[int]:
    """F.partial, open for reading and writing and locked; it becomes F when the block ends without an exception.

    Args:
        is_ours, kind: what may be replaced; see ``check_target``.
        keep: for a file that can be resumed: it is called after an exception, and says whether to leave the file for
            the next run. The block is then given what an earlier run left, as it is. None: it is given an empty file,
            and nothing is left.

    Raises:
        FileFormatError: something else has one of the names, or the file cannot be opened.
        OSError: for example, the disk is full.
    """
    check_target(path, is_ours, kind)
    descriptor = open_partial(path, is_ours)
    with _named_at_end(descriptor, partial_name(path), path, keep=keep):
        if keep is None:
            os.ftruncate(descriptor, 0)
        yield descriptor


@contextmanager
def _named_at_end(
    descriptor: int,
    partial: Path,
    path: Path,
    *,
    folder: int | None = None,
    keep: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """Give an open file its name once the block has written it; the name itself survives a power cut."""
    named = False
    try:
        yield
        os.fsync(descriptor)
        os.replace(partial, path, src_dir_fd=folder, dst_dir_fd=folder)
        named = True
        if folder is None:
            _sync_folder(path.parent)
        else:
            os.fsync(folder)
    except BaseException:
        if not named and (keep is None or not keep()):
            with suppress(OSError):
                os.unlink(partial, dir_fd=folder)
        raise
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: str | Path, content: bytes, *, is_ours: IsOurs, kind: str) -> None:
    """Write a small file.

    Args:
        is_ours, kind: what may be replaced; see ``check_target``.

    Raises:
        FileFormatError: something else has that name, or it cannot be written.
    """
    path = Path(path)
    try:
        with output_file(path, is_ours=is_ours, kind=kind) as descriptor:
            _write(descriptor, content)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_own(path: str | Path, *parts: bytes | memoryview, folder: int | None = None) -> None:
    """Write a file in a folder of our own, where anything with its name may be replaced; several processes may do so.

    Args:
        parts: the content.
        folder: the descriptor of the folder that ``path`` is relative to; None: the working directory.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(partial, flags, 0o644, dir_fd=folder)
    with _named_at_end(descriptor, partial, path, folder=folder):
        for part in parts:
            _write(descriptor, part)


def _write(descriptor: int, content: bytes | memoryview) -> None:
    if not (rest := memoryview(content)).nbytes:  # an empty view cannot be cast to bytes
        return
    rest = rest.cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def disk_errors_reported(path: Path) -> Iterator[None]:
    """Report in one sentence that the disk does not take a large file.

    Raises:
        FileFormatError: it does not.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # HDF5 gives the number in the text only.
        for number in DISK_ERRORS:
            if number == getattr(error, "errno", None) or f"errno = {number}," in str(error):
                raise cannot_write(path, os.strerror(number), FREE_SPACE) from error
        raise


def cannot_write(path: Path, why: str | OSError, remedy: str = ELSEWHERE) -> FileFormatError:
    """The error that a file or folder cannot be written."""
    if isinstance(why, OSError):
        why = why.strerror or str(why)
    return FileFormatError(f"Cannot write {path}: {why}. {remedy}")


def _in_the_way(path: Path, what: str) -> FileFormatError:
    return cannot_write(path, f"{partial_name(path)} is {what}", "Remove it, or choose another place with -o.")


def _locked(descriptor: int, partial: Path) -> bool:
    """Take the lock on the open partial file; False if another run has it, or has just renamed or removed that file."""
    with suppress(OSError):  # other than being held: a file system without locks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    try:
        return os.path.samestat(os.fstat(descriptor), partial.stat())
    except FileNotFoundError:
        return False
