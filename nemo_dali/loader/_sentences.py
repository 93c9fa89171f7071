"""SentenceTokens: the text of plan rows as tensors."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.loader.options import BatchFormat
from nemo_dali.loader.sources import Corpus
from nemo_dali.text.masking import mask_nouns, mask_tokens
from nemo_dali.text.wordpiece import PREFIX, SPECIAL, read_vocabulary

if TYPE_CHECKING:
    import torch


class SentenceTokens:
    """All sentences of a corpus, tokenised as a batch format wants them.

    Raises:
        ValueError: tokens are to be masked, and the tokenizer is not BERT's.
    """

    def __init__(self, corpus: Corpus, format: BatchFormat, *, seed: int) -> None:
        self._seed = seed
        self._tokens, self._lengths = corpus.tokens(
            format.tokenizer, format.context_length, keep_end=format.keep_end, text=format.text
        )
        self._vocabulary: dict[str, Any] | None = None
        self._nouns: npt.NDArray[np.int32] | None = None
        if format.masked_words == "tokens":
            if not isinstance(format.tokenizer, str) or not format.tokenizer.startswith(PREFIX):
                raise ValueError("masked_words ('tokens') must be used with a tokenizer 'bert:...'")
            ids = read_vocabulary(format.tokenizer.removeprefix(PREFIX)).ids
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

    def of(self, rows: PlanRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """Tokens and attention mask, int64 [n, L] in host memory, of plan rows [n]."""
        import torch

        sentences = rows["sentence"]
        seen = np.arange(self._tokens.shape[1]) < self._lengths[sentences, None]
        tokens = self._tokens[sentences].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(seen.astype(np.int64))

    def masked(self, epoch: int, rows: PlanRows) -> "torch.Tensor | None":
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
