"""The DALI graph on the CPU: one DALI sample is one cell, so a single costs one read and one decode, a 3x3 nine.

    paths ──▶ io.file.read ──▶ headers ──▶ decoders.image ──▶ write_tiles ──▶ status
    sizes ──────────────────────▲                              ▲   └─▶ pixels and masks, into the frames that the
    tiles ─────────────────────────────────────────────────────┘       tiles name

Photos that EXIF says to turn are turned right after the decoder, and ``erase`` puts black squares on those that are to
have some. Frames are ordinary memory of the caller's, so DALI never copies a finished batch. ``graphs_gpu`` has the
graphs that a GPU runs.
"""

import atexit
import ctypes
import os
import re
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali.data.decoding import DECODING, of_size
from nemo_dali.data.orientation import TURNS, turned_sizes
from nemo_dali.data.s3 import Waiting, abandon, is_remote, scrubbed
from nemo_dali.errors import NemoError
from nemo_dali.pipeline.batches import BatchPipeline
from nemo_dali.pipeline.limits import allow_open_files, check_address_space, check_open_files, check_threads
from nemo_dali.plan.erasing import SIDE, Corners

MEMORY = re.compile("out of memory|bad_alloc|MemoryAllocation|Resource temporarily unavailable", re.IGNORECASE)
LONGEST_WAIT = 300  # seconds for a batch from object storage
LONGEST_DRAIN = 30  # seconds for one that nobody wants any more

T = TypeVar("T")

_NOTHING = nullcontext()
_left_behind: list[Any] = []  # pipelines that wait for a server, and what they will write into


def _no_check(_: Any) -> Any:
    """Replaces DALI's check around each call: only ``StreamPipeline`` makes calls, in the right order."""
    return _NOTHING


class StreamPipeline(BatchPipeline[T]):
    """Reads, decodes and places photos, several batches ahead; T is what the caller keeps for each.

    Args:
        max_cells: largest number of cells in a batch.
        num_threads: DALI's worker threads.
        prefetch: batches in flight at the same time, >= 1.
        device_id: of the GPU that DALI is to use, if any.
        turns: turn photos; ``feed`` then says how.
        erase: put black squares on the photos; ``feed`` then says where.

    Raises:
        NemoError: the system does not let the process open as many files as a batch has cells, start the threads or map
            the memory, or has no files, memory or threads left now.
    """

    def __init__(
        self,
        *,
        max_cells: int,
        num_threads: int,
        prefetch: int,
        device_id: int | None = None,
        turns: bool = False,
        erase: bool = False,
    ) -> None:
        check_address_space(num_threads)
        from nvidia.dali import Pipeline

        allow_open_files(max_cells)
        check_threads(num_threads)
        super().__init__(prefetch=prefetch)
        self._turns, self._erase = turns, erase
        self._owed = 0  # batches that DALI has started and that have not been taken from it yet
        self._addresses: deque[list[str]] = deque()  # of the photos in object storage, for each of these batches
        self._waiting: Waiting[Any] | None = None  # for the oldest of them, if it has any
        self._draining = False
        pipe = Pipeline(
            batch_size=max_cells,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=prefetch,
            seed=0,
        )
        with pipe:
            pipe.set_outputs(self._graph())
        try:
            pipe.build()
        except RuntimeError as error:
            check_open_files()
            if MEMORY.search(str(error)):
                raise NemoError(
                    "There is no memory or thread left for a DALI pipeline. Lower batch_size, num_threads or prefetch."
                ) from error
            raise
        pipe._check_api_type_scope = _no_check  # DALI's own makes a class on every call: 60 us a batch
        self._pipe: Any = pipe
        self._started = False
        # Registered after DALI's own hook, hence run before it: DALI would shut the graph down under running batches.
        self._register()

    def _graph(self) -> Any:
        from nvidia.dali import fn, types

        paths = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
        sizes = fn.external_source(name="sizes", ndim=1, dtype=types.INT32)
        # Without mmap: a file cut short while mapped would end the process.
        encoded = fn.io.file.read(paths, dont_use_mmap=True)
        return self._write(of_size(encoded, sizes))

    def _write(self, encoded: Any) -> Any:
        """The rest of the graph, from the files' bytes on."""
        from nvidia.dali import fn, types

        from nemo_dali.pipeline.operators import write_tiles

        tiles = fn.external_source(name="tiles", ndim=1, dtype=types.UINT8)
        return write_tiles(tiles, self._photos(encoded))

    def _photos(self, encoded: Any) -> Any:
        """The photos as they are shown, with their squares."""
        from nvidia.dali import fn, types

        from nemo_dali.pipeline.operators import turned

        photos = self._decode(encoded)
        if self._turns:
            photos = turned(photos, fn.external_source(name="turns", ndim=1, dtype=types.INT32))
        if not self._erase:
            return photos
        corners = fn.external_source(name="squares", ndim=1, dtype=types.FLOAT)
        return fn.erase(photos, anchor=corners, shape=corners * 0 + float(SIDE), axes=(0, 1))

    def _decode(self, encoded: Any) -> Any:
        from nvidia.dali import fn

        return fn.decoders.image(encoded, **DECODING)

    def feed(
        self,
        paths: list[npt.NDArray[np.uint8]],
        work: Any,
        keep: T,
        *,
        turn: npt.NDArray[np.uint8] | None = None,
        squares: list[Corners] | None = None,
    ) -> None:
        with self._use:
            self._running.append(keep)  # before DALI learns the addresses
            self._addresses.append([at for path in paths if is_remote(at := os.fsdecode(path.tobytes()))])
            if paths:
                self._pipe.feed_input("paths", paths)
                if (sizes := self._photo_sizes(work)) is not None:
                    self._pipe.feed_input("sizes", sizes if turn is None else turned_sizes(sizes, turn))
                if turn is not None:
                    self._pipe.feed_input("turns", TURNS[turn])
            if squares is not None:
                self._pipe.feed_input("squares", [corners.ravel() for corners in squares])
            self._feed(work)
            if self._started:
                self._pipe.schedule_run()
                self._owed += 1
            elif len(self._running) == self._prefetch:  # DALI's first call starts as many batches as it prefetches
                self._pipe.schedule_run()
                self._started, self._owed = True, self._prefetch

    def _feed(self, work: Any) -> None:
        self._pipe.feed_input("tiles", work.view(np.uint8).reshape(len(work), -1))

    def _photo_sizes(self, work: Any) -> npt.NDArray[np.int32] | None:
        """Height and width of each photo as annotated, int32 [cells, 2], from the first of its tiles."""
        tiles = work.reshape(-1, work.shape[-1])[0]
        return np.stack([tiles["photo_height"], tiles["photo_width"]], axis=1)

    def wait(self) -> Any:
        """Wait for the oldest batch; returns its status, uint8 [cells].

        Raises:
            RuntimeError: DALI could not read or decode a photo, or its header gives a different size; the other batches
                are not affected.
            NemoError: object storage did not send the photos within ``LONGEST_WAIT``; the pipeline is closed.
        """
        with self._use:
            try:
                result = self._result(self._outputs(self._pipe.share_outputs))
                self._pipe.release_outputs()
            finally:
                self._running.popleft()
            return result

    def _result(self, outputs: Any) -> Any:
        """What ``wait`` returns, from the graph's outputs, whose memory is DALI's."""
        (status,) = outputs
        return np.array(status.as_array()[:, 0])

    def _outputs(self, share: Callable[[], Any]) -> Any:
        """The result of ``share``, which takes the oldest batch from DALI. Object storage has a time limit."""
        self._owed -= 1
        addresses = self._addresses.popleft()
        if not addresses:
            return share()
        self._waiting = self._waiting or Waiting(share)
        seconds = LONGEST_DRAIN if self._draining else LONGEST_WAIT
        try:
            ended = self._waiting.ends_within(seconds)
        except BaseException:  # an interrupt: the batch is still to come
            self._owed += 1
            self._addresses.appendleft(addresses)
            self._running.appendleft(self._running[0])
            raise
        if not ended:
            self._leave_behind()
            raise NemoError(
                f"Object storage did not send {len(addresses)} photos of a batch within {seconds} s, {addresses[0]} "
                "among them. Check the server and the network, lower batch_size, or use a local copy of the photos."
            )
        waiting, self._waiting = self._waiting, None
        try:
            return waiting.result()
        except RuntimeError as error:
            raise RuntimeError(scrubbed(str(error))) from None

    def _leave_behind(self) -> None:
        _left_behind.append((self, list(self._running), self.holds))
        abandon(self._pipe)
        self._pipe, self._owed, self.broken, self._closed = None, 0, True, True
        atexit.unregister(self._close_at_exit)

    def drain(self) -> None:
        """Wait for all batches and drop them, the failed ones too."""
        self._draining = True
        owed = None
        while self._owed and self._owed != owed:  # unchanged: torch failed before DALI was asked, and will again
            owed = self._owed
            with suppress(RuntimeError, MemoryError, NemoError):  # DALI turns std::bad_alloc into a MemoryError
                self.wait()
        self._draining = False

    def _abandon(self) -> None:
        # The threads stayed in the parent, and shutting the graph down would wait for them for ever: nothing must do
        # that here, neither its destructor nor DALI's own hook at the end of the process.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pipe._pipe))
        self._pipe._pipe = None
        self._pipe = None

    def _end(self) -> None:
        self.drain()
        if self._pipe is not None:  # else it was left behind
            self._pipe._shutdown()  # here, and not in its destructor, where Python drops an interrupt
            self._pipe = None


class ResidentPipeline(StreamPipeline[T]):
    """Samples from photos resampled beforehand; one DALI sample is one sample, so ``max_cells`` counts samples.

        samples ──▶ gather ──▶ status

    ``feed`` takes as work ``kernels.tile.TILE`` [B, cells], each sample's cells followed by empty records.
    """

    def _graph(self) -> Any:
        from nvidia.dali import fn, types

        from nemo_dali.pipeline.operators import gather

        return gather(fn.external_source(name="tiles", ndim=2, dtype=types.UINT8))

    def _feed(self, work: Any) -> None:
        self._pipe.feed_input("tiles", work.view(np.uint8).reshape(*work.shape, -1))
