"""Memory for frames that is used again: a fresh block of 44 MB costs the kernel 11,000 page faults a batch."""

import mmap
import weakref
from contextlib import suppress

import numpy as np
import numpy.typing as npt


class FramePool:
    """Blocks of one size. A block returns to the pool when the last array or tensor that looks into it is gone.

    Args:
        nbytes: size of a block, > 0.
        spare: how many unused blocks are kept.
    """

    def __init__(self, nbytes: int, *, spare: int) -> None:
        self._nbytes = nbytes
        self._spare = spare
        self._free: list[mmap.mmap] = []

    def take(self) -> npt.NDArray[np.uint8]:
        """uint8 [nbytes], page-aligned, of undefined content."""
        try:
            block = self._free.pop()
        except IndexError:
            # Private: a forked child's batches must not change with its parent's.
            block = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(AttributeError, OSError):  # a hint that not every kernel takes
                block.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(block, np.uint8)
        # Views and tensors hold the array, not the block: its end is theirs.
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _give_back(self, block: mmap.mmap) -> None:
        if len(self._free) < self._spare:
            self._free.append(block)
