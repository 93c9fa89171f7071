"""DALI's graphs that make batches on a GPU.

Photos are decoded there; the kernels are launched once per batch, from a Python function on DALI's thread, on DALI's
stream:

    paths ──▶ io.file.read ──▶ headers ──▶ decoders.image (mixed) ──▶ DeviceBatch.write ──▶ an empty tensor a cell
"""

from collections import deque
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali.data.decoding import DECODING
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.device_batch import DeviceBatch
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.uploads import Uploads

T = TypeVar("T")


class CudaPipeline(StreamPipeline[T]):
    """Batches made on a GPU, where frames and masks are torch tensors; ``work`` is a ``DeviceBatch``.

    ``wait`` does not wait for the GPU: it makes torch's current stream wait for the batch. After a RuntimeError from
    ``wait`` the pipeline is ``broken`` and can only be closed.

    Args:
        device_id: CUDA device number.
        options: as on the CPU.
    """

    def __init__(self, *, device_id: int, prefetch: int, **options: Any) -> None:
        self._device = device_id
        self._uploads = Uploads(device_id, prefetch=prefetch)
        # One more than there are batches in flight: each is waited for before it is recorded again.
        self._events = deque(gpu.event() for _ in range(prefetch + 1))
        self._to_write: deque[DeviceBatch] = deque()  # fed, and not decoded yet
        self._to_deliver: deque[DeviceBatch] = deque()  # fed, and not waited for yet
        super().__init__(device_id=device_id, prefetch=prefetch, **options)

    def _next_batch(self, photos: list[Any], stream: int) -> None:
        # Batches come in the order they were fed in. One that DALI could not decode does not come here, and the next
        # takes its place in the queue: its frames are kept until the pipeline is closed, so nothing that anybody else
        # has is overwritten, and nobody sees them.
        self._to_write.popleft().write(photos, self._uploads, stream)

    def _feed(self, work: Any) -> None:
        work.ready = self._events[0]
        self._events.rotate(-1)
        work.ready.record(work.stream)
        self._to_write.append(work)
        self._to_deliver.append(work)

    def _photo_sizes(self, work: Any) -> npt.NDArray[np.int32] | None:
        return super()._photo_sizes(work.tiles)

    def wait(self) -> npt.NDArray[np.uint8]:
        stream = gpu.current_stream(self._device)

        def share() -> Any:
            with gpu.on(self._device):  # a stream without a handle of its own is the current device's
                return self._pipe.share_outputs(cuda_stream=stream)

        with self._use:
            try:
                self._outputs(share)
                self._pipe.release_outputs()
            except RuntimeError:
                self.broken = True
                raise
            self._running.popleft()
            return self._to_deliver.popleft().status

    def drain(self) -> None:
        """Wait for the GPU too: only then is the memory of the batches released."""
        kept = list(self._running)
        super().drain()
        if kept:
            with suppress(RuntimeError, MemoryError):  # after a CUDA error nothing runs there any more
                gpu.synchronize(self._device)

    def _end(self) -> None:
        self.drain()
        with suppress(RuntimeError, MemoryError):
            gpu.synchronize(self._device)  # batches that were delivered may still be in progress
        super()._end()

    def _abandon(self) -> None:
        gpu.leave_to_parent(self._uploads, self._events)
        super()._abandon()


class CudaStreamPipeline(CudaPipeline[T]):
    """The stream path on a GPU: photos are decoded there.

    Args:
        hw_decoder_load: share of the JPEGs for the hardware decoder, 0 to 1.
        options: as in ``CudaPipeline``.
    """

    def __init__(self, *, hw_decoder_load: float, **options: Any) -> None:
        self._hw_decoder_load = hw_decoder_load
        super().__init__(**options)

    def _write(self, encoded: Any) -> Any:
        from nemo_dali.pipeline.operators import call_on_stream

        return call_on_stream(self._next_batch, self._photos(encoded), device_id=self._device)

    def _decode(self, encoded: Any) -> Any:
        from nvidia.dali import fn

        return fn.decoders.image(
            encoded,
            device="mixed",
            hw_decoder_load=self._hw_decoder_load,
            jpeg_fancy_upsampling=True,  # as libjpeg does it; nvJPEG's own way differs more
            **DECODING,
        )


class CudaResidentPipeline(CudaPipeline[T]):
    """Samples from resident tiles that a GPU reads; one DALI sample is one step, so ``max_cells`` is 1."""

    def _graph(self) -> Any:
        from nemo_dali.pipeline.operators import call_on_stream

        return call_on_stream(self._next_batch, device_id=self._device)
