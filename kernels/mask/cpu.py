"""A target's mask at the output pixels, read straight from its run lengths; for the CPU, and what the GPU shares.

Run lengths are COCO's: column-major over the photo, starting with a run of zeros. The dense mask of the photo is never
made: each output column looks up only the runs of the one photo column that it shows.

``mask.kernel`` compiles ``nearest_sources`` and ``find_run`` for the GPU too.
"""

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.arrays import I32, U8, U32, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.tile import CV2_LINEAR

TARGET = np.dtype(  # where a sample's mask comes from, as the GPU sees it
    [
        ("ends_begin", "i4"),  # first row of ``ends``, uint32, where the mask's runs end; see add_up
        ("ends_count", "i4"),  # 0: the mask is empty
        ("y0", "i4"),  # the target's cell in the frame, half-open; it may be empty
        ("x0", "i4"),
        ("y1", "i4"),
        ("x1", "i4"),
        ("photo_height", "i4"),
        ("photo_width", "i4"),
        ("resample", "i4"),  # one of tile.RESAMPLE's values
        ("unused", "i4"),  # to a multiple of 8 bytes
    ]
)

Targets = npt.NDArray[np.void]  # of dtype TARGET


@jit()
def nearest_sources(source: Int, size: Int, resample: int, begin: int, out: I32) -> None:
    """Fill int32 ``out`` with the source indices that output indices from ``begin`` on show, nearest neighbours.

    With ``cv2-linear`` the index is OpenCV's INTER_NEAREST, ``floor(d * (1 / (size / source)))``; with
    ``pillow-bilinear`` it is Pillow's NEAREST, which adds up its step from half a step. The only product that is added
    to anything is that half, which is exact, so a compiler that fuses multiplication and addition changes nothing.
    """
    if resample == CV2_LINEAR:
        step = 1.0 / (size / source)
        for i in range(out.size):
            out[i] = min(int((begin + i) * step), source - 1)
    else:
        step = source / size
        position = step * 0.5
        for _ in range(begin):
            position += step
        for i in range(out.size):
            out[i] = min(int(position), source - 1)
            position += step


@jit(inline="always")
def find_run(ends: U32, begin: int, end: int, pixel: Int) -> int:
    """The first of the runs ``[begin, end)`` that ends behind ``pixel``; ``end`` if none does.

    ``ends`` is uint32, not descending from ``begin`` to ``end``.
    """
    near = min(begin + 8, end)  # mostly it is one of the next few
    while begin < near and ends[begin] <= pixel:
        begin += 1
    if begin < near:
        end = begin
    while begin < end:
        middle = (begin + end) >> 1
        if ends[middle] <= pixel:
            begin = middle + 1
        else:
            end = middle
    return begin


@jit()
def add_up(runs: U32, pixels: Int, ends: U32) -> None:
    """Fill uint32 [n] ``ends`` with the pixel behind each of ``runs``, uint32 [n], in a photo of so many pixels."""
    end = np.int64(0)
    for i in range(runs.size):
        end += np.int64(runs[i])
        ends[i] = min(end, pixels)


@jit()
def write_mask(runs: U32, height: Int, width: Int, resample: int, cell: U8) -> None:
    """Write the mask of a photo stretched to a cell.

    Args:
        runs: uint32 [n] run lengths of the photo's mask; empty for no object.
        height, width: the photo's, in pixels.
        resample: one of ``tile.RESAMPLE``'s values; its own nearest-neighbour rule applies.
        cell: uint8 [h, w], a view into the sample's mask; set to 0 and 1.
    """
    h, w = cell.shape
    cell[:] = 0
    if h == 0 or w == 0:
        return
    rows = np.empty(h, np.int32)
    columns = np.empty(w, np.int32)
    nearest_sources(height, h, resample, 0, rows)
    nearest_sources(width, w, resample, 0, columns)
    first = np.empty(height + 1, np.int32)  # first output row that shows photo row >= r
    r = 0
    for y in range(h):
        while r <= rows[y]:
            first[r] = y
            r += 1
    first[r:] = h
    ends = np.empty(runs.size, np.uint32)
    add_up(runs, height * width, ends)
    run = 0
    for x in range(w):
        if x and columns[x] == columns[x - 1]:
            cell[:, x] = cell[:, x - 1]
            continue
        top = np.int64(columns[x]) * height
        run = find_run(ends, run, ends.size, top)
        begin: Int = 0  # the current run covers rows [begin, end) of this photo column
        while run < ends.size and begin < height:
            end: Int = min(np.int64(ends[run]) - top, height)
            if run & 1:
                for y in range(first[begin], first[end]):
                    cell[y, x] = 1
            begin = end
            run += 1
        run = max(run - 1, 0)  # it may reach into the next column
