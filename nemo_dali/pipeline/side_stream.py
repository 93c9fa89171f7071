"""SideStreamPipeline: batches from resident tiles that the training thread queues on a GPU itself, without DALI.

training thread's current stream   frames allocated ── ready ─────────────┐              ┌── who asked for the batch
side stream                        a packed copy, gather, masks, text ──▶ behind it ── done

Nothing is decoded, so DALI would only hand the work to a thread of its own, which costs the host more than the work.
"""

from collections import deque
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.batches import BatchPipeline
from nemo_dali.pipeline.device_batch import DeviceBatch
from nemo_dali.pipeline.uploads import Uploads
from nemo_dali.plan.erasing import Corners

T = TypeVar("T")


class SideStreamPipeline(BatchPipeline[T]):
    """Samples from resident tiles that a GPU reads; ``work`` is a ``DeviceBatch``.

    ``wait`` does not wait for the GPU: it makes torch's current stream wait for the batch. After a RuntimeError from
    ``wait`` the pipeline is ``broken`` and can only be closed.

    Args:
        device_id: CUDA device number.
        prefetch: batches in flight at the same time, >= 1.
    """

    def __init__(self, *, device_id: int, prefetch: int) -> None:
        super().__init__(prefetch=prefetch)
        self._device = device_id
        self._side = gpu.side_stream(device_id)
        self._uploads = Uploads(device_id, prefetch=prefetch)
        self._ready = gpu.event()
        # One more than there are batches in flight: each is waited for before it is recorded again.
        self._events = deque(gpu.event() for _ in range(prefetch + 1))
        self._queued: deque[tuple[DeviceBatch, Any, Exception | None]] = deque()  # with event, or what went wrong
        self._register()

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
            self._running.append(keep)  # before the GPU learns the addresses
            done, problem = self._events[0], None
            self._events.rotate(-1)
            work.ready = self._ready
            try:
                self._ready.record(work.stream)
                work.write([], self._uploads, self._side.cuda_stream)
                done.record(self._side)
            except Exception as error:  # reported with this batch, as DALI reports errors on its thread
                problem = error
            except BaseException:
                self.broken = True
                raise
            self._queued.append((work, done, problem))

    def wait(self) -> npt.NDArray[np.uint8]:
        with self._use:
            work, done, problem = self._queued[0]
            try:
                if problem is not None:
                    raise RuntimeError(f"{type(problem).__name__}: {problem}") from problem
                gpu.current_stream(self._device).wait_event(done)
            except RuntimeError:
                self.broken = True
                raise
            self._queued.popleft()
            self._running.popleft()
            return work.status

    def drain(self) -> None:
        """Wait for the GPU: only then is the memory of the batches released."""
        with self._use:
            if self._running:
                with suppress(RuntimeError, MemoryError):  # after a CUDA error nothing runs there any more
                    gpu.synchronize(self._device)
            self._queued.clear()
            self._running.clear()

    def _end(self) -> None:
        self.drain()
        with suppress(RuntimeError, MemoryError):
            self._side.synchronize()  # the GPU may still be reading blocks of delivered batches

    def _abandon(self) -> None:
        gpu.leave_to_parent(self._uploads, self._events, self._ready, self._side)
