"""By which paths DALI opens photos."""

import os

import numpy as np
import numpy.typing as npt

from nemo_dali.data.photo_file import is_unfit
from nemo_dali.data.s3 import is_remote

NOTHING = np.frombuffer(os.fsencode(f"{os.devnull}/no photo"), np.uint8)  # a path where nothing ever lies


def encode_path(path: str, *, looked_at: bool = False) -> npt.NDArray[np.uint8]:
    """A path as ``io.file.read`` takes it: its bytes, uint8 [length].

    It is NOTHING where something else lies than a file that can be a photo's: DALI then fails, where it would wait for
    ever for a FIFO's writer, deaf to an interrupt. DALI opens by path, so whatever is put there between this look and
    DALI's opening, some batches later, is opened.

    Args:
        looked_at: it was found fit before, and is not looked at again.
    """
    if not (looked_at or is_remote(path)) and is_unfit(path):
        return NOTHING
    return np.frombuffer(os.fsencode(path), np.uint8)
