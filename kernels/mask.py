"""A target's mask at the output pixels, read straight from its run lengths; for the CPU.

Run lengths are COCO's: column-major over the photo, starting with a run of zeros. The dense mask of the photo is never
made: each output column looks up only the runs of the one photo column that it shows.
"""

from typing import Any

import numpy as np
from numba import njit

from nemo_dali.kernels.tile import CV2_LINEAR


@njit(nogil=True, cache=True, error_model="numpy")
def nearest_sources(source: int, size: int, resample: int, out: Any) -> None:
    """Fill int32 [size] with the source index that nearest-neighbour resampling shows at each output index.

    With ``cv2-linear`` the index is OpenCV's INTER_NEAREST, ``floor(d * (1 / (size / source)))``; with
    ``pillow-bilinear`` it is Pillow's NEAREST, which adds up its step from half a step.
    """
    if resample == CV2_LINEAR:
        step = 1.0 / (size / source)
        for d in range(size):
            out[d] = min(int(np.floor(d * step)), source - 1)
    else:
        step = source / size
        position = step * 0.5
        for d in range(size):
            out[d] = min(int(position), source - 1)
            position += step


@njit(nogil=True, cache=True, error_model="numpy")
def write_mask(runs: Any, height: int, width: int, resample: int, cell: Any) -> None:
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
    nearest_sources(height, h, resample, rows)
    nearest_sources(width, w, resample, columns)
    first = np.empty(height + 1, np.int32)  # first output row that shows photo row >= r
    y = 0
    for r in range(height + 1):
        while y < h and rows[y] < r:
            y += 1
        first[r] = y
    run = 0
    begin = np.int64(0)  # the current run covers pixels [begin, end), counted column by column
    end = np.int64(runs[0]) if runs.size else np.int64(0)
    for x in range(w):
        top = np.int64(columns[x]) * height
        if x and columns[x] == columns[x - 1]:
            cell[:, x] = cell[:, x - 1]
            continue
        while run < runs.size and end <= top:
            run += 1
            begin = end
            end += np.int64(runs[run]) if run < runs.size else np.int64(0)
        here, here_begin, here_end = run, begin, end
        while here < runs.size and here_begin < top + height:
            if here & 1:
                for y in range(first[max(here_begin - top, 0)], first[min(here_end - top, height)]):
                    cell[y, x] = 1
            here += 1
            here_begin = here_end
            here_end += np.int64(runs[here]) if here < runs.size else np.int64(0)
