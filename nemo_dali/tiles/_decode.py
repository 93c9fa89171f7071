"""Decoding photos into tiles, with the stream path's own kernels.

on the CPU    paths ──▶ io.file.read ──▶ decoders.image ─┬─▶ write_tiles ──▶ /tiles/480x480, mapped
                                                         └─▶ write_tiles ──▶ /tiles/240x240, mapped
on a GPU      paths ──▶ io.file.read ──▶ decoders.image (mixed) ──▶ mosaic kernel ──▶ page-locked memory ──▶ both
"""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.kernels.tile import RESAMPLE, TileRecords, tile_records
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.device_batch import place_photos
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.graphs_gpu import CudaStreamPipeline
from nemo_dali.pipeline.overlap import Fed, in_flight
from nemo_dali.pipeline.paths import encode_path
from nemo_dali.pipeline.uploads import Uploads
from nemo_dali.tiles.file import U8, Shape

if TYPE_CHECKING:
    import torch

BATCH = 16  # photos decoded at a time, at least


def decode_tiles(
    dataset: Dataset,
    resample: str,
    arrays: Mapping[Shape, U8],
    rows: list[int],
    *,
    num_threads: int,
    device_id: int | None,
) -> Generator[list[int], None, None]:
    """Decode photos and write their tiles.

    Args:
        resample: one of RESAMPLE.
        arrays: uint8 [photos, 3, h, w] by (h, w), to be written into.
        rows: of the photos.
        num_threads: DALI's.
        device_id: of the GPU that decodes and resamples; None: the CPU does.

    Yields:
        The rows of each batch when it is done.

    Raises:
        PhotoError: a photo is missing, cannot be decoded or has changed.
    """
    from nemo_dali.kernels.mosaic.cpu import DONE

    if not rows:
        return
    count = max(BATCH, 4 * num_threads)
    batches = [rows[i : i + count] for i in range(0, len(rows), count)]
    prefetch = min(2, len(batches))
    if device_id is not None:
        gpu.check_photo_sizes(dataset.images.width, dataset.images.height)
    work = _HostWork(arrays, count) if device_id is None else _DeviceWork(arrays, device_id)
    turns = bool((dataset.turn > 1).any())
    pipeline = work.pipeline(max_cells=count, num_threads=num_threads, prefetch=prefetch, turns=turns)

    def fed(batch: list[int]) -> Fed[tuple[list[int], Any]]:
        tiles = np.stack([tile_records(len(batch), *shape, resample=RESAMPLE[resample]) for shape in arrays])
        tiles["photo_height"], tiles["photo_width"] = dataset.images.height[batch], dataset.images.width[batch]
        made = work.make(tiles, batch)
        paths = [encode_path(dataset.photo_path(row)) for row in batch]
        return Fed(paths, made, (batch, made), dataset.turn[batch] if turns else None)

    def land(kept: tuple[list[int], Any], status: U8) -> None:
        batch, made = kept
        if (status != DONE).any():
            raise dataset.batch_error(batch, None)
        work.land(made, batch)

    with closing(pipeline):
        for (batch, _), _ in in_flight(
            pipeline,
            map(fed, batches),
            prefetch=prefetch,
            land=land,
            failed=lambda kept, error: dataset.batch_error(kept[0], error),
        ):
            yield batch


class _TilePipeline(StreamPipeline[Any]):
    """Decodes each photo once and writes it in several sizes. ``work`` is ``TILE`` [sizes, photos]."""

    def __init__(self, sizes: int, **options: Any) -> None:
        self._sizes = sizes
        super().__init__(**options)

    def _write(self, encoded: Any) -> Any:
        from nvidia.dali import fn, types

        from nemo_dali.pipeline.operators import write_tiles

        photos = self._photos(encoded)
        sources = [fn.external_source(name=f"tiles{i}", ndim=1, dtype=types.UINT8) for i in range(self._sizes)]
        # All sizes give the same status: a photo has the size that it should have, or not.
        return fn.cat(*[write_tiles(tiles, photos) for tiles in sources], axis=0)

    def _feed(self, work: Any) -> None:
        for i, tiles in enumerate(work):
            self._pipe.feed_input(f"tiles{i}", tiles.view(np.uint8).reshape(len(tiles), -1))


class _HostWork:
    """Batches whose tiles DALI's threads write straight into place."""

    def __init__(self, arrays: Mapping[Shape, U8], count: int) -> None:
        self._arrays = arrays
        self._table = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
        # The kernel also writes masks, which nobody reads; one per photo, so that cores do not contend for memory.
        self._masks = np.empty((count, max(h * w for h, w in arrays)), np.uint8)

    def pipeline(self, **options: Any) -> StreamPipeline[Any]:
        return _TilePipeline(len(self._arrays), **options)

    def make(self, tiles: TileRecords, batch: list[int]) -> TileRecords:
        for of_shape, array in zip(tiles, self._arrays.values(), strict=True):
            of_shape["image"] = [array.ctypes.data + row * array[0].nbytes for row in batch]
        tiles["mask"] = [self._masks[i].ctypes.data for i in range(len(batch))]
        tiles["table"] = self._table.ctypes.data
        return tiles

    def land(self, made: Any, batch: list[int]) -> None:
        pass  # they are there already


@dataclass(eq=False)
class _DeviceTiles:
    """A batch of tiles on its way through a GPU, as ``CudaStreamPipeline`` takes it.

    Attributes:
        tiles: dtype ``TILE`` [sizes, photos].
        made: torch uint8 [bytes] on the device, all tiles of one size, then those of the next.
        landed: the same in page-locked memory.
        stream: torch's current one when ``made`` was allocated.
        ready: the pipeline's event on ``stream``.
        status: uint8 [photos], DONE or WRONG_SIZE, once all is queued.
    """

    tiles: TileRecords
    made: "torch.Tensor"
    landed: "torch.Tensor"
    stream: "torch.cuda.Stream"
    ready: Any = None
    status: U8 = field(default_factory=lambda: np.empty(0, np.uint8))

    def write(self, photos: list[Any], uploads: Uploads, stream: int) -> None:
        import torch

        from nemo_dali.kernels.device import torch_stream
        from nemo_dali.kernels.mosaic.gpu import launch_of

        on_stream = torch_stream(uploads.device, stream)
        on_stream.wait_event(self.ready)
        self.status, fits = place_photos(self.tiles, photos)
        if not fits.all():  # an error
            return
        uploads.queue([launch_of(self.tiles.reshape(-1))], stream)
        with torch.cuda.stream(on_stream):
            self.landed.copy_(self.made, non_blocking=True)


class _DeviceWork:
    """Batches whose tiles a GPU writes into its own memory, and the host then copies into place."""

    def __init__(self, arrays: Mapping[Shape, U8], device_id: int) -> None:
        import torch

        self._arrays = arrays
        self._device = device_id
        self._table = torch.arange(256, dtype=torch.uint8, device=gpu.place(device_id)).repeat(3, 1)

    def pipeline(self, *, num_threads: int, **options: Any) -> StreamPipeline[Any]:
        return CudaStreamPipeline(
            device_id=self._device,
            hw_decoder_load=gpu.hardware_share(num_threads),
            num_threads=num_threads,
            **options,
        )

    def make(self, tiles: TileRecords, batch: list[int]) -> _DeviceTiles:
        import torch

        nbytes = sum(array[0].nbytes for array in self._arrays.values()) * len(batch)
        try:
            made = torch.empty(nbytes, dtype=torch.uint8, device=gpu.place(self._device))
        except torch.OutOfMemoryError as error:
            raise NemoError(
                f"GPU {self._device} has no room for {nbytes / 2**20:.0f} MiB of tiles. Free some, or use --device cpu."
            ) from error
        begin = made.data_ptr()
        for of_shape, array in zip(tiles, self._arrays.values(), strict=True):
            of_shape["image"] = begin + np.arange(len(batch)) * array[0].nbytes
            begin += len(batch) * array[0].nbytes
        tiles["table"] = self._table.data_ptr()
        return _DeviceTiles(tiles, made, gpu.page_locked(nbytes), gpu.current_stream(self._device))

    def land(self, made: _DeviceTiles, batch: list[int]) -> None:
        gpu.current_stream(self._device).synchronize()
        begin = 0
        for array in self._arrays.values():
            count = array[0].nbytes * len(batch)
            array[batch] = made.landed[begin : begin + count].numpy().reshape(len(batch), *array.shape[1:])
            begin += count
