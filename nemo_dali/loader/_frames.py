"""From plan rows to what a pipeline needs: memory for the frames, and the tile records that say what goes where."""

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError
from nemo_dali.io.memory import memory_bytes
from nemo_dali.kernels.normalise import recipe_of
from nemo_dali.kernels.plan.layout import complete
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.kernels.reference import normalisation_table
from nemo_dali.kernels.tile import CV2_LETTERBOX, RESAMPLE, TileRecords
from nemo_dali.loader.options import BatchFormat, Resources
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.buffer_pool import BufferPool
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.pipeline.paths import NOTHING, encode_path
from nemo_dali.plan.erasing import Corners, black_squares
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.placement import ResidentTiles

if TYPE_CHECKING:
    import torch

# Beside the batches in flight, the training loop usually holds one and drops another; some hold more.
SPARE_BLOCKS = 8


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A batch to be drawn.

    Attributes:
        image: torch [B, 3, size, size] and mask: torch uint8 [B, size, size], of undefined content until it is drawn.
        paths: of the photo of each cell, from ``encode_path``; none with resident tiles.
        work: dtype ``TILE`` [cells], with resident tiles [B, most cells]; on a GPU a ``DeviceBatch`` either way.
        squares: per cell, float32 [squares, 2], where its photo is black; None without ``erase``.
        stream: on a GPU torch's current stream when the memory was allocated.
        turn: uint8 [cells], how each photo is to be turned; None: none is.
    """

    image: "torch.Tensor"
    mask: "torch.Tensor"
    paths: list[npt.NDArray[np.uint8]]
    work: TileRecords | gpu.DeviceBatch
    squares: list[Corners] | None
    stream: "torch.cuda.Stream | None"
    turn: npt.NDArray[np.uint8] | None


class FrameAllocator:
    """Allocates batches of one shape.

    Args:
        batch_size: the largest batch.
        format: what frames and masks are to look like.
        policy: of the plan rows.
        resources: on which device the memory is, and how many batches are in flight.
        resident: tiles to be shown in place of the photos.
        seed: of the squares that ``erase`` puts on photos.

    Attributes:
        nbytes: of a batch.
        erases: whether batches have squares.
    """

    def __init__(
        self,
        corpus: Corpus,
        format: BatchFormat,
        policy: MosaicPolicy,
        resources: Resources,
        *,
        batch_size: int,
        resident: ResidentTiles | None,
        seed: int,
    ) -> None:
        self._resident, self._seed = resident, seed
        self._most_cells = policy.largest_grid**2
        self._corpus = corpus
        self._format, self.erases = format, format.erase > 0
        self._device_id = device_id = resources.device_id
        table = np.ascontiguousarray(normalisation_table(format.mean, format.std, format.dtype))
        self._itemsize = table.itemsize
        self.nbytes = batch_size * format.size**2 * (3 * table.itemsize + 1)
        needed, memory = self.nbytes * (resources.prefetch + 1), memory_bytes()
        if device_id is None and needed > memory:
            raise NemoError(
                f"{resources.prefetch + 1} batches of {batch_size} samples of {format.size}x{format.size} pixels need "
                f"{needed / 2**30:.1f} GiB of memory, and this machine has {memory / 2**30:.1f}. Lower batch_size, "
                "size or prefetch, or use a smaller dtype."
            )
        self._fit = np.zeros(len(corpus.photo_width), bool)  # photos whose files were looked at
        self._pool = BufferPool(self.nbytes, most=resources.prefetch + SPARE_BLOCKS)
        self._recipe = recipe_of(table, format.mean, format.std, format.dtype)
        self._table: Any = table  # keeps what the address points to
        self._table_address: int = table.ctypes.data
        if device_id is not None:
            import torch

            if resident is None:
                gpu.check_photo_sizes(corpus.photo_width, corpus.photo_height)
            self._table = torch.from_numpy(table.view(np.uint8)).to(gpu.place(device_id))
            self._table_address = self._table.data_ptr()

    def prepare(self, epoch: int, rows: PlanRows) -> PreparedBatch:
        """Allocate a batch for an epoch's plan rows, dtype ``plan.PLAN`` [n], n at most the batch size.

        Raises:
            NemoError: there is no memory left.
        """
        import torch

        block = self._take()
        batch, size = len(rows), self._format.size
        pixels = batch * size**2
        image, mask = block[: 3 * pixels * self._itemsize], block[len(block) - pixels :]
        image = image.view(getattr(torch, self._format.dtype)).view(batch, 3, size, size)
        mask = mask.view(batch, size, size)
        tiles, sample, photo = lay_out(rows, size)
        complete(
            tiles,
            rows["ref"][sample],
            sample,
            photo,
            self._corpus.run_count,
            self._corpus.runs,
            self._corpus.photo_height,
            self._corpus.photo_width,
            image.data_ptr(),
            image[0].nbytes,
            mask.data_ptr(),
            mask[0].nbytes,
        )
        tiles["table"], tiles["recipe"] = self._table_address, self._recipe.ctypes.data
        tiles["itemsize"], tiles["resample"] = self._itemsize, RESAMPLE[self._format.resample]
        if self._format.fit == "letterbox":
            tiles["resample"][rows["grid"][sample] == 1] = CV2_LETTERBOX
            tiles["border"], tiles["soft_mask"] = self._format.border, self._format.mask_dtype == "float32"
        paths, turn = [], None
        if self._resident is not None:
            tiles["photo"] = self._resident.addresses(tiles["y1"] - tiles["y0"], tiles["x1"] - tiles["x0"], photo)
        else:
            paths = [self._path(row) for row in photo.tolist()]
            turn = None if self._corpus.photo_turn is None else self._corpus.photo_turn[photo]
        squares = self._squares(epoch, rows, sample, photo) if self.erases else None
        if self._device_id is not None:
            stream = gpu.current_stream(self._device_id)
            work = gpu.device_batch(tiles, sample, mask, stream, resident=self._resident)
            return PreparedBatch(image, mask, paths, work, squares, stream, turn)
        if self._resident is not None:
            tiles = self._by_sample(tiles, sample, batch)
        return PreparedBatch(image, mask, paths, tiles, squares, None, turn)

    def _squares(
        self, epoch: int, rows: PlanRows, sample: npt.NDArray[np.int64], photo: npt.NDArray[np.int64]
    ) -> list[Corners]:
        """Those of each cell: the target's photo may have some, and a mosaic shows it once."""
        target = rows["images"][np.arange(len(rows)), rows["cell"]]
        found = black_squares(
            rows["position"],
            self._corpus.photo_width[target],
            seed=self._seed,
            epoch=epoch,
            share=self._format.erase,
        )
        return [found[s] if its else found[s][:0] for s, its in zip(sample, photo == target[sample], strict=True)]

    def _path(self, photo: int) -> npt.NDArray[np.uint8]:
        """Of a photo. Its file is looked at when it is used for the first time: a network may take its time for it."""
        path = encode_path(self._corpus.photo_path(photo), looked_at=self._fit[photo])
        self._fit[photo] = path is not NOTHING
        return path

    def look_again(self) -> None:
        """Look at every photo's file when it is used next: something was wrong with one."""
        self._fit[:] = False

    def _by_sample(self, tiles: TileRecords, sample: npt.NDArray[np.int64], batch: int) -> TileRecords:
        """Records [cells] as [B, most cells], behind each sample's cells empty ones."""
        begin = np.searchsorted(sample, np.arange(batch))  # each sample's first cell
        table = np.zeros((batch, self._most_cells), tiles.dtype)
        table[sample, np.arange(len(sample)) - begin[sample]] = tiles
        return table

    def _take(self) -> "torch.Tensor":
        """Memory for the images and then the masks of a batch, uint8 [bytes], of undefined content."""
        import torch

        try:
            if self._device_id is None:
                return torch.from_numpy(self._pool.take())
            return torch.empty(self.nbytes, dtype=torch.uint8, device=gpu.place(self._device_id))
        except (MemoryError, OSError, torch.OutOfMemoryError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            where = "This process's memory" if self._device_id is None else f"GPU {self._device_id}"
            raise NemoError(
                f"{where} has no room for a further batch of {self.nbytes / 2**20:.0f} MiB. Lower batch_size, size or "
                "prefetch, or use a smaller dtype."
            ) from error
