"""What ``nemo_dali.fn`` runs inside DALI on the CPU: callbacks for ``numba_function``, compiled once per machine.

DALI calls a setup callback once a batch, which sees the inputs' shapes only and sets the outputs', and a run callback
once a sample, on its threads and without the GIL. So each operator's first input brings the shape of its first output,
behind a dimension that does not count: mostly it is an empty tensor [0, *shape].

A callback cannot raise. Its last output, int32, is a verdict: minus one of the failures below and the numbers that
explain it; or, if all is well, what the callback says, beginning with a number >= 0.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from nemo_dali.kernels.arrays import I32, I64, U8, U32, U64, Int, Record
from nemo_dali.kernels.jit import callback, jit
from nemo_dali.kernels.mask.cpu import add_up, write_mask
from nemo_dali.kernels.mosaic.cpu import RUN, SETUP, _write_image
from nemo_dali.kernels.stores import as_pointer, fence
from nemo_dali.kernels.tile import TILE, TileRecords, cell_edge, set_frame

# Failures, and what comes behind.
CHANNELS = 1  # cell, channels of its photo
NO_PIXELS = 2  # cell
CENTER_COUNT = 3  # nothing
CENTER_X = 4  # x
CENTER_Y = 5  # y
CELL_COUNT = 6  # values of cell
CELL = 7  # cell
SHAPE = 8  # nothing
RUN_SUM = 9  # what the run lengths add up to, or the largest int32
NEGATIVE_RUN = 10  # its place

FRAME = np.dtype(  # what to make of a sample; all but the center is the same for every sample
    [
        ("x", "i4"),  # the crossing of a 2x2 in pixels; of no meaning for other grids
        ("y", "i4"),
        ("table", "u8"),  # address of the normalisation table [3, 256] of itemsize bytes
        ("recipe", "u8"),  # address of the ``normalise.RECIPE`` that computes it
        ("size", "i4"),  # height and width in pixels
        ("grid", "i4"),  # cells a side
        ("first_cell", "i4"),  # of those that one call writes
        ("itemsize", "i4"),  # bytes of an output value: 1 (uint8), 2 (float16), 4 (float32), 8 (int64)
        ("resample", "i4"),  # one of RESAMPLE's values
        ("channels_last", "i4"),  # 0 or 1
    ]
)
Frame = Record  # of dtype FRAME
CENTER_VALUES, VALUES = 2, FRAME.itemsize // 4

_MOST = np.int64(2**31 - 1)  # a photo has fewer pixels
TARGET_VALUES = 8  # of a mask, for the GPU: 0, run lengths, the cell's y0, x0, y1, x1, the photo's height and width


@jit()
def _edge(frame: Frame, line: int, crossing: int) -> Int:
    return cell_edge(frame.grid, line, crossing, frame.size)


@jit()
def _center_is_wrong(frame: Frame, values: int, verdict: I32) -> bool:
    """Whether ``center`` cannot be used; ``values`` is how many int32 the frame's record came in."""
    if values != VALUES:
        verdict[0] = -CENTER_COUNT
    elif frame.grid == 2 and not 0 <= frame.x <= frame.size:
        verdict[0], verdict[1] = -CENTER_X, frame.x
    elif frame.grid == 2 and not 0 <= frame.y <= frame.size:
        verdict[0], verdict[1] = -CENTER_Y, frame.y
    else:
        return False
    return True


@jit()
def _write_cell(tiles: TileRecords, photo: U8) -> None:
    """Write the pixels of one cell, dtype TILE [1]."""
    tile = tiles[0]
    values = 3 * np.int64(tile.frame_height) * tile.frame_width
    if tile.itemsize == 4:
        table4 = carray(as_pointer(tile.table), (3, 256), np.uint32)
        _write_image(photo, tile, table4, carray(as_pointer(tile.image), values, np.uint32))
    elif tile.itemsize == 2:
        table2 = carray(as_pointer(tile.table), (3, 256), np.uint16)
        _write_image(photo, tile, table2, carray(as_pointer(tile.image), values, np.uint16))
    else:
        table1 = carray(as_pointer(tile.table), (3, 256), np.uint8)
        _write_image(photo, tile, table1, carray(as_pointer(tile.image), values, np.uint8))


@jit()
def _write_cells(frame: Frame, image: int, photos: U64, shapes: U64, verdict: I32) -> None:
    """Write some of a frame's cells.

    Args:
        frame: one record of dtype FRAME.
        image: address of the frame, [3, size, size] or [size, size, 3].
        photos, shapes: uint64 [cells], addresses of photos, uint8 [H, W, 3], and of their shapes.
        verdict: int32 [3]; the frame's shape if all is well.
    """
    for i in range(photos.size):
        shape = carray(as_pointer(shapes[i]), 3, np.int64)
        if shape[2] != 3:
            verdict[0], verdict[1], verdict[2] = -CHANNELS, frame.first_cell + i, shape[2]
            return
        if shape[0] == 0 or shape[1] == 0:
            verdict[0], verdict[1] = -NO_PIXELS, frame.first_cell + i
            return
    tiles = np.zeros(1, TILE)
    tile = tiles[0]  # keeps no memory alive: as long as it is used, so must be the array
    size, itemsize = frame.size, frame.itemsize
    set_frame(tile, size, size, frame.table, frame.recipe, itemsize, frame.resample, frame.channels_last)
    tile.image = image
    for i in range(photos.size):
        cell = frame.first_cell + i
        row, column = cell // frame.grid, cell % frame.grid
        tile.y0, tile.y1 = _edge(frame, row, frame.y), _edge(frame, row + 1, frame.y)
        tile.x0, tile.x1 = _edge(frame, column, frame.x), _edge(frame, column + 1, frame.x)
        if tile.y0 < tile.y1 and tile.x0 < tile.x1:
            shape = carray(as_pointer(shapes[i]), 3, np.int64)
            _write_cell(tiles, carray(as_pointer(photos[i]), (shape[0], shape[1], 3), np.uint8))
    fence()
    verdict[:] = frame.size
    verdict[2 if frame.channels_last else 0] = 3


@callback(RUN)
def run_mosaic(outs: Any, _s: Any, _d: Any, _n: Any, ins: Any, in_shapes: Any, _e: Any, inputs: Any) -> None:
    """Inputs: the empty one, int32 [VALUES] as FRAME, photos. Outputs: frame, int32 [3].

    Unless the first cell is among the photos', there is one more input, the frame that the call with the first cell has
    made, and the output is empty.
    """
    out = carray(as_pointer(outs), 2, np.uint64)
    data = carray(as_pointer(ins), inputs, np.uint64)
    shapes = carray(as_pointer(in_shapes), inputs, np.uint64)
    frame = carray(as_pointer(data[1]), 1, FRAME)[0]
    verdict = carray(as_pointer(out[1]), 3, np.int32)
    if _center_is_wrong(frame, carray(as_pointer(shapes[1]), 1, np.int64)[0], verdict):
        return
    if frame.first_cell == 0:
        _write_cells(frame, out[0], data[2:], shapes[2:], verdict)
    else:
        _write_cells(frame, data[-1], data[2:-1], shapes[2:-1], verdict)


@jit()
def _covers(runs: I64, pixels: Int, verdict: I32) -> bool:
    """Whether run lengths are those of a photo of so many pixels; else fill the verdict."""
    total = np.int64(0)
    for i in range(runs.size):
        if runs[i] < 0:
            verdict[0], verdict[1] = -NEGATIVE_RUN, i
            return False
        total = min(total + min(runs[i], _MOST), _MOST)
    if total != pixels:
        verdict[0], verdict[1] = -RUN_SUM, total
        return False
    return True


@jit()
def _find_target(data: U64, shapes: U64, verdict: I32, target: I64) -> bool:
    """Fill ``target``, int64 [TARGET_VALUES], or else the verdict; whether all is well.

    Inputs of the sample: one that is not looked at, int32 [VALUES] as FRAME, cell int32 [1], photo's shape int64 [2 or
    more], run lengths int64 [n].
    """
    frame = carray(as_pointer(data[1]), 1, FRAME)[0]
    if _center_is_wrong(frame, carray(as_pointer(shapes[1]), 1, np.int64)[0], verdict):
        return False
    cells = carray(as_pointer(shapes[2]), 1, np.int64)[0]
    if cells != 1:
        verdict[0], verdict[1] = -CELL_COUNT, cells
        return False
    cell = carray(as_pointer(data[2]), 1, np.int32)[0]
    if not 0 <= cell < frame.grid * frame.grid:
        verdict[0], verdict[1] = -CELL, cell
        return False
    sizes = carray(as_pointer(shapes[3]), 1, np.int64)[0]
    height, width = 0, 0
    if sizes >= 2:
        height, width = carray(as_pointer(data[3]), 2, np.int64)
    if height < 1 or width < 1:
        verdict[0] = -SHAPE
        return False
    row, column = cell // frame.grid, cell % frame.grid
    target[0], target[1] = 0, carray(as_pointer(shapes[4]), 1, np.int64)[0]
    if target[1] and not _covers(carray(as_pointer(data[4]), target[1], np.int64), height * width, verdict):
        return False
    target[2], target[4] = _edge(frame, row, frame.y), _edge(frame, row + 1, frame.y)
    target[3], target[5] = _edge(frame, column, frame.x), _edge(frame, column + 1, frame.x)
    target[6], target[7] = height, width
    return True


@jit()
def _write_target(runs: U32, target: I64, resample: int, mask: npt.NDArray[Any]) -> None:
    mask[:] = 0
    write_mask(runs, target[6], target[7], resample, mask[target[2] : target[4], target[3] : target[5]])


@callback(RUN)
def run_mask(outs: Any, _s: Any, _d: Any, _n: Any, ins: Any, in_shapes: Any, _e: Any, inputs: Any) -> None:
    """Inputs: the empty one, then as ``_find_target`` says. Outputs: mask [size, size], int32 [2]."""
    out = carray(as_pointer(outs), 2, np.uint64)
    data = carray(as_pointer(ins), inputs, np.uint64)
    target = np.empty(TARGET_VALUES, np.int64)
    verdict = carray(as_pointer(out[1]), 2, np.int32)
    if not _find_target(data, carray(as_pointer(in_shapes), inputs, np.uint64), verdict, target):
        return
    frame = carray(as_pointer(data[1]), 1, FRAME)[0]
    runs = carray(as_pointer(data[4]), target[1], np.int64).astype(np.uint32)
    shape = (frame.size, frame.size)
    if frame.itemsize == 1:
        _write_target(runs, target, frame.resample, carray(as_pointer(out[0]), shape, np.uint8))
    elif frame.itemsize == 4:
        _write_target(runs, target, frame.resample, carray(as_pointer(out[0]), shape, np.float32))
    else:
        _write_target(runs, target, frame.resample, carray(as_pointer(out[0]), shape, np.int64))
    verdict[:] = frame.size


@callback(RUN)
def run_target(outs: Any, _s: Any, _d: Any, _n: Any, ins: Any, in_shapes: Any, _e: Any, inputs: Any) -> None:
    """Inputs: as ``_find_target`` says. Outputs: where the runs end, uint32 [n]; int32 [TARGET_VALUES]."""
    out = carray(as_pointer(outs), 2, np.uint64)
    data = carray(as_pointer(ins), inputs, np.uint64)
    target = np.empty(TARGET_VALUES, np.int64)
    verdict = carray(as_pointer(out[1]), TARGET_VALUES, np.int32)
    if not _find_target(data, carray(as_pointer(in_shapes), inputs, np.uint64), verdict, target):
        return
    runs = carray(as_pointer(data[4]), target[1], np.int64).astype(np.uint32)
    add_up(runs, target[6] * target[7], carray(as_pointer(out[0]), target[1], np.uint32))
    verdict[:] = target


@callback(SETUP)
def setup(out_shapes: Any, out_ndims: Any, _n: Any, in_shapes: Any, _e: Any, _m: Any, samples: Any) -> None:
    """Of a batch: the first input's shape behind its first dimension, and a verdict."""
    dimensions = carray(as_pointer(out_ndims), 1, np.int32)[0]
    outs = carray(as_pointer(out_shapes), 2 * samples, np.uint64)
    ins = carray(as_pointer(in_shapes), samples, np.uint64)
    for sample in range(samples):
        shape = carray(as_pointer(ins[sample]), dimensions + 1, np.int64)
        carray(as_pointer(outs[sample]), dimensions, np.int64)[:] = shape[1:]
        values = TARGET_VALUES if dimensions == 1 else dimensions
        carray(as_pointer(outs[samples + sample]), 1, np.int64)[0] = values
