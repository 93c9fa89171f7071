"""SentenceTokens: the text of plan rows as tensors."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError
from nemo_dali.kernels.device import CopyOnDevice, Launch
from nemo_dali.kernels.plan.masking import take_tokens
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.loader._token_table import table_on
from nemo_dali.loader.format import BatchFormat
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline import gpu
from nemo_dali.text.masking import mask_nouns, mask_tokens
from nemo_dali.text.wordpiece import PREFIX, SPECIAL, read_vocabulary

if TYPE_CHECKING:
    import torch

Int64 = npt.NDArray[np.int64]


class Text(NamedTuple):
    """A batch's text: tokens and attention mask, int64 [n, L], and the tokens with some of them masked, or None."""

    tokens: "torch.Tensor"
    attention_mask: "torch.Tensor"
    masked: "torch.Tensor | None"


def apart(taken: "torch.Tensor") -> "Iterator[torch.Tensor]":
    """The parts of a tensor along its first axis; autograd does not take a change to one for a change to another."""
    return (part.data for part in taken.unbind(0))


class SentenceTokens:
    """All sentences of a corpus, tokenised as a batch format wants them.

    On a GPU all tokens are kept there if they take no more than ``SHARE`` of its free memory, and a batch's are
    gathered there by row; else they are sent with each batch, as masked ones always are.

    Args:
        device_id: CUDA device number; None: the CPU.

    Raises:
        ValueError: tokens are to be masked, and the vocabulary has no [MASK].
    """

    def __init__(self, corpus: Corpus, format: BatchFormat, *, seed: int, device_id: int | None = None) -> None:
        self._seed, self._device_id = seed, device_id
        self._rows = corpus.tokens(format.tokenizer, format.context_length, keep_end=format.keep_end, text=format.text)
        self._length = self._rows.tokens.shape[1]
        self._vocabulary: dict[str, Any] | None = None
        self._nouns: npt.NDArray[np.int32] | None = None
        if format.masked_words == "tokens":
            ids = read_vocabulary(str(format.tokenizer).removeprefix(PREFIX)).ids
            if "[MASK]" not in ids:
                raise ValueError(f"tokenizer ({format.tokenizer!r}) must have [MASK] for masked_words='tokens'")
            special = [ids[token] for token in (*SPECIAL, "[MASK]")]
            self._vocabulary = {"mask": ids["[MASK]"], "special": special, "vocabulary_size": max(ids.values()) + 1}
        elif format.masked_words is not None:
            self._nouns = corpus.nouns(
                "textblob" if format.masked_words == "nouns" else format.masked_words,
                text=format.text,
                context_length=self._length,
            )
        self._table = None if device_id is None else table_on(device_id, self._rows)

    def text(self, epoch: int, rows: PlanRows) -> Text:
        """The text of an epoch's plan rows [n], in host memory."""
        import torch

        masked = self._masked(epoch, rows)
        return Text(*self.of(rows), None if masked is None else torch.from_numpy(masked))

    def on_device(self, epoch: int, rows: PlanRows) -> tuple[Text, list[Launch | CopyOnDevice]]:
        """The same on the GPU, of undefined content until the launches returned with it are queued."""
        import torch

        assert self._device_id is not None
        masked = self._masked(epoch, rows)
        shape = (2 if masked is None else 3, len(rows), self._length)
        try:
            taken = torch.empty(shape, dtype=torch.int64, device=gpu.place(self._device_id))
        except torch.OutOfMemoryError as error:
            raise NemoError(
                f"GPU {self._device_id} has no room for another batch's text. Lower batch_size, size or prefetch."
            ) from error
        tokens, seen, *rest = apart(taken)
        text, to = Text(tokens, seen, rest[0] if rest else None), taken.data_ptr()
        sent = [] if masked is None else [masked]
        if self._table is None:
            return text, [CopyOnDevice([self._taken(rows), *sent], to)]
        launches: list[Launch | CopyOnDevice] = [self._table.launch_of(rows["sentence"], to)]
        if masked is not None:
            launches.append(CopyOnDevice(sent, to + 2 * masked.nbytes))
        return text, launches

    def of(self, rows: PlanRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """Tokens and attention mask, int64 [n, L] in host memory, of plan rows [n]."""
        import torch

        tokens, seen = apart(torch.from_numpy(self._taken(rows)))
        return tokens, seen

    def _taken(self, rows: PlanRows) -> Int64:
        """Tokens and attention mask, int64 [2, n, L]."""
        sentences = rows["sentence"]
        self._rows.check(sentences)
        taken = np.empty((2, len(rows), self._length), np.int64)
        take_tokens(self._rows.tokens, self._rows.lengths, sentences, *taken)
        return taken

    def _masked(self, epoch: int, rows: PlanRows) -> Int64 | None:
        """Tokens, some of them masked, int64 [n, L], of plan rows [n]; None where none are to be masked.

        Tokens are masked anew for each sample, nouns once for each sentence.
        """
        sentences = rows["sentence"]
        if self._vocabulary is None and self._nouns is None:
            return None
        self._rows.check(sentences)
        if self._vocabulary is not None:
            return mask_tokens(
                self._rows.tokens[sentences],
                seed=self._seed,
                epoch=epoch,
                positions=rows["position"],
                **self._vocabulary,
            )
        if self._nouns is not None:
            return mask_nouns(
                self._rows.tokens[sentences],
                self._rows.lengths[sentences],
                self._nouns[sentences],
                seed=self._seed,
                epoch=0,
                positions=sentences.astype(np.int64),
            )
        return None
