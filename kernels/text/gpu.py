"""Launches ``tokens.cu``: the tokens of a batch's sentences, from a table of all of them on the device."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.arrays import I32
from nemo_dali.kernels.device import Launch

THREADS = (128,)  # of a block

SOURCE = cuda_source.Source("text/tokens.cu", {"THREADS": THREADS[0]})


def kernel_name(itemsize: int) -> str:
    """The kernel for a table of numbers of ``itemsize`` bytes."""
    return f"take_tokens_{itemsize}"


def table_dtype(tokens: I32) -> npt.DTypeLike:
    """The smallest type of numbers in which a table can hold tokens, int32 [sentences, L], and their lengths."""
    largest = max(int(tokens.max(initial=0)), tokens.shape[1])
    return np.uint16 if largest < 2**16 and tokens.min(initial=0) >= 0 else np.int32


def table_rows(tokens: I32, lengths: I32, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Rows of the table, ``dtype`` [n, 1 + L]: each sentence's length, and its tokens."""
    rows = np.empty((len(tokens), 1 + tokens.shape[1]), dtype)
    rows[:, 0], rows[:, 1:] = lengths, tokens
    return rows


def launch_of(table: int, itemsize: int, sentences: I32, taken: int, *, length: int) -> Launch:
    """The launch that writes the tokens of a batch, and which of them a model sees.

    Args:
        table: device address of ``table_rows`` of all sentences, numbers of ``itemsize`` bytes.
        sentences: int32 [B], rows of the table.
        taken: device address of int64 [2, B, length], which is filled: tokens, and 1 for a sentence's first ones, as
            many as its length says, else 0.
    """
    samples = len(sentences)
    name = kernel_name(itemsize)
    return Launch(
        load=lambda device: cuda_source.load_kernel(SOURCE, name, device),
        blocks=(-(-samples * length // THREADS[0]),),
        threads=THREADS,
        arrays=(sentences,),
        arguments=(table, taken, taken + 8 * samples * length, np.int32(samples), np.int32(length)),
    )
