"""BatchPipeline: what every pipeline has, whatever makes the batches: those in flight, and a safe way to close."""

import _thread
import atexit
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali.plan.erasing import Corners

T = TypeVar("T")

_thread_is = threading.local()


def mark_as_dalis() -> None:
    """Mark the current thread as one of DALI's. Garbage collection there may find a forgotten pipeline, and closing
    that waits for its threads; so another thread closes it.
    """
    _thread_is.dalis = True


class BatchPipeline(ABC, Generic[T]):
    """Makes batches, several of them ahead; T is what the caller keeps for each.

    ``feed`` ``prefetch`` batches, then ``wait`` and ``feed`` in turn. After an exception from ``feed`` or ``wait`` that
    is not a RuntimeError from ``wait``, the only thing left to do is ``close``: what was taken cannot be taken back.

    Args:
        prefetch: batches in flight at the same time, >= 1.
    """

    broken = False  # whether it can only be closed
    holds: Any = None  # what owns the memory that batches in flight read, kept until the pipeline is closed

    def __init__(self, *, prefetch: int) -> None:
        self._prefetch = prefetch
        self._running: deque[T] = deque()  # what ``feed`` was given as ``keep``, oldest first
        self._process = os.getpid()
        self._use = threading.RLock()  # held by whoever uses the pipeline
        self._closed = False

    def _register(self) -> None:
        """Call once all is made: closes it when the process ends, before whatever was made by then is torn down."""
        atexit.register(self._close_at_exit)

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that made the pipeline; then only ``close`` works."""
        return os.getpid() != self._process

    @property
    def in_flight(self) -> int:
        """Batches that were fed and not waited for."""
        return len(self._running)

    @property
    def oldest(self) -> T:
        """What was kept for the batch that ``wait`` waits for; there must be one."""
        return self._running[0]

    @property
    def newest(self) -> T:
        """What was kept for the batch that was fed last; there must be one."""
        return self._running[-1]

    @abstractmethod
    def feed(
        self,
        paths: list[npt.NDArray[np.uint8]],
        work: Any,
        keep: T,
        *,
        turn: npt.NDArray[np.uint8] | None = None,
        squares: list[Corners] | None = None,
    ) -> None:
        """Start a batch.

        Args:
            paths: per cell the photo's path from ``encode_path``; none where tiles are resident.
            work: ``kernels.tile.TILE`` [cells]; on a GPU a ``DeviceBatch``.
            keep: holds what the tiles point to; it is kept until the batch is done.
            squares: per cell their corners on the photo, float32 [squares, 2], y and x; with ``erase`` only.
            turn: uint8 [cells], how each photo as stored is to be turned, as EXIF numbers it; only with ``turns``.
        """

    @abstractmethod
    def wait(self) -> Any:
        """Wait for the oldest batch; returns its status, uint8 [cells].

        Raises:
            RuntimeError: the batch could not be made.
        """

    @abstractmethod
    def drain(self) -> None:
        """Wait for all batches and drop them, the failed ones too."""

    def _close_at_exit(self) -> None:
        if not self.inherited:
            self._use.acquire()  # never released: a daemon thread in mid-pass waits at its next step, and ends there
        self.close()

    def close(self) -> None:
        """Wait for all batches and release threads and memory. A second call does nothing."""
        if self.inherited:
            if not self._closed:
                self._abandon()
        elif getattr(_thread_is, "dalis", False):
            _thread.start_new_thread(self.close, ())
            return
        else:
            with self._use:
                if not self._closed:
                    self._end()
        self._closed = True
        self._running.clear()  # only now: what writes there is gone, or will never run here
        self.holds = None
        atexit.unregister(self._close_at_exit)

    @abstractmethod
    def _end(self) -> None:
        """Drain, and release threads and memory."""

    @abstractmethod
    def _abandon(self) -> None:
        """In a fork: let nothing release what is the parent's."""
