"""One cell of one frame, as NumPy, Numba and CUDA C++ see it.

       frame  [3, frame_height, frame_width], or [frame_height, frame_width, 3] with channels_last
       0            x0            x1      frame_width
     0 ┌────────────┬─────────────┬───────┐
    y0 │            ├─────────────┤       │     the photo is stretched to the half-open box
       │            │  this cell  │       │     [y0, y1) x [x0, x1); a box may be empty
    y1 │            ├─────────────┤       │
       └────────────┴─────────────┴───────┘

Addresses are plain integers, so that a row can travel through a DALI pipeline as bytes. Whoever makes a row keeps the
memory behind them alive until the pipeline has delivered the batch. For CUDA they are device addresses.
"""

from collections.abc import Callable
from typing import cast, get_args

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import Resample as Resample
from nemo_dali.kernels.arrays import I64, Int, Integers, Record
from nemo_dali.kernels.jit import jit, python_of

CV2_LINEAR, PILLOW_BILINEAR, CV2_LETTERBOX = 0, 1, 2
RESAMPLE: dict[str, int] = dict(zip(get_args(Resample), (CV2_LINEAR, PILLOW_BILINEAR), strict=True))

TILE = np.dtype(
    [
        ("image", "u8"),  # address of the sample's frame, itemsize bytes a value
        ("mask", "u8"),  # address of the sample's mask, uint8 [frame_height, frame_width]
        ("table", "u8"),  # address of the normalisation table [3, 256] of itemsize bytes
        ("recipe", "u8"),  # address of a ``normalise.RECIPE`` that computes the table; 0: look it up; CPU only
        # Address of the target's run lengths, uint32; 0 where this cell is not the target's. For letterbox.cu where in
        # the launch's ``lines`` the cell's begin.
        ("runs", "u8"),
        ("run_count", "i8"),
        # Address of the decoded photo, uint8 [photo_height, photo_width, 3], CUDA only; or, for the gather kernels, of
        # the photo as it is to stand in the cell, uint8 [3, y1 - y0, x1 - x0].
        ("photo", "u8"),
        ("frame_height", "i4"),
        ("frame_width", "i4"),
        ("y0", "i4"),
        ("x0", "i4"),
        ("y1", "i4"),  # exclusive
        ("x1", "i4"),  # exclusive
        ("photo_height", "i4"),  # as annotated; the kernel refuses a decoded photo of another size
        ("photo_width", "i4"),
        ("itemsize", "i4"),  # bytes of one output value: 1 (uint8), 2 (float16, bfloat16), 4 (float32)
        ("resample", "i4"),  # one of RESAMPLE's values, or CV2_LETTERBOX
        ("channels_last", "i4"),  # 0 or 1
        ("border", "i4"),  # of a letterbox: red | green << 8 | blue << 16
        ("soft_mask", "i4"),  # of a letterbox: 1, its mask is 0 to 255; 0, it is 0 and 1
        ("first_block", "i4"),  # CUDA only, as the rest: which of the launch's blocks is the cell's first one,
        ("part_width", "i4"),  # and how much of the cell each of them writes
        ("part_height", "i4"),
    ]
)

TileRecords = npt.NDArray[np.void]  # of dtype TILE
Tile = Record  # of TileRecords


@jit()
def cell_edge(grid: Int, line: Int, center: Int, size: Int) -> Int:
    """Pixel of grid line ``line`` (0 to grid) along one axis: ``size * line // grid``, or the crossing of a 2x2."""
    moved = (grid == 2) & (line == 1)
    return moved * center + (1 - moved) * (size * line // grid)


@jit()
def set_frame(
    tile: Record, height: int, width: int, table: int, recipe: int, itemsize: int, resample: int, channels_last: int
) -> None:
    """Say how a cell's frame is written; the cell is all of it until another box is set."""
    tile.frame_height, tile.frame_width, tile.itemsize, tile.channels_last = height, width, itemsize, channels_last
    tile.table, tile.recipe, tile.resample = table, recipe, resample
    tile.y0, tile.x0, tile.y1, tile.x1 = 0, 0, height, width


def tile_records(
    shape: int | tuple[int, ...],
    height: int,
    width: int,
    *,
    table: int = 0,
    recipe: int = 0,
    itemsize: int = 1,
    resample: int = CV2_LINEAR,
    channels_last: bool = False,
) -> TileRecords:
    """Records of cells that cover a frame of this size each, without memory, photo and target, which are still 0."""
    tiles = np.zeros(shape, TILE)
    # A field of a record array is set in all records as compiled code sets that of one.
    python_of(set_frame)(tiles.view(np.recarray), height, width, table, recipe, itemsize, resample, int(channels_last))
    return tiles


cell_edges = cast(Callable[[Integers, Integers, Integers, Int], I64], python_of(cell_edge))  # the same for arrays
