"""The paths by which DALI opens photos."""

import os

import numpy as np
import numpy.typing as npt

from nemo_dali.data.photo_file import is_unfit
from nemo_dali.data.s3 import is_remote

NOTHING = np.frombuffer(os.fsencode(f"{os.devnull}/no photo"), np.uint8)  # a path where nothing ever is


def encode_path(path: str, *, looked_at: bool = False) -> npt.NDArray[np.uint8]:
    """A path as ``io.file.read`` takes it: its bytes, uint8 [length].

    It is NOTHING if what is there cannot be a photo's file: DALI then fails, where it would wait for ever for a FIFO's
    writer, deaf to an interrupt. DALI opens by path, so it opens whatever is put there between this check and its own
    opening, some batches later.

    Args:
        looked_at: it was found fit before, and is not checked again.
    """
    if not (looked_at or is_remote(path)) and is_unfit(path):
        return NOTHING
    return np.frombuffer(os.fsencode(path), np.uint8)
