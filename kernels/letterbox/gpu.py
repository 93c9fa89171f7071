"""Launches ``letterbox.cu``: all letterboxed cells of a batch, with their masks, on a stream of the caller's."""

import numpy as np
from numba import carray

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.arrays import I32, U32, Int
from nemo_dali.kernels.device import Launch
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.letterbox.cpu import letterbox_sources
from nemo_dali.kernels.mask.cpu import add_up
from nemo_dali.kernels.stores import as_pointer
from nemo_dali.kernels.tile import TileRecords
from nemo_dali.kernels.warp_weights import FRACTIONS, ONE, WEIGHTS_CUBIC

THREADS = (32, 8)  # of a block: along a row, along a column

_PART = 32  # pixels along a side of what a block writes

SOURCE = cuda_source.Source(
    "letterbox/letterbox.cu",
    {"LANES": THREADS[0], "ROWS": THREADS[1], "PART": _PART, "FRACTIONS": FRACTIONS, "ONE": ONE},
    {"CUBIC": WEIGHTS_CUBIC},
)


def kernel_name(itemsize: int) -> str:
    """The kernel for values of ``itemsize`` bytes."""
    return f"letterbox_{itemsize}"


@jit()
def blocks_of(tiles: TileRecords) -> tuple[U32, I32]:
    """Divide cells into the parts that blocks of threads write, and find what the blocks read of the photos.

    Args:
        tiles: dtype ``TILE`` [n], without empty boxes; ``runs`` are addresses in host memory. ``first_block`` is set,
            and ``runs`` becomes where a cell's part of ``lines`` begins.

    Returns:
        tile_of_block: uint32 [blocks], the row of ``tiles`` that each block works on.
        lines: int32, for each cell the photo's coordinates of its rows and columns, in 1/32 pixel, and where its
            target's runs end, which is uint32.
    """
    blocks: Int
    blocks, total = 0, 0
    for tile in tiles:
        height, width = np.int64(tile.y1 - tile.y0), np.int64(tile.x1 - tile.x0)
        tile.first_block = blocks
        blocks += ((height + _PART - 1) // _PART) * ((width + _PART - 1) // _PART)
        total += height + width + tile.run_count
    tile_of_block = np.empty(blocks, np.uint32)
    lines = np.empty(total, np.int32)
    begin = 0
    for i in range(tiles.size):
        tile = tiles[i]
        tile_of_block[tile.first_block : tiles[i + 1].first_block if i + 1 < tiles.size else blocks] = i
        height, width = np.int64(tile.y1 - tile.y0), np.int64(tile.x1 - tile.x0)
        columns, ends = begin + height, begin + height + width
        letterbox_sources(tile.photo_height, tile.photo_width, height, width, lines[begin:columns], lines[columns:ends])
        if tile.run_count:
            runs = carray(as_pointer(tile.runs), tile.run_count, np.uint32)
            pixels = np.int64(tile.photo_height) * tile.photo_width
            add_up(runs, pixels, lines[ends : ends + tile.run_count].view(np.uint32))
        tile.runs = begin
        begin = ends + tile.run_count
    return tile_of_block, lines


def launch_of(tiles: TileRecords) -> Launch:
    """The launch that writes letterboxed cells and their masks.

    Args:
        tiles: dtype ``TILE`` [n], n >= 1, in host memory, of one item size, without empty boxes. ``runs`` are addresses
            in host memory; the others are the device's, and what is behind them must stay until the launch's stream has
            come past it.
    """
    tiles = tiles.copy()
    tile_of_block, lines = blocks_of(tiles)
    name = kernel_name(int(tiles["itemsize"][0]))
    return Launch(
        load=lambda device: cuda_source.load_kernel(SOURCE, name, device),
        blocks=(len(tile_of_block),),
        threads=THREADS,
        arrays=(tiles, tile_of_block, lines),
    )


def write_tiles(tiles: TileRecords, *, device: int, stream: int) -> None:
    """Queue the writing of letterboxed cells and of their masks by ``launch_of``'s launch; there may be none.

    Args:
        device: CUDA device number. stream: CUDA stream's address.
    """
    if len(tiles):
        launch_of(tiles).send_and_queue(device=device, stream=stream)
