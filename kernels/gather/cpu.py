"""Samples from photos that were resampled beforehand: uint8 planes in, normalised frame and mask out; for the CPU.

``write_sample`` is what a caller with arrays uses; ``run_address`` is the same behind DALI's ``numba_function``
interface, one call a sample.

A frame is written plane by plane from its first row to its last, through all cells of a row, so that there are whole
cache lines to store past the cache wherever cells begin: as fast as filling the same memory (benchmarks/NOTES.md).
"""

from typing import Any

import numpy as np
from numba import carray

from nemo_dali.kernels.arrays import U8, Bits
from nemo_dali.kernels.jit import callback, jit
from nemo_dali.kernels.mask.cpu import write_mask
from nemo_dali.kernels.mosaic.cpu import DONE, RUN
from nemo_dali.kernels.normalise import RECIPE, Recipe, normalise, stream_normalised
from nemo_dali.kernels.stores import LINE, as_pointer, copy_bytes, fence, fetch, keep, uncounted
from nemo_dali.kernels.tile import TILE, Tile, TileRecords

_AHEAD = np.uint64(8)  # rows of a tile that are fetched while one is copied
_STAGED = 4096  # pixels that are brought together before they are written: many rows cost as many calls


@jit()
def _plane_row(tile: Tile, channel: int, y: int) -> np.uint64:
    """Address of row ``y`` of the frame in the tile's planes, uint8 [x1 - x0]."""
    h, w = np.int64(tile.y1 - tile.y0), np.int64(tile.x1 - tile.x0)
    return np.uint64(tile.photo) + np.uint64((channel * h + y - tile.y0) * w)


@jit()
def _band_end(tiles: TileRecords, begin: int) -> int:
    """Where the cells end that lie side by side with the one at ``begin``."""
    end = begin + 1
    while end < tiles.size and tiles[end].y0 == tiles[begin].y0:
        end += 1
    return end


@jit()
def _write_planes(tiles: TileRecords, table: Bits, recipe: Recipe) -> None:
    """Write the cells into a frame [3, height, width]."""
    height, width = np.int64(tiles[0].frame_height), np.int64(tiles[0].frame_width)
    staging = np.empty(max(width + np.int64(LINE), np.int64(_STAGED)), np.uint8)
    pixels = uncounted(staging)
    room, first, size = np.uint64(pixels.size), np.uint64(pixels.ctypes.data), np.uint64(table.itemsize)
    for c in range(3):
        target, held, begin = np.uint64(0), np.uint64(0), 0  # where the staged pixels belong, and how many they are
        while begin < tiles.size:
            end = _band_end(tiles, begin)
            left, row_width = tiles[begin].x0, np.uint64(tiles[end - 1].x1 - tiles[begin].x0)
            for y in range(tiles[begin].y0, tiles[begin].y1):
                row = np.uint64(tiles[0].image) + np.uint64((c * height + y) * width + left) * size
                if row != target + held * size:  # the frame is wider than the cells
                    _write_rest(pixels[:held], c, table, recipe, target)
                    target, held = row, np.uint64(0)
                if held + row_width > room:
                    done = np.uint64(stream_normalised(pixels[:held], c, table, recipe, target))
                    target, held = target + done * size, held - done
                    copy_bytes(first, first + done, held)
                for i in range(begin, end):
                    count = np.uint64(tiles[i].x1 - tiles[i].x0)
                    source = _plane_row(tiles[i], c, y)
                    fetch(source + _AHEAD * count, count)
                    copy_bytes(first + held, source, count)
                    held += count
            begin = end
        done = np.uint64(stream_normalised(pixels[:held], c, table, recipe, target))
        _write_rest(pixels[done:held], c, table, recipe, target + done * size)
    keep(staging)


@jit()
def _write_rest(pixels: U8, channel: int, table: Bits, recipe: Recipe, target: np.uint64) -> None:
    normalise(pixels, channel, table, recipe, carray(as_pointer(target), pixels.size, table.dtype))


@jit()
def _write_pixels(tiles: TileRecords, table: Bits, recipe: Recipe) -> None:
    """Write the cells into a frame [height, width, 3]."""
    height, width = np.int64(tiles[0].frame_height), np.int64(tiles[0].frame_width)
    frame = carray(as_pointer(tiles[0].image), (height, 3 * width), table.dtype)
    values = np.empty((3, width), table.dtype)
    begin = 0
    while begin < tiles.size:
        end = _band_end(tiles, begin)
        for y in range(tiles[begin].y0, tiles[begin].y1):
            for tile in tiles[begin:end]:
                for c in range(3):
                    row = carray(as_pointer(_plane_row(tile, c, y)), tile.x1 - tile.x0, np.uint8)
                    normalise(row, c, table, recipe, values[c, tile.x0 : tile.x1])
            for x in range(tiles[begin].x0, tiles[end - 1].x1):
                for c in range(3):
                    frame[y, 3 * x + c] = values[c, x]
        begin = end


@jit()
def _write_frame(tiles: TileRecords, table: Bits, recipe: Recipe) -> None:
    if tiles[0].channels_last:
        _write_pixels(tiles, table, recipe)
    else:
        _write_planes(tiles, table, recipe)


@jit()
def _write_mask(tile: Tile) -> None:
    frame_mask = carray(as_pointer(tile.mask), (tile.frame_height, tile.frame_width), np.uint8)
    mask = frame_mask[tile.y0 : tile.y1, tile.x0 : tile.x1]
    if tile.run_count:
        runs = carray(as_pointer(tile.runs), tile.run_count, np.uint32)
        write_mask(runs, tile.photo_height, tile.photo_width, tile.resample, mask)
    else:
        mask[:] = 0


@jit()
def write_sample(tiles: TileRecords) -> None:
    """Write the frame and the mask of a sample.

    Args:
        tiles: dtype ``tile.TILE`` [n], the sample's cells row by row, without empty boxes. ``photo`` is the address of
            uint8 [3, y1 - y0, x1 - x0], the photo as it is to stand in the cell. Records behind the last cell have
            ``photo`` 0.
    """
    cells = 0
    while cells < tiles.size and tiles[cells].photo != 0:
        cells += 1
    if cells == 0:
        return
    tiles, tile = tiles[:cells], tiles[0]
    recipe = np.zeros(1, RECIPE)  # which says to look up
    if tile.recipe:
        recipe = carray(as_pointer(tile.recipe), 1, RECIPE)
    if tile.itemsize == 4:
        _write_frame(tiles, carray(as_pointer(tile.table), (3, 256), np.uint32), recipe)
    elif tile.itemsize == 2:
        _write_frame(tiles, carray(as_pointer(tile.table), (3, 256), np.uint16), recipe)
    else:
        _write_frame(tiles, carray(as_pointer(tile.table), (3, 256), np.uint8), recipe)
    for tile in tiles:
        _write_mask(tile)
    fence()


@callback(RUN)
def run_address(outs: Any, _s: Any, _d: Any, _n: Any, ins: Any, in_shapes: Any, _e: Any, _m: Any) -> None:
    """Of one sample: input uint8 [cells, TILE.itemsize]; output uint8 [1], the status, DONE."""
    out = carray(as_pointer(outs), 1, np.uint64)
    data = carray(as_pointer(ins), 1, np.uint64)
    shapes = carray(as_pointer(in_shapes), 1, np.uint64)
    cells = carray(as_pointer(shapes[0]), 2, np.int64)[0]
    write_sample(carray(as_pointer(data[0]), cells, TILE))
    carray(as_pointer(out[0]), 1, np.uint8)[0] = DONE
