"""The DALI graph: one DALI sample is one cell, so a single costs one read and one decode, a 3x3 nine.

    paths ──▶ io.file.read ──▶ decoders.image ──▶ write_tiles ──▶ status
    tiles ────────────────────────────────────────▲   └─▶ pixels and masks, into the frames that the tiles name

Frames are ordinary memory of the caller's, so DALI never copies a finished batch.
"""

import atexit
import os
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt


def encode_path(path: str) -> npt.NDArray[np.uint8]:
    """A path as ``io.file.read`` takes it: its bytes, uint8 [length]."""
    return np.frombuffer(os.fsencode(path), np.uint8)


class StreamPipeline:
    """Reads, decodes and places photos, several batches ahead.

    ``feed`` at most ``prefetch`` batches, then ``wait`` and ``feed`` in turn. What a batch's tiles point to must stay
    alive until ``wait`` has returned for that batch, or ``drain`` or ``close`` have: ``keep`` holds it.

    Args:
        max_cells: largest number of cells in a batch.
        num_threads: DALI's worker threads.
        prefetch: batches in the making at the same time, >= 1.
    """

    def __init__(self, *, max_cells: int, num_threads: int, prefetch: int) -> None:
        from nvidia.dali import Pipeline, fn, types

        from nemo_dali.operators import write_tiles

        self._prefetch = prefetch
        self.running: deque[Any] = deque()  # what ``feed`` was given as ``keep``, oldest first
        self._started = False
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
        # Registered after DALI's own hook, hence run before it: DALI would shut the graph down under running batches.
        atexit.register(self.close)

    def feed(self, paths: list[npt.NDArray[np.uint8]], tiles: npt.NDArray[Any], keep: Any) -> None:
        """Start a batch.

        Args:
            paths: per cell the photo's path from ``encode_path``.
            tiles: ``kernels.tile.TILE`` [cells].
            keep: holds what the tiles point to; it stays in ``running`` until the batch is done.
        """
        self._pipe.feed_input("paths", paths)
        self._pipe.feed_input("tiles", tiles.view(np.uint8).reshape(len(tiles), -1))
        self.running.append(keep)
        # DALI's first call starts as many batches as it prefetches, so it must wait until all are fed.
        if self._started or len(self.running) == self._prefetch:
            self._pipe.schedule_run()
            self._started = True

    def wait(self) -> npt.NDArray[np.uint8]:
        """Wait for the oldest batch; its status, uint8 [cells].

        Raises:
            RuntimeError: DALI could not read or decode a photo; the other batches are not affected.
        """
        try:
            (status,) = self._pipe.share_outputs()
            codes = np.array(status.as_array()[:, 0])
            self._pipe.release_outputs()
        finally:
            self.running.popleft()
        return codes

    def drain(self) -> None:
        """Wait for all batches and drop them, the failed ones too."""
        if not self._started:
            self.running.clear()
        while self.running:
            with suppress(RuntimeError):
                self.wait()

    def close(self) -> None:
        """Wait for all batches and give up DALI's threads and memory. A second call does nothing."""
        if self._pipe is not None:
            self.drain()
            self._pipe = None
            atexit.unregister(self.close)
