"""Photos that are transposed, as EXIF has it with those taken upright; for the CPU. On a GPU DALI's operators do it."""

from typing import Any

import numpy as np
from numba import carray

from nemo_dali.kernels.arrays import U8, Int
from nemo_dali.kernels.jit import callback, jit
from nemo_dali.kernels.mosaic.cpu import RUN, SETUP
from nemo_dali.kernels.stores import as_pointer

BLOCK = 16  # pixels a side of what is turned at a time, so that the lines of both photos stay in the first cache


@jit()
def transpose(photo: U8, left_to_right: Int, top_to_bottom: Int, turned: U8) -> None:
    """Transpose a photo, and then flip it.

    Args:
        photo: uint8 [H, W, 3].
        left_to_right, top_to_bottom: 0 or 1, what to flip.
        turned: uint8 [W, H, 3], written into.
    """
    height, width, _ = turned.shape
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            for y in range(top, min(top + BLOCK, height)):
                column = height - 1 - y if top_to_bottom else y
                for x in range(left, min(left + BLOCK, width)):
                    row = width - 1 - x if left_to_right else x
                    for c in range(3):
                        turned[y, x, c] = photo[row, column, c]


@callback(RUN)
def run_address(outs: Any, _s: Any, _d: Any, _n: Any, ins: Any, in_shapes: Any, _e: Any, _m: Any) -> None:
    """Of one photo: inputs uint8 [H, W, 3] and int32 [3], the last two of them the flips; output uint8 [W, H, 3]."""
    out = carray(as_pointer(outs), 1, np.uint64)
    data = carray(as_pointer(ins), 2, np.uint64)
    shape = carray(as_pointer(carray(as_pointer(in_shapes), 2, np.uint64)[0]), 3, np.int64)
    photo = carray(as_pointer(data[0]), (shape[0], shape[1], 3), np.uint8)
    flips = carray(as_pointer(data[1]), 3, np.int32)
    transpose(photo, flips[1], flips[2], carray(as_pointer(out[0]), (shape[1], shape[0], 3), np.uint8))


@callback(SETUP)
def setup_address(out_shapes: Any, _d: Any, _n: Any, in_shapes: Any, _e: Any, _m: Any, samples: Any) -> None:
    """Of a batch: every photo's height and width change places."""
    outs = carray(as_pointer(out_shapes), samples, np.uint64)
    ins = carray(as_pointer(in_shapes), samples, np.uint64)
    for sample in range(samples):
        shape, turned = carray(as_pointer(ins[sample]), 3, np.int64), carray(as_pointer(outs[sample]), 3, np.int64)
        turned[0], turned[1], turned[2] = shape[1], shape[0], shape[2]
