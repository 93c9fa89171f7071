"""SentenceTokens: the text of plan rows as tensors."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.plan.masking import take_tokens
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.loader.format import BatchFormat
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline import gpu
from nemo_dali.text.masking import mask_nouns, mask_tokens
from nemo_dali.text.wordpiece import PREFIX, SPECIAL, read_vocabulary

if TYPE_CHECKING:
    import torch


class Text(NamedTuple):
    """Of a batch: tokens and attention mask, int64 [n, L], and the tokens with some of them masked, or None."""

    tokens: "torch.Tensor"
    attention_mask: "torch.Tensor"
    masked: "torch.Tensor | None"

    def on(self, device_id: int) -> "Text":
        """The same on a GPU, behind what its current stream has to do."""
        masked = None if self.masked is None else gpu.send(self.masked, device_id)
        return Text(gpu.send(self.tokens, device_id), gpu.send(self.attention_mask, device_id), masked)


class SentenceTokens:
    """All sentences of a corpus, tokenised as a batch format wants them.

    Raises:
        ValueError: tokens are to be masked, and the vocabulary has no [MASK].
    """

    def __init__(self, corpus: Corpus, format: BatchFormat, *, seed: int) -> None:
        self._seed = seed
        self._tokens, self._lengths = corpus.tokens(
            format.tokenizer, format.context_length, keep_end=format.keep_end, text=format.text
        )
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
                context_length=self._tokens.shape[1],
            )

    def text(self, epoch: int, rows: PlanRows) -> Text:
        """The text of an epoch's plan rows [n], in host memory."""
        return Text(*self.of(rows), self._masked(epoch, rows))

    def of(self, rows: PlanRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """Tokens and attention mask, int64 [n, L] in host memory, of plan rows [n]."""
        import torch

        tokens, seen = np.empty((2, len(rows), self._tokens.shape[1]), np.int64)
        take_tokens(self._tokens, self._lengths, rows["sentence"], tokens, seen)
        return torch.from_numpy(tokens), torch.from_numpy(seen)

    def _masked(self, epoch: int, rows: PlanRows) -> "torch.Tensor | None":
        """Tokens, some of them masked, int64 [n, L] in host memory, of plan rows [n]; None where none are to be.

        Tokens are masked anew for each sample, nouns once for each sentence.
        """
        import torch

        sentences = rows["sentence"]
        if self._vocabulary is not None:
            return torch.from_numpy(
                mask_tokens(
                    self._tokens[sentences],
                    seed=self._seed,
                    epoch=epoch,
                    positions=rows["position"],
                    **self._vocabulary,
                )
            )
        if self._nouns is not None:
            return torch.from_numpy(
                mask_nouns(
                    self._tokens[sentences],
                    self._lengths[sentences],
                    self._nouns[sentences],
                    seed=self._seed,
                    epoch=0,
                    positions=sentences.astype(np.int64),
                )
            )
        return None
