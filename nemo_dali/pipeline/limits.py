"""What the system allows a process: DALI does not say what it could not get, or ends the process."""

import errno
import os
import resource
import sys
from contextlib import ExitStack

from nemo_dali.errors import NemoError
from nemo_dali.io.memory import address_space_left
from nemo_dali.io.threads import can_start

NEW_FILES = 16  # that a pipeline opens when it is made, at most
OTHER_FILES = 256  # open files that a training process has besides photos: libraries, sockets, logs
OTHER_THREADS = 8  # that a pipeline starts besides its workers
# Address space, as measured plus half as much again; little of it ever becomes memory.
DALI_SPACE, PIPELINE_SPACE = 2**30, 2**30 - 2**28
THREAD_SPACE = 72 * 2**20  # a stack of 8 MiB and a glibc arena


def allow_open_files(photos: int) -> None:
    """Raise the soft limit if necessary: ``io.file.read`` opens all photos of a batch at once.

    Raises:
        NemoError: it cannot be raised that far.
    """
    count = photos + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise NemoError(
                f"A batch opens up to {photos} photos at once, but this process may open {hard} files. "
                f"Raise the limit to {count} (ulimit -n), or lower batch_size."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def check_open_files() -> None:
    """Check that the files that a pipeline needs can be opened: DALI does not say if it could not.

    Raises:
        NemoError: they cannot.
    """
    from nemo_dali.data.photo_file import TOO_MANY_FILES  # imports Pillow, which ``doctor`` may find broken

    with ExitStack() as opened:
        try:
            for _ in range(NEW_FILES):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise NemoError(TOO_MANY_FILES) from error
            raise


def check_threads(num_threads: int) -> None:
    """Check that the threads of a pipeline with this many workers can be started.

    Raises:
        NemoError: they cannot.
    """
    if not can_start(num_threads + OTHER_THREADS):
        raise NemoError(
            f"The system cannot start the {num_threads} threads of a pipeline. Lower num_threads, or raise "
            "this process's limits on threads and address space (ulimit -u, ulimit -v)."
        )


def check_address_space(num_threads: int) -> None:
    """Check that there is room for a pipeline, and for DALI if it is not loaded yet.

    Raises:
        NemoError: this process cannot map what a pipeline with this many workers maps.
    """
    needed = PIPELINE_SPACE + num_threads * THREAD_SPACE + (0 if "nvidia.dali" in sys.modules else DALI_SPACE)
    if (left := address_space_left()) < needed:
        raise NemoError(
            f"A pipeline of {num_threads} threads maps up to {needed / 2**30:.1f} GiB, and this process may map "
            f"{max(left, 0) / 2**30:.1f} GiB more. Raise its limit (ulimit -v), or lower num_threads."
        )
