"""Regular files, read whole and up to a limit: a pipe would block, and a device never ends."""

import os
import stat
from pathlib import Path


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a file.

    Args:
        most: the most bytes to read.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is larger than that; ``strerror`` says which.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(0, f"it has {size:,} bytes, more than the limit of {most:,}")
        return file.read(size)


def check_regular(path: str | Path) -> int:
    """The size in bytes of a file that a library is about to open by its name.

    Raises:
        OSError: it cannot be opened or is not a regular file; ``strerror`` says which.
    """
    descriptor = open_regular(path)
    try:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def open_regular(path: str | Path) -> int:
    """A descriptor for reading; the caller closes it. A pipe that nobody writes to does not block.

    Raises:
        OSError: it cannot be opened or is not a regular file; ``strerror`` says which.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise OSError(0, "its name holds a null character") from error
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file")
    return descriptor
