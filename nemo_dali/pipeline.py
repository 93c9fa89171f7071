"""The DALI graph: one DALI sample is one cell, so a single costs one read and one decode, a 3x3 nine.

    paths ──▶ io.file.read ──▶ decoders.image ──▶ write_tiles ──▶ status
    tiles ────────────────────────────────────────▲   └─▶ pixels and masks, into the frames that the tiles name

Frames are ordinary memory of the caller's, so DALI never copies a finished batch.
"""

import atexit
import ctypes
import os
import resource
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError

OTHER_FILES = 256  # open files that a training process has besides photos: libraries, sockets, logs


def encode_path(path: str) -> npt.NDArray[np.uint8]:
    """A path as ``io.file.read`` takes it: its bytes, uint8 [length]."""
    return np.frombuffer(os.fsencode(path), np.uint8)


class StreamPipeline:
    """Reads, decodes and places photos, several batches ahead.

    ``feed`` ``prefetch`` batches, then ``wait`` and ``feed`` in turn. After an exception from ``feed`` or ``wait`` that
    is not a RuntimeError of ``wait`` the only thing left to do is ``close``: what DALI took cannot be taken back.

    Args:
        max_cells: largest number of cells in a batch.
        num_threads: DALI's worker threads.
        prefetch: batches in the making at the same time, >= 1.

    Raises:
        NemoError: the system does not let a process open as many files as a batch has cells.
    """

    def __init__(self, *, max_cells: int, num_threads: int, prefetch: int) -> None:
        from nvidia.dali import Pipeline, fn, types

        from nemo_dali.operators import write_tiles

        _allow_open_files(max_cells + OTHER_FILES)
        self._prefetch = prefetch
        self.running: deque[Any] = deque()  # what ``feed`` was given as ``keep``, oldest first
        self._owed = 0  # batches that DALI has started and that were not taken from it yet
        self._process = os.getpid()
        pipe = Pipeline(
            batch_size=max_cells, num_threads=num_threads, device_id=None, prefetch_queue_depth=prefetch, seed=0
        )
        with pipe:
            paths = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
            tiles = fn.external_source(name="tiles", ndim=1, dtype=types.UINT8)
            # Without mmap: a file cut short under a mapping would end the process.
            encoded = fn.io.file.read(paths, dont_use_mmap=True)
            # Masks are of the photo as stored, so its EXIF rotation must not be applied.
            photos = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
            pipe.set_outputs(write_tiles(tiles, photos))
        pipe.build()
        self._pipe: Any = pipe
        self._started = False
        # Registered after DALI's own hook, hence run before it: DALI would shut the graph down under running batches.
        atexit.register(self.close)

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that made the pipeline; then only ``close`` works."""
        return os.getpid() != self._process

    def feed(self, paths: list[npt.NDArray[np.uint8]], tiles: npt.NDArray[Any], keep: Any) -> None:
        """Start a batch.

        Args:
            paths: per cell the photo's path from ``encode_path``.
            tiles: ``kernels.tile.TILE`` [cells].
            keep: holds what the tiles point to; it stays in ``running`` until the batch is done.
        """
        self.running.append(keep)  # before DALI learns the addresses
        self._pipe.feed_input("paths", paths)
        self._pipe.feed_input("tiles", tiles.view(np.uint8).reshape(len(tiles), -1))
        if self._started:
            self._pipe.schedule_run()
            self._owed += 1
        elif len(self.running) == self._prefetch:  # DALI's first call starts as many batches as it prefetches
            self._pipe.schedule_run()
            self._started, self._owed = True, self._prefetch

    def wait(self) -> npt.NDArray[np.uint8]:
        """Wait for the oldest batch; its status, uint8 [cells].

        Raises:
            RuntimeError: DALI could not read or decode a photo; the other batches are not affected.
        """
        self._owed -= 1
        try:
            (status,) = self._pipe.share_outputs()
            codes = np.array(status.as_array()[:, 0])
            self._pipe.release_outputs()
        finally:
            self.running.popleft()
        return codes

    def drain(self) -> None:
        """Wait for all batches and drop them, the failed ones too."""
        while self._owed:
            with suppress(RuntimeError):
                self.wait()

    def close(self) -> None:
        """Wait for all batches and give up DALI's threads and memory. A second call does nothing."""
        if self._pipe is None:
            return
        if self.inherited:
            # The threads stayed in the parent, and to shut the graph down would wait for them for ever: nobody may do
            # that here, neither its destructor nor DALI's own hook at the end of the process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pipe._pipe))
            self._pipe._pipe = None
        else:
            self.drain()
        self._pipe = None
        self.running.clear()  # only now: the graph is gone, or will never run here
        atexit.unregister(self.close)


def _allow_open_files(count: int) -> None:
    """``io.file.read`` opens all photos of a batch at once: raise the soft limit if need be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise NemoError(
                f"A batch opens up to {count - OTHER_FILES} photos at once, but this process may open {hard} files. "
                f"Raise the limit to {count} (ulimit -n), or lower batch_size."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
