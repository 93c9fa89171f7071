"""Sentences as tokens: CLIP's and BERT's tokenizers, masked words, and position words."""

from typing import TYPE_CHECKING

from nemo_dali._lazy import lazy_names

if TYPE_CHECKING:
    from nemo_dali.text.masking import mask_nouns as mask_nouns
    from nemo_dali.text.masking import mask_tokens as mask_tokens
    from nemo_dali.text.masking import noun_runs as noun_runs
    from nemo_dali.text.tokens import tokenize as tokenize

__all__ = ["mask_nouns", "mask_tokens", "noun_runs", "tokenize"]

__getattr__, __dir__ = lazy_names(
    __name__, {"mask_nouns": "masking", "mask_tokens": "masking", "noun_runs": "masking", "tokenize": "tokens"}
)
