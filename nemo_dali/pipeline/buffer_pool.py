"""Reusable memory for frames: a fresh block of 44 MB costs the kernel 11,000 page faults per batch."""

import mmap
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class LentBlock:
    """A block, and the array that was made from it: once the array is gone, nothing refers to the block."""

    block: mmap.mmap
    array: "weakref.ref[npt.NDArray[Any]]"


class BufferPool:
    """Blocks of one size. A block is reused when the last array or tensor that refers to it is gone.

    No finalizers: Python may run one between any two bytecodes, and an exception raised inside it, such as
    KeyboardInterrupt, is swallowed.

    Args:
        nbytes: size of a block, > 0.
        most: how many blocks are kept; older ones are freed with their arrays.
    """

    def __init__(self, nbytes: int, *, most: int) -> None:
        self._nbytes = nbytes
        self._lent: deque[LentBlock] = deque(maxlen=most)

    def take(self) -> npt.NDArray[np.uint8]:
        """uint8 [nbytes], page-aligned, of undefined content."""
        block = self._unused() or self._new()
        array = np.frombuffer(block, np.uint8)
        # Views and tensors hold the array, not the block: it lives until they are gone.
        self._lent.append(LentBlock(block, weakref.ref(array)))
        return array

    def _unused(self) -> mmap.mmap | None:
        for lent in list(self._lent):
            if lent.array() is None:
                with suppress(ValueError):  # another thread was faster
                    self._lent.remove(lent)
                    return lent.block
        return None

    def _new(self) -> mmap.mmap:
        # Private: a forked child's batches must not change with its parent's.
        block = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a hint that not every kernel takes
            block.madvise(mmap.MADV_HUGEPAGE)
        return block
