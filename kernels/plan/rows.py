"""Plan rows, as NumPy and Numba see them: what a sample is made of. ``nemo_dali.plan`` says how it is drawn."""

import numpy as np
import numpy.typing as npt

SINGLE, RANDOM, MINED = 0, 1, 2
KINDS = ("single", "random", "mined")

PLAN = np.dtype(
    [
        ("position", "i8"),  # place in the epoch; at or beyond the epoch's length it pads the last step
        ("ref", "i4"),  # row in the data set's /refs; with several data sets, counted through them all
        ("sentence", "i4"),  # row in /sentences, likewise
        ("kind", "u1"),  # SINGLE, RANDOM or MINED; a mined one that the warm-up turned random has RANDOM
        ("grid", "u1"),  # 1, 2 or 3 cells a side
        ("cell", "u1"),  # the target's, row-major
        ("images", "i4", (9,)),  # row in /images per cell, likewise; -1 beyond grid * grid
        ("center", "i4", (2,)),  # x, y of the crossing in pixels for 2x2; -1 otherwise
    ]
)
PlanRows = npt.NDArray[np.void]  # of dtype PLAN
