"""TokenTable: the tokens of all sentences on a GPU, where a batch's are gathered."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.device import Launch
from nemo_dali.pipeline import gpu
from nemo_dali.text.tokens import TokenRows

if TYPE_CHECKING:
    import torch

I32 = npt.NDArray[np.int32]

SHARE = 1 / 32  # of a GPU's free memory: 2.5 GB of 80, where ten million sentences of 77 tokens take 1.6
_ROWS = 2**16  # that are sent at a time


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Tokens on a GPU.

    Attributes:
        table: torch uint8 [bytes], what ``kernels.text.gpu.table_rows`` gives for all sentences.
        itemsize: bytes of a number.
        length: L, tokens of a sentence.
    """

    table: "torch.Tensor"
    itemsize: int
    length: int

    def launch_of(self, sentences: I32, taken: int) -> Launch:
        """See ``kernels.text.gpu.launch_of``."""
        from nemo_dali.kernels.text import gpu as text_gpu

        rows = np.ascontiguousarray(sentences)
        return text_gpu.launch_of(self.table.data_ptr(), self.itemsize, rows, taken, length=self.length)


def table_on(device_id: int, rows: TokenRows) -> TokenTable | None:
    """Copy the tokens of all sentences to a GPU; None if they take too much memory.

    Raises:
        NemoError: the GPU has no memory left.
    """
    from nemo_dali.kernels.text import gpu as text_gpu

    sentences, length = rows.tokens.shape
    most = gpu.free_memory(device_id) * SHARE
    if sentences * (1 + length) > most:  # too much even at a byte each: no need to read them
        return None
    rows.check_all()
    tokens, lengths = rows.tokens, rows.lengths
    dtype = np.dtype(text_gpu.table_dtype(tokens))
    width = dtype.itemsize * (1 + tokens.shape[1])
    if len(tokens) * width > most:
        return None
    pieces = (
        text_gpu.table_rows(tokens[begin : begin + _ROWS], lengths[begin : begin + _ROWS], dtype).view(np.uint8)
        for begin in range(0, len(tokens), _ROWS)
    )
    table = gpu.copy_of_pieces(pieces, len(tokens) * width, device_id)
    return TokenTable(table, dtype.itemsize, tokens.shape[1])
