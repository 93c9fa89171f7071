"""A batch's tokens, and words of it masked by the random words that ``nemo_dali.text.masking`` lists."""

import numpy as np

from nemo_dali.kernels.arrays import I32, I64
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.words import below, philox
from nemo_dali.kernels.plan.words import share as share_of

_USE = 1  # of the random words
_NOUN_BLOCK = 8192 // 4  # the block that holds word 8192


@jit()
def take_tokens(tokens: I32, lengths: I32, sentences: I32, taken: I64, seen: I64) -> None:
    """Copy some sentences' tokens, and say which of them a model sees.

    Args:
        tokens, lengths: int32 [sentences, L] and [sentences]. sentences: int32 [n], rows of them.
        taken, seen: int64 [n, L], filled; ``seen`` is 1 for a sentence's first ``lengths`` tokens, else 0.
    """
    for i in range(sentences.size):
        length = lengths[sentences[i]]
        for column in range(tokens.shape[1]):
            taken[i, column] = tokens[sentences[i], column]
            seen[i, column] = column < length


@jit(error_model="python")
def replace_tokens(
    seed: np.uint64,
    epoch: np.uint64,
    positions: I64,
    share: float,
    masked: float,
    changed: float,
    mask: int,
    special: I64,
    vocabulary_size: int,
    tokens: I64,
) -> None:
    """MaskRIS's masked words, in place; see ``nemo_dali.text.masking.mask_tokens``."""
    words = np.empty(4, np.uint64)
    for row in range(tokens.shape[0]):
        for column in range(tokens.shape[1]):
            if column % 2 == 0:
                philox(seed, epoch, positions[row], column // 2, words, _USE)
            left_alone = False
            for token in special:
                left_alone |= tokens[row, column] == token
            drawn = share_of(words[column % 2 * 2])
            if left_alone or drawn >= share:
                continue
            drawn /= share
            if drawn < masked:
                tokens[row, column] = mask
            elif drawn < changed:
                tokens[row, column] = below(words[column % 2 * 2 + 1], vocabulary_size)


@jit(error_model="python")
def replace_nouns(
    seed: np.uint64, epoch: np.uint64, positions: I64, lengths: I64, runs: I64, mask: int, tokens: I64
) -> None:
    """DMMI's masked nouns, in place; see ``nemo_dali.text.masking.mask_nouns``."""
    words = np.empty(4, np.uint64)
    for row in range(tokens.shape[0]):
        count = 0
        while count < runs.shape[1] and runs[row, count, 1] > 0:
            count += 1
        if count == 0:
            continue
        philox(seed, epoch, positions[row], _NOUN_BLOCK, words, _USE)
        chosen = below(words[0], count)
        for column in range(runs[row, chosen, 0], min(runs[row, chosen, 1], lengths[row])):
            tokens[row, column] = mask
