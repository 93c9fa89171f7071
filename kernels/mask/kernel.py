"""The masks of a batch, in Numba CUDA; ``mask.gpu`` launches it.

    a sample's mask, cut among the grid's blocks of threads [columns, bands, samples]
       ┌────────┬────────┬────────┐
       │        │        │        │  a band: rows down which each thread walks
       ├────────┼────────┼────────┤
       │        │        │        │
       └────────┴────────┴────────┘
        one column per thread: neighbouring threads write neighbouring pixels

Down a column the photo's pixels come in the order of its runs. So a thread searches for the run of its first pixel, and
from there on takes the next one when a run is over. Outside the target's cell a mask is 0.

Only needed where no compiled kernel is cached: importing it takes a quarter of a second.
"""

from typing import Any

import numpy.typing as npt
from numba import cuda, int32

from nemo_dali.kernels.arrays import I32, U32
from nemo_dali.kernels.jit import python_of
from nemo_dali.kernels.mask import cpu as mask_cpu
from nemo_dali.kernels.tile import CV2_LINEAR

# Inlined by Numba: to compile a function that is called, it would ask for a GPU.
_nearest_sources = cuda.jit(device=True, inline="always")(python_of(mask_cpu.nearest_sources))
_find_run = cuda.jit(device=True, inline="always")(python_of(mask_cpu.find_run))

# A target is read as integers, which a pointer can do too; Numba reads records from arrays only.
_NAMES = mask_cpu.TARGET.names or ()
_FIELDS = len(_NAMES)
_BEGIN, _COUNT = _NAMES.index("ends_begin"), _NAMES.index("ends_count")
_Y0, _X0, _Y1, _X1 = map(_NAMES.index, ("y0", "x0", "y1", "x1"))
_HEIGHT, _WIDTH, _RESAMPLE = map(_NAMES.index, ("photo_height", "photo_width", "resample"))


@cuda.jit  # type: ignore[untyped-decorator]  # Numba's has no types
def write_masks(
    targets: I32, ends: U32, masks: npt.NDArray[Any], frame_height: int, frame_width: int, band: int
) -> None:
    """Write one column of one band of one sample's mask.

    Arrays or pointers, on the device:

    Args:
        targets: ``mask.cpu.TARGET`` [samples], viewed as int32.
        ends: uint32 [n], what the targets refer to.
        masks: [samples * frame_height * frame_width] of any type of number; set to 0 and 1.
        frame_height, frame_width: in pixels.
        band: rows of a band. A block has (threads + band) * 4 bytes of dynamic shared memory.
    """
    sources = cuda.shared.array(0, int32)  # photo column per thread, then photo row per row of the band
    thread, threads, sample = cuda.threadIdx.x, cuda.blockDim.x, cuda.blockIdx.z
    left, upper = cuda.blockIdx.x * threads, cuda.blockIdx.y * band
    x, lower = left + thread, min(upper + band, frame_height)
    at = sample * _FIELDS
    begin, resample, height = targets[at + _BEGIN], targets[at + _RESAMPLE], targets[at + _HEIGHT]
    end = begin + targets[at + _COUNT]
    top, bottom, first, last = targets[at + _Y0], targets[at + _Y1], targets[at + _X0], targets[at + _X1]
    # The part of the cell that this block covers.
    y0, y1, x0, x1 = max(upper, top), min(lower, bottom), max(left, first), min(left + threads, last)
    pixel = 0  # of the photo, the top one of this thread's column
    if begin < end and y0 < y1 and x0 < x1:
        h, w, width = bottom - top, last - first, targets[at + _WIDTH]
        if resample == CV2_LINEAR:
            if x0 <= x and x < x1:
                _nearest_sources(width, w, resample, x - first, sources[thread : thread + 1])
            for i in range(threads + thread, threads + y1 - y0, threads):
                _nearest_sources(height, h, resample, y0 - top + i - threads, sources[i : i + 1])
        else:  # a sum of many steps: one thread for the columns, another for the rows
            if thread == 0:
                _nearest_sources(width, w, resample, x0 - first, sources[x0 - left : x1 - left])
            if thread == threads - 1:
                _nearest_sources(height, h, resample, y0 - top, sources[threads : threads + y1 - y0])
        cuda.syncthreads()
        if x0 <= x and x < x1:
            pixel = sources[thread] * height
        else:
            y1 = y0
    else:
        y1 = y0
    if x >= frame_width:
        return
    at = (sample * frame_height + upper) * frame_width + x
    run, run_end, run_value = begin, 0, 0
    for y in range(upper, lower):
        value = 0
        if y0 <= y and y < y1:
            here = pixel + sources[threads + y - y0]
            if here >= run_end:
                run = _find_run(ends, run, end, here)
                if run < end:
                    run_end, run_value = ends[run], (run - begin) & 1
                else:  # the last run of zeros may be left out
                    run_end, run_value = here + height, 0
            value = run_value
        masks[at] = value
        at += frame_width
