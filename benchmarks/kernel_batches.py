"""What ``gpu_kernels.py`` times: batches for each kernel, what they must become, and how many bytes that takes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.device import upload
from nemo_dali.kernels.gather import cpu as gather_cpu
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mask.cpu import write_mask
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.kernels.mosaic.cpu import write_tile
from nemo_dali.kernels.reference import normalisation_table
from nemo_dali.kernels.tile import CV2_LINEAR, RESAMPLE, TILE, TileRecords, cell_edge
from nemo_dali.pipeline import gpu
from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD

PHOTO = (480, 640)  # height, width
OTHER_GRIDS_BATCH = 64  # single and 3x3 at one batch size

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """What is timed; ``dtype`` is the output's."""

    kernel: str  # "mosaic", "mask" or "gather"
    grid: int
    resample: str | None  # None where nothing is resampled
    dtype: str
    batch: int
    size: int = 480
    placement: str = "device"  # of photos or tiles: "device", or "pinned", which the GPU reads over the bus


@dataclass(frozen=True)
class Work:
    """One batch of a case.

    Attributes:
        run: queues the kernel alone, with its tables already on the device.
        run_whole: uploads the tables and queues the kernel, as the pipeline does.
        output: torch uint8 [bytes], what the kernel writes.
        expected: makes the same on the CPU, uint8 [bytes].
        bytes: that the kernel must move; for pinned tiles those that cross the bus.
        keep: holds the memory behind addresses.
    """

    run: Callable[[], None]
    run_whole: Callable[[], None]
    output: Any
    expected: Callable[[], Bytes]
    bytes: int
    keep: Any


def cases(batches: Sequence[int], dtypes: Sequence[str]) -> list[Case]:
    """All that is timed. Masks are uint8 whatever the image's type, and what crosses the bus is uint8 too."""
    one = OTHER_GRIDS_BATCH if OTHER_GRIDS_BATCH in batches else max(batches)
    shapes = [(2, batch) for batch in batches] + [(1, one), (3, one)]
    kernels = [("mosaic", RESAMPLE, dtypes), ("mask", RESAMPLE, ("uint8",)), ("gather", (None,), dtypes)]
    device = [
        Case(kernel, grid, resample, dtype, batch)
        for kernel, resamples, types in kernels
        for resample in resamples
        for dtype in types
        for grid, batch in shapes
    ]
    return device + [Case("gather", grid, None, dtypes[0], one, placement="pinned") for grid in (1, 2, 3)]


# --- what must be moved ----------------------------------------------------------------------------------------------


@cache
def touched_rows(source: int, size: int, resample: int) -> int:
    """How many of a photo's ``source`` rows a cell of ``size`` rows is made from.

    "cv2-linear" uses two rows for each output row, both counted even if the weight of one is 0; "pillow-bilinear" uses
    all rows within the support.
    """
    scale = source / size
    middle = (np.arange(size) + 0.5) * scale
    if resample == CV2_LINEAR:
        first = np.floor((middle - 0.5).astype(np.float32)).astype(np.int64)
        end = first + 2
        first, end = np.clip(first, 0, source - 1), np.clip(end, 1, source)
    else:
        support = max(scale, 1.0)
        first = np.maximum((middle - support + 0.5).astype(np.int64), 0)
        end = np.minimum((middle + support + 0.5).astype(np.int64), source)
    begun = np.bincount(first, minlength=source) - np.bincount(end, minlength=source + 1)[:source]
    return int((begun.cumsum() > 0).sum())


def touched_bytes(tiles: TileRecords) -> int:
    """Bytes of photos and frames that the mosaic kernel touches for cells of dtype ``TILE``."""
    height, width = (tiles["y1"] - tiles["y0"]).astype(np.int64), (tiles["x1"] - tiles["x0"]).astype(np.int64)
    lengths = zip(tiles["photo_height"].tolist(), height.tolist(), tiles["resample"].tolist(), strict=True)
    rows = np.array([touched_rows(*length) for length in lengths])
    return int((3 * rows * tiles["photo_width"] + 3 * tiles["itemsize"] * height * width).sum())


def least_bytes(case: Case) -> int:
    """What a batch of a case moves at the very least."""
    if case.kernel == "mosaic":
        return touched_bytes(tiles_of(case, image=0, mask=0, table=0))
    values = case.batch * case.size**2 * 3
    if case.kernel == "gather":
        return values if case.placement == "pinned" else values * (1 + np.dtype(case.dtype).itemsize)
    return values // 3


# --- batches ---------------------------------------------------------------------------------------------------------


def boxes(case: Case) -> npt.NDArray[np.int64]:
    """Half-open (y0, x0, y1, x1) [batch * grid**2, 4] of all cells, sample after sample."""
    edges = np.array([cell_edge(case.grid, line, case.size // 2, case.size) for line in range(case.grid + 1)])
    y, x = np.divmod(np.tile(np.arange(case.grid**2), case.batch), case.grid)
    return np.stack([edges[y], edges[x], edges[y + 1], edges[x + 1]], axis=1)


def tiles_of(case: Case, *, image: int, mask: int, table: int) -> TileRecords:
    """The cells of a batch whose frames and masks follow one another from these addresses on; no photos yet."""
    tiles = np.zeros(case.batch * case.grid**2, TILE)
    for name, column in zip(("y0", "x0", "y1", "x1"), boxes(case).T, strict=True):
        tiles[name] = column
    tiles["photo_height"], tiles["photo_width"] = PHOTO
    tiles["frame_height"] = tiles["frame_width"] = case.size
    tiles["itemsize"] = np.dtype(case.dtype).itemsize
    tiles["resample"] = 0 if case.resample is None else RESAMPLE[case.resample]
    sample = np.arange(len(tiles), dtype=np.uint64) // np.uint64(case.grid**2)
    pixels = np.uint64(case.size**2)
    tiles["image"] = np.uint64(image) + sample * 3 * pixels * tiles["itemsize"].astype(np.uint64)
    tiles["mask"] = np.uint64(mask) + sample * pixels
    tiles["table"] = table
    return tiles


def mosaic_on_cpu(case: Case, photos: Bytes, table: npt.NDArray[Any]) -> Bytes:
    """The frames of a batch by the CPU kernel; photos are uint8 [cells, H, W, 3]."""
    frames = np.empty((case.batch, 3, case.size, case.size), table.dtype)
    masks = np.empty((case.batch, case.size, case.size), np.uint8)
    tiles = tiles_of(case, image=frames.ctypes.data, mask=masks.ctypes.data, table=table.ctypes.data)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write_tile, tiles, photos))
    return frames.view(np.uint8).reshape(-1)


def gathered_on_cpu(case: Case, photos: Bytes, table: npt.NDArray[Any]) -> Bytes:
    """The frames of a batch by the CPU kernel; the first bytes of a photo, uint8 [H, W, 3], are a cell's planes."""
    frames = np.empty((case.batch, 3, case.size, case.size), table.dtype)
    masks = np.empty((case.batch, case.size, case.size), np.uint8)
    tiles = tiles_of(case, image=frames.ctypes.data, mask=masks.ctypes.data, table=table.ctypes.data)
    tiles["photo"] = [photo.ctypes.data for photo in photos]
    with ThreadPoolExecutor() as pool:
        list(pool.map(gather_cpu.write_sample, tiles.reshape(case.batch, -1)))
    return frames.view(np.uint8).reshape(-1)


def masks_on_cpu(case: Case, runs: Sequence[npt.NDArray[np.uint32]], cells: npt.NDArray[np.int64]) -> Bytes:
    """The masks of a batch by the CPU kernel, from run lengths and boxes of the targets."""
    masks = np.zeros((case.batch, case.size, case.size), np.uint8)
    for mask, counts, (y0, x0, y1, x1) in zip(masks, runs, cells, strict=True):
        write_mask(counts, *PHOTO, RESAMPLE[case.resample], mask[y0:y1, x0:x1])
    return masks.reshape(-1)


def ellipse(random: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Run lengths of an ellipse in a photo."""
    y, x = np.ogrid[: PHOTO[0], : PHOTO[1]]
    (cy, cx), (ry, rx) = random.uniform(0.3, 0.7, 2) * PHOTO, random.uniform(0.1, 0.3, 2) * PHOTO
    inside = (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1).ravel(order="F")
    return np.diff([0, *np.flatnonzero(np.diff(inside)) + 1, inside.size]).astype(np.uint32)


class Photos:
    """Random photos, the same on the host and in the given placement: uint8 [count, H, W, 3]."""

    def __init__(self, count: int, placement: str, device: int) -> None:
        import torch

        self.host = np.random.default_rng(0).integers(0, 256, (count, *PHOTO, 3), dtype=np.uint8)
        here = torch.from_numpy(self.host)
        self.there = here.pin_memory() if placement == "pinned" else here.to(gpu.place(device))

    def take(self, first: int, count: int) -> tuple[Bytes, npt.NDArray[np.uint64]]:
        """``count`` photos from number ``first`` on, and their addresses for the device."""
        at = self.there.data_ptr() + np.arange(first, first + count, dtype=np.uint64) * np.uint64(self.host[0].nbytes)
        return self.host[first : first + count], at


def image_work(case: Case, number: int, photos: Photos, *, device: int, stream: int) -> Work:
    """The ``number``-th batch of a "mosaic" or "gather" case, of photos that no other batch of the case shows."""
    import torch

    table = np.ascontiguousarray(normalisation_table(IMAGENET_MEAN, IMAGENET_STD, case.dtype))
    table_there = torch.from_numpy(table.view(np.uint8)).to(gpu.place(device))
    output = torch.empty(case.batch * 3 * case.size**2 * table.itemsize, dtype=torch.uint8, device=gpu.place(device))
    tiles = tiles_of(case, image=output.data_ptr(), mask=0, table=table_there.data_ptr())
    shown, tiles["photo"] = photos.take(number * len(tiles), len(tiles))
    shared = 0
    if case.kernel == "mosaic":
        module, on_cpu = mosaic_gpu, mosaic_on_cpu
        tile_of_block, shared = mosaic_gpu.blocks_of(tiles)
        name = mosaic_gpu.kernel_name(int(tiles["resample"][0]), table.itemsize)
    else:
        module, on_cpu = gather_gpu, gathered_on_cpu
        tile_of_block = gather_gpu.blocks_of(tiles)
        name = gather_gpu.kernel_name(table.itemsize)
    kernel = cuda_source.load_kernel(module.SOURCE, name, device)
    tables, addresses = upload([tiles, tile_of_block], device=device, stream=stream)
    arguments = (*addresses, np.int32(shared)) if shared else tuple(addresses)
    return Work(
        run=lambda: kernel((len(tile_of_block),), module.THREADS, arguments, shared_mem=shared),
        run_whole=lambda: module.write_tiles(tiles, device=device, stream=stream),
        output=output,
        expected=lambda: on_cpu(case, shown, table),
        bytes=least_bytes(case),
        keep=(table_there, tables),
    )


def masks_of(case: Case) -> tuple[list[npt.NDArray[np.uint32]], npt.NDArray[np.int64], list[npt.NDArray[Any]]]:
    """Ellipses as the targets of a batch, in each cell in turn: run lengths, boxes, and what the kernel reads."""
    random = np.random.default_rng(0)
    few = [ellipse(random) for _ in range(16)]
    runs = [few[i % len(few)] for i in range(case.batch)]
    sample, cells = np.arange(case.batch), case.grid**2
    shown = boxes(case)[sample * cells + sample % cells]
    addresses, counts = mask_gpu.run_addresses(runs)
    photos, resample = np.tile(PHOTO, (case.batch, 1)), RESAMPLE[case.resample]
    tables = mask_gpu.make_targets(addresses=addresses, counts=counts, boxes=shown, photos=photos, resample=resample)
    return runs, shown, list(tables)


def mask_work(case: Case, *, device: int, stream: int) -> Work:
    """A batch of masks."""
    import torch

    runs, shown, tables = masks_of(case)
    output = torch.empty(case.batch * case.size**2, dtype=torch.uint8, device=gpu.place(device))
    kernel = mask_gpu.load_kernel(case.dtype, device)
    there, addresses = upload(tables, device=device, stream=stream)
    blocks, shared = mask_gpu.grid(case.batch, case.size, case.size), mask_gpu.shared_bytes()
    size, band = np.int32(case.size), np.int32(mask_gpu.BAND)
    arguments = (*addresses, output.data_ptr(), size, size, band)
    frame = {"frame_height": case.size, "frame_width": case.size}

    def run_whole() -> None:
        _owner, fresh = upload(tables, device=device, stream=stream)
        mask_gpu.write_masks(*fresh, output.data_ptr(), case.batch, **frame, device=device, stream=stream)

    return Work(
        run=lambda: kernel(blocks, (mask_gpu.THREADS,), arguments, shared_mem=shared),
        run_whole=run_whole,
        output=output,
        expected=lambda: masks_on_cpu(case, runs, shown),
        bytes=sum(table.nbytes for table in tables) + output.nbytes,
        keep=there,
    )
