"""Frames: memory for batches of images and masks, and how their pixels are normalised."""

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_dali.errors import NemoError
from nemo_dali.io.memory import memory_bytes
from nemo_dali.kernels.normalise import recipe_of
from nemo_dali.kernels.reference import normalisation_table
from nemo_dali.kernels.tile import RESAMPLE
from nemo_dali.loader.options import LoaderOptions
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.buffer_pool import BufferPool

if TYPE_CHECKING:
    import torch

# Besides the batches in flight, the training loop usually holds one and drops another; some hold more.
SPARE_BLOCKS = 8


class Frames:
    """Allocates frames and masks of one size.

    Attributes:
        image_bytes, mask_bytes: of a sample.
        description: of the frames, as ``kernels.tile.tile_records`` takes it; valid while this object lives.

    Raises:
        NemoError: the batches in flight need more memory than the machine has.
    """

    def __init__(self, options: LoaderOptions) -> None:
        format, prefetch = options.format, options.resources.prefetch
        self._size, self._dtype = format.size, format.dtype
        self._device_id = options.resources.device_id
        table = np.ascontiguousarray(normalisation_table(format.mean, format.std, format.dtype))
        self.mask_bytes = format.size**2
        self.image_bytes = 3 * self.mask_bytes * table.itemsize
        self._images = options.batch_size * self.image_bytes  # of a batch
        self._nbytes = -(-(self._images + options.batch_size * self.mask_bytes) // 16) * 16  # of whole values
        needed, memory = self._nbytes * (prefetch + 1), memory_bytes()
        if self._device_id is None and needed > memory:
            raise NemoError(
                f"{prefetch + 1} batches of {options.batch_size} samples of {format.size}x{format.size} pixels need "
                f"{needed / 2**30:.1f} GiB of memory, and this machine has {memory / 2**30:.1f}. Lower batch_size, "
                "size or prefetch, or use a smaller dtype."
            )
        self._pool = BufferPool(self._nbytes, most=prefetch + SPARE_BLOCKS)
        self._recipe = recipe_of(table, format.mean, format.std, format.dtype)
        self._table: Any = table
        address = table.ctypes.data
        if self._device_id is not None:
            import torch

            self._table = torch.from_numpy(table.view(np.uint8)).to(gpu.place(self._device_id))
            address = self._table.data_ptr()
        self.description: dict[str, int] = {
            "table": address,
            "recipe": self._recipe.ctypes.data,
            "itemsize": table.itemsize,
            "resample": RESAMPLE[format.resample],
        }

    def take(self, count: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """Images [count, 3, size, size] and masks, uint8 [count, size, size], of undefined content.

        Raises:
            NemoError: there is no memory left.
        """
        import torch

        block, size = self._block(), self._size
        area = size * size
        values = block.view(getattr(torch, self._dtype))
        return (
            # With .data, else autograd takes a change to one for a change to the other.
            values.as_strided((count, 3, size, size), (3 * area, area, size, 1)).data,
            block.as_strided((count, size, size), (area, size, 1), self._images).data,
        )

    def _block(self) -> "torch.Tensor":
        """Memory for the images and then the masks of a batch, uint8 [bytes]."""
        import torch

        try:
            if self._device_id is None:
                return torch.from_numpy(self._pool.take())
            return torch.empty(self._nbytes, dtype=torch.uint8, device=gpu.place(self._device_id))
        except (MemoryError, OSError, torch.OutOfMemoryError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            where = "This process's memory" if self._device_id is None else f"GPU {self._device_id}"
            raise NemoError(
                f"{where} has no room for another batch of {self._nbytes / 2**20:.0f} MiB. Lower batch_size, size or "
                "prefetch, or use a smaller dtype."
            ) from error
