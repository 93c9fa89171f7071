"""Black squares on photos, as in RMSIN: on which samples' photos, how many, and where.

Like the plan, a sample's squares are a pure function: of (seed, epoch, position) and of its photo's width. Their random
words are those of ``numpy.random.Philox(key=[seed, epoch], counter=[0, position, 2, 0])``; the plan's have 0 in place
of the 2, and those of masked words 1. A number below n is the high word of ``word * n``; a share is the upper 53 bits
of a word.

    word       use
    0          whether there are squares
    1          how many
    2 + 2 i    y of square i
    3 + 2 i    x of square i

They are put on the target's photo before it is resized to its frame or to its cell of a mosaic: RMSIN does it where a
ref's photo is opened. Negatives and all masks stay as they are.
"""

import numpy as np
import numpy.typing as npt

SIDE = 32  # of a square, in pixels of the photo
FEWEST, MOST = 20, 60  # on a photo that has any

Corners = npt.NDArray[np.float32]


def black_squares(
    positions: npt.NDArray[np.int64], widths: npt.NDArray[np.int32], *, seed: int, epoch: int, share: float
) -> list[Corners]:
    """The squares on each sample's photo.

    Args:
        positions: int64 [B], each sample's place in the epoch.
        widths: int32 [B], of the photos. y, too, is drawn from the width: what falls below the photo, or to its right,
            is not seen.
        share: fraction of the samples that have squares, 0 to 1.

    Returns:
        For each sample float32 [squares, 2] (or [0, 2]): y and x of the upper left corners, whole numbers of pixels.
    """
    found = []
    for position, width in zip(positions.tolist(), widths.tolist(), strict=True):
        draws = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, position, 2, 0])
        words = draws.random_raw(2 + 2 * MOST)
        count = 0
        if (int(words[0]) >> 11) * 2.0**-53 < share:
            count = FEWEST + (int(words[1]) * (MOST - FEWEST + 1) >> 64)
        places = max(width - SIDE + 1, 1)
        corners = [int(word) * places >> 64 for word in words[2 : 2 + 2 * count]]
        found.append(np.array(corners, np.float32).reshape(-1, 2))
    return found
