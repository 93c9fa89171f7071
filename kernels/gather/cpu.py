"""Samples from photos that were resampled beforehand: uint8 planes in, normalised frame and mask out; for the CPU.

``write_sample`` is what a caller with arrays uses; ``run_address`` is the same behind DALI's ``numba_function``
interface, one call a sample.

A frame is written row after row over its whole width, through all cells of a band, so that the stores run through
memory in one direction: the processor then combines them into whole lines by itself. Cell after cell they take three
times as long, past the cache or not (benchmarks/NOTES.md).
"""

from typing import Any

import numpy as np
from numba import carray

from nemo_dali.kernels.arrays import U8, Bits
from nemo_dali.kernels.jit import callback, jit
from nemo_dali.kernels.mask.cpu import write_mask
from nemo_dali.kernels.mosaic.cpu import DONE, RUN
from nemo_dali.kernels.normalise import RECIPE, Recipe, normalise
from nemo_dali.kernels.stores import as_pointer
from nemo_dali.kernels.tile import TILE, Tile, TileRecords


@jit()
def _plane_row(tile: Tile, channel: int, y: int) -> U8:
    """Row ``y`` of the frame in the tile's planes, uint8 [x1 - x0]."""
    h, w = np.int64(tile.y1 - tile.y0), np.int64(tile.x1 - tile.x0)
    return carray(as_pointer(tile.photo + np.uint64((channel * h + y - tile.y0) * w)), w, np.uint8)


@jit()
def _write_band(tiles: TileRecords, table: Bits, recipe: Recipe, frame: Bits) -> None:
    """Write the cells of a band, which lie side by side, into the flat frame."""
    height, width = tiles[0].frame_height, tiles[0].frame_width
    y0, y1 = tiles[0].y0, tiles[0].y1
    if tiles[0].channels_last:
        pixels = frame.reshape(height, 3 * width)
        values = np.empty((3, width), table.dtype)
        for y in range(y0, y1):
            for tile in tiles:
                for c in range(3):
                    normalise(_plane_row(tile, c, y), c, table, recipe, values[c, tile.x0 : tile.x1])
            left, right = tiles[0].x0, tiles[tiles.size - 1].x1
            for x in range(left, right):
                for c in range(3):
                    pixels[y, 3 * x + c] = values[c, x]
        return
    planes = frame.reshape(3, height, width)
    for c in range(3):
        for y in range(y0, y1):
            for tile in tiles:
                normalise(_plane_row(tile, c, y), c, table, recipe, planes[c, y, tile.x0 : tile.x1])


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
    begin = 0
    while begin < cells:
        tile = tiles[begin]
        end = begin + 1
        while end < cells and tiles[end].y0 == tile.y0:
            end += 1
        recipe = np.zeros(1, RECIPE)  # which says to look up
        if tile.recipe:
            recipe = carray(as_pointer(tile.recipe), 1, RECIPE)
        values = 3 * np.int64(tile.frame_height) * tile.frame_width
        if tile.itemsize == 4:
            table4 = carray(as_pointer(tile.table), (3, 256), np.uint32)
            _write_band(tiles[begin:end], table4, recipe, carray(as_pointer(tile.image), values, np.uint32))
        elif tile.itemsize == 2:
            table2 = carray(as_pointer(tile.table), (3, 256), np.uint16)
            _write_band(tiles[begin:end], table2, recipe, carray(as_pointer(tile.image), values, np.uint16))
        else:
            table1 = carray(as_pointer(tile.table), (3, 256), np.uint8)
            _write_band(tiles[begin:end], table1, recipe, carray(as_pointer(tile.image), values, np.uint8))
        begin = end
    for i in range(cells):
        _write_mask(tiles[i])


@callback(RUN)
def run_address(outs: Any, _s: Any, _d: Any, _n: Any, ins: Any, in_shapes: Any, _e: Any, _m: Any) -> None:
    """Of one sample: input uint8 [cells, TILE.itemsize]; output uint8 [1], the status, DONE."""
    out = carray(as_pointer(outs), 1, np.uint64)
    data = carray(as_pointer(ins), 1, np.uint64)
    shapes = carray(as_pointer(in_shapes), 1, np.uint64)
    cells = carray(as_pointer(shapes[0]), 2, np.int64)[0]
    write_sample(carray(as_pointer(data[0]), cells, TILE))
    carray(as_pointer(out[0]), 1, np.uint8)[0] = DONE
