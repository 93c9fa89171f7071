"""What DALI opens: by which path, and how many at once."""

import errno
import os
import resource
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from nemo_dali.data.photo_file import TOO_MANY_FILES, is_unfit
from nemo_dali.data.s3 import is_remote
from nemo_dali.errors import NemoError

NOTHING = np.frombuffer(os.fsencode(f"{os.devnull}/no photo"), np.uint8)  # a path where nothing ever lies
NEW_FILES = 16  # that a pipeline opens when it is made, at most
OTHER_FILES = 256  # open files that a training process has besides photos: libraries, sockets, logs


def encode_path(path: str, *, looked_at: bool = False) -> npt.NDArray[np.uint8]:
    """A path as ``io.file.read`` takes it: its bytes, uint8 [length].

    It is NOTHING where something else lies than a file that can be a photo's: DALI then fails, where it would wait for
    ever for a FIFO's writer, deaf to an interrupt. DALI opens by path, so whatever is put there between this look and
    DALI's opening, some batches later, is opened.

    Args:
        looked_at: it was found fit before, and is not looked at again.
    """
    if not (looked_at or is_remote(path)) and is_unfit(path):
        return NOTHING
    return np.frombuffer(os.fsencode(path), np.uint8)


def allow_open_files(count: int) -> None:
    """``io.file.read`` opens all photos of a batch at once: raise the soft limit if need be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise NemoError(
                f"A batch opens up to {count - OTHER_FILES} photos at once, but this process may open {hard} files. "
                f"Raise the limit to {count} (ulimit -n), or lower batch_size."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def check_open_files() -> None:
    """See whether the files that a pipeline needs can be opened: DALI does not say that it could not.

    Raises:
        NemoError: they cannot.
    """
    with ExitStack() as opened:
        try:
            for _ in range(NEW_FILES):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise NemoError(TOO_MANY_FILES) from error
            raise
