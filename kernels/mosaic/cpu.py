"""One cell of a mosaic: photo and run lengths in, pixels and mask out; for the CPU.

``write_tile`` is what a caller with arrays uses. ``run_address`` and ``setup_address`` are the same behind DALI's
``numba_function`` interface: DALI's threads call it once per cell, without the GIL.
"""

from typing import Any

import numpy as np
from numba import carray, types

from nemo_dali.kernels.arrays import U8, Bits
from nemo_dali.kernels.jit import callback, jit
from nemo_dali.kernels.letterbox.cpu import warp_letterbox, write_letterbox_mask
from nemo_dali.kernels.mask.cpu import write_mask
from nemo_dali.kernels.mosaic.cv2_linear import write_cv2_linear
from nemo_dali.kernels.mosaic.pillow_bilinear import resize_pillow_bilinear
from nemo_dali.kernels.normalise import RECIPE, Recipe, normalise
from nemo_dali.kernels.stores import as_pointer, fence, keep, put_row, uncounted
from nemo_dali.kernels.tile import CV2_LETTERBOX, PILLOW_BILINEAR, TILE, Tile

DONE, WRONG_SIZE = 1, 2  # status of a cell


@jit()
def _write_pixels(photo: U8, resample: int, table: Bits, recipe: Recipe, cell: Bits) -> None:
    if resample != PILLOW_BILINEAR:
        write_cv2_linear(photo, table, recipe, cell)
        return
    _, h, w = cell.shape
    planes, normalised = np.empty((3, h, w), np.uint8), np.empty(w, table.dtype)
    resized, values = uncounted(planes), uncounted(normalised)
    resize_pillow_bilinear(photo, resized)
    for c in range(3):
        for y in range(h):
            normalise(resized[c, y], c, table, recipe, values)
            put_row(values, cell, c, y)
    keep(planes)
    keep(normalised)


@jit()
def _write_image(photo: U8, tile: Tile, table: Bits, frame: Bits) -> None:
    """Write the cell into the frame, given flat."""
    recipe = np.zeros(1, RECIPE)  # which says to look up
    if tile.recipe:
        recipe = carray(as_pointer(tile.recipe), 1, RECIPE)
    if not tile.channels_last:
        planes = frame.reshape(3, tile.frame_height, tile.frame_width)
        _write_pixels(photo, tile.resample, table, recipe, planes[:, tile.y0 : tile.y1, tile.x0 : tile.x1])
        return
    pixels = frame.reshape(1, tile.frame_height, 3 * tile.frame_width)
    cell = pixels[:, tile.y0 : tile.y1, 3 * tile.x0 : 3 * tile.x1]
    h, w = tile.y1 - tile.y0, tile.x1 - tile.x0
    channels = np.empty((3, h, w), table.dtype)
    _write_pixels(photo, tile.resample, table, recipe, channels)
    values = np.empty(3 * w, table.dtype)
    for y in range(h):
        for x in range(w):
            for c in range(3):
                values[3 * x + c] = channels[c, y, x]
        put_row(values, cell, 0, y)


@jit()
def write_tile(tile: Tile, photo: U8) -> int:
    """Write the pixels and the mask of one cell.

    Args:
        tile: one record of dtype ``tile.TILE``.
        photo: uint8 [H, W, 3], C-contiguous RGB.

    Returns:
        DONE, or WRONG_SIZE if the photo is not of the size that the tile says; then nothing is written.
    """
    height, width, _ = photo.shape
    if height != tile.photo_height or width != tile.photo_width:
        return WRONG_SIZE
    if tile.y0 == tile.y1 or tile.x0 == tile.x1:
        return DONE
    if tile.resample == CV2_LETTERBOX:  # as large as its cell then, and so not changed by what follows
        boxed = np.empty((tile.y1 - tile.y0, tile.x1 - tile.x0, 3), np.uint8)
        warp_letterbox(photo, tile.border, boxed)
        photo = boxed
    pixels = np.int64(tile.frame_height) * tile.frame_width
    if tile.itemsize == 4:
        table4 = carray(as_pointer(tile.table), (3, 256), np.uint32)
        _write_image(photo, tile, table4, carray(as_pointer(tile.image), 3 * pixels, np.uint32))
    elif tile.itemsize == 2:
        table2 = carray(as_pointer(tile.table), (3, 256), np.uint16)
        _write_image(photo, tile, table2, carray(as_pointer(tile.image), 3 * pixels, np.uint16))
    else:
        table1 = carray(as_pointer(tile.table), (3, 256), np.uint8)
        _write_image(photo, tile, table1, carray(as_pointer(tile.image), 3 * pixels, np.uint8))
    frame_mask = carray(as_pointer(tile.mask), (tile.frame_height, tile.frame_width), np.uint8)
    mask = frame_mask[tile.y0 : tile.y1, tile.x0 : tile.x1]
    if tile.run_count:
        runs = carray(as_pointer(tile.runs), tile.run_count, np.uint32)
        if tile.resample == CV2_LETTERBOX:
            write_letterbox_mask(runs, height, width, tile.soft_mask != 0, mask)
        else:
            write_mask(runs, height, width, tile.resample, mask)
    else:
        mask[:] = 0
    fence()
    return DONE


# DALI's calling convention: addresses of arrays of addresses (data, shapes) and of dimension counts, then how many.
RUN = types.void(*([types.uint64] * 3 + [types.int32]) * 2)
SETUP = types.void(*([types.uint64] * 2 + [types.int32]) * 2, types.int32)


@callback(RUN)
def run_address(outs: Any, _s: Any, _d: Any, _n: Any, ins: Any, in_shapes: Any, _e: Any, _m: Any) -> None:
    """Of one cell: inputs uint8 [TILE.itemsize] and photo uint8 [H, W, 3]; output uint8 [1], the status."""
    out = carray(as_pointer(outs), 1, np.uint64)
    data = carray(as_pointer(ins), 2, np.uint64)
    shapes = carray(as_pointer(in_shapes), 2, np.uint64)
    shape = carray(as_pointer(shapes[1]), 3, np.int64)
    photo = carray(as_pointer(data[1]), (shape[0], shape[1], 3), np.uint8)
    tile = carray(as_pointer(data[0]), 1, TILE)[0]
    carray(as_pointer(out[0]), 1, np.uint8)[0] = write_tile(tile, photo)


@callback(SETUP)
def setup_address(out_shapes: Any, _d: Any, _n: Any, _s: Any, _e: Any, _m: Any, samples: Any) -> None:
    """Of a batch: every output has the shape [1]."""
    shapes = carray(as_pointer(out_shapes), samples, np.uint64)
    for sample in range(samples):
        carray(as_pointer(shapes[sample]), 1, np.int64)[0] = 1
