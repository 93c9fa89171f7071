"""Launches ``gather.cu``: all cells of a batch at once, from resident tiles, on a stream of the caller's."""

import numpy as np

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.arrays import U32, Int
from nemo_dali.kernels.device import Launch
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.tile import TileRecords

THREADS = (128,)  # of a block

_CHUNK = 6144  # bytes that a block reads, in up to three pieces of whole lines; three vectors a thread
_BUS_LINE = 128  # bytes

SOURCE = cuda_source.Source("gather/gather.cu", {"THREADS": THREADS[0], "CHUNK": _CHUNK, "BUS_LINE": _BUS_LINE})


def kernel_name(itemsize: int) -> str:
    """The kernel for values of ``itemsize`` bytes."""
    return f"gather_{itemsize}"


@jit()
def blocks_of(tiles: TileRecords) -> U32:
    """Divide cells into the chunks that blocks of threads read.

    Args:
        tiles: dtype ``TILE`` [n], without empty boxes; ``first_block`` is set.

    Returns:
        uint32 [blocks], the row of ``tiles`` that each block works on.
    """
    blocks: Int = 0
    for tile in tiles:
        planes = 3 if tile.channels_last else 1  # read side by side, in chunks that are the smaller
        size = 3 // planes * np.int64(tile.y1 - tile.y0) * np.int64(tile.x1 - tile.x0)
        step = _CHUNK // planes
        tile.first_block = blocks
        blocks += (np.int64(tile.photo % np.uint64(_BUS_LINE)) + size + step - 1) // step
    tile_of_block = np.empty(blocks, np.uint32)
    for i in range(tiles.size):
        end = tiles[i + 1].first_block if i + 1 < tiles.size else blocks
        tile_of_block[tiles[i].first_block : end] = i
    return tile_of_block


def launch_of(tiles: TileRecords) -> Launch:
    """The launch that writes all cells of a batch; their masks are the work of ``mask.gpu``.

    Args:
        tiles: dtype ``TILE`` [n], n >= 1, in host memory, of one item size, without empty boxes; ``first_block`` is
            set. ``photo`` is the address of uint8 [3, y1 - y0, x1 - x0], the photo as it is to stand in the cell, in
            the device's memory or in page-locked memory of the host's that the device reads. Addresses are the
            device's; what is behind them must stay until the launch's stream has come past it.
    """
    tile_of_block, name = blocks_of(tiles), kernel_name(int(tiles["itemsize"][0]))
    return Launch(
        load=lambda device: cuda_source.load_kernel(SOURCE, name, device),
        blocks=(len(tile_of_block),),
        threads=THREADS,
        arrays=(tiles, tile_of_block),
    )


def write_tiles(tiles: TileRecords, *, device: int, stream: int) -> None:
    """Queue the writing of all cells of a batch by ``launch_of``'s launch; there may be none.

    Args:
        device: CUDA device number. stream: CUDA stream's address.
    """
    if len(tiles):
        launch_of(tiles).send_and_queue(device=device, stream=stream)
