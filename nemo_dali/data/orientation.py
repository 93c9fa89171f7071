"""EXIF's orientation: how a photo is turned from what is stored to what viewers show.

    1 not at all            5 transposed
    2 left to right         6 a quarter turn to the right
    3 half a turn           7 transposed over the other diagonal
    4 top to bottom         8 a quarter turn to the left

Decoders give photos as stored, and they are then turned by the number that ``index`` recorded. DALI 2.4 could turn them
itself (``adjust_orientation``), but only all photos or none, by tags that Pillow ignores; and damaged EXIF makes it end
the process.
"""

from typing import get_args

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import Exif

EXIF: tuple[str, ...] = get_args(Exif)

# By EXIF's number: whether a photo is transposed and then flipped left to right and top to bottom; int32 [9, 3].
# Number 0 stands for a file that does not say, so photos are turned where the number is above 1.
TURNS = np.array(
    [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)], np.int32
)


def turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height of a photo once it is turned; or, given those of a turned photo, as it is stored."""
    return (height, width) if TURNS[orientation, 0] else (width, height)


def turned_sizes(sizes: npt.NDArray[np.int32], orientation: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """The same for many photos, int32 [n, 2], whether width or height comes first."""
    return np.where(TURNS[orientation, :1], sizes[:, ::-1], sizes)


def turned_pixels(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Turn a photo as stored, uint8 [H, W, ...]; the result is contiguous, and the photo itself if nothing changes."""
    transposed, left_to_right, top_to_bottom = TURNS[orientation]
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    if left_to_right:
        pixels = pixels[:, ::-1]
    if top_to_bottom:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
