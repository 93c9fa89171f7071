"""Uploads: what the kernels of a batch read, put together in page-locked memory and sent to a GPU in one copy."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemo_dali.kernels import device as kernel_device
from nemo_dali.kernels.device import TO_DEVICE, CopyOnDevice, Launch, padded
from nemo_dali.pipeline import gpu

SPARE = 4  # blocks besides those of the batches in flight and of as many that a busy GPU still has to make
_SMALLEST = 2**16  # bytes of a block


class _Block:
    """Page-locked memory, as much on the device, and the event after the last work that read either."""

    def __init__(self, here: Any, there: Any) -> None:
        self._owners = (here, there)
        self.memory = here.numpy()
        self.here, self.there, self.nbytes = here.data_ptr(), there.data_ptr(), here.numel()
        self.done = gpu.event()


class Uploads:
    """Sends arrays to a GPU, and launches what reads them.

    Page-locked memory is allocated with the first batch, for all blocks at once: the driver may wait for the GPU then.
    A block is reused once the GPU is done with it. If none is free, because the host runs far ahead, one more block is
    added for good.

    Args:
        device: CUDA device number.
        prefetch: batches in flight.
    """

    def __init__(self, device: int, *, prefetch: int) -> None:
        self.device = device
        self._count = 2 * prefetch + SPARE
        self._blocks: deque[_Block] = deque()  # in the order in which they were used

    def queue(self, launches: Sequence[Launch | CopyOnDevice], stream: int) -> None:
        """Send the arrays of some launches in one copy, and queue the launches in turn.

        Args:
            stream: address of the CUDA stream, the same every time.
        """
        arrays = [array for launch in launches for array in launch.arrays]
        begins, nbytes = [], 0
        for array in arrays:
            begins.append(nbytes)
            nbytes += padded(array.nbytes)
        with kernel_device.on(self.device):  # else CUDA would initialise another device, which takes memory there
            block = self._take(nbytes, stream)
            for array, begin in zip(arrays, begins, strict=True):
                block.memory[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
            try:
                kernel_device.copy(block.there, block.here, nbytes, TO_DEVICE, stream=stream)
                first = 0
                for launch in launches:
                    end = first + len(launch.arrays)
                    addresses = [block.there + begin for begin in begins[first:end]]
                    launch.queue(addresses, device=self.device, stream=stream)
                    first = end
            finally:
                block.done.record(kernel_device.torch_stream(self.device, stream))

    def _take(self, nbytes: int, stream: int) -> _Block:
        """A block of at least ``nbytes`` that nothing reads any more; it becomes the newest."""
        if not self._blocks:
            # Twice what this batch needs: others need more.
            self._blocks.extend(self._new(2 * nbytes, self._count, stream))
        least = self._blocks[-1].nbytes
        block = self._blocks.popleft() if self._blocks[0].done.query() else None
        if block is None or block.nbytes < nbytes:
            block = self._new(max(nbytes, least), 1, stream)[0]
        self._blocks.append(block)
        return block

    def _new(self, nbytes: int, count: int, stream: int) -> list[_Block]:
        size = max(1 << (nbytes - 1).bit_length(), _SMALLEST)
        here, there = gpu.page_locked(count * size), gpu.memory_for(count * size, self.device, stream)
        return [
            _Block(here[begin : begin + size], there[begin : begin + size]) for begin in range(0, here.numel(), size)
        ]
