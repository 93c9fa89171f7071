"""Words of a batch's sentences masked, by the random words that ``nemo_dali.text.masking`` lists."""

import numpy as np

from nemo_dali.kernels.arrays import I64, U64, Int
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.words import multiply_high

_NOUN_BLOCK = np.uint64(8192 // 4 + 1)  # the block that holds word 8192; a counter is raised before its block is made


@jit(error_model="python")
def _draw(key0: np.uint64, key1: np.uint64, position: Int, counter: Int, words: U64) -> None:
    """Write the block that ``Philox(key=[key0, key1])`` makes of the counter [counter, position, 1, 0].

    ``kernels.plan.words.philox`` has 0 in place of the 1.
    """
    c0, c1, c2, c3 = np.uint64(counter), np.uint64(position), np.uint64(1), np.uint64(0)
    m0, m1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    for _ in range(10):
        high0, low0 = multiply_high(m0, c0), m0 * c0
        high1, low1 = multiply_high(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += np.uint64(0x9E3779B97F4A7C15)
        key1 += np.uint64(0xBB67AE8584CAA73B)
    words[0], words[1], words[2], words[3] = c0, c1, c2, c3


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
                _draw(seed, epoch, positions[row], column // 2 + 1, words)
            left_alone = False
            for token in special:
                left_alone |= tokens[row, column] == token
            drawn = np.float64(words[column % 2 * 2] >> np.uint64(11)) * 2.0**-53
            if left_alone or drawn >= share:
                continue
            drawn /= share
            if drawn < masked:
                tokens[row, column] = mask
            elif drawn < changed:
                tokens[row, column] = multiply_high(words[column % 2 * 2 + 1], np.uint64(vocabulary_size))


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
        _draw(seed, epoch, positions[row], _NOUN_BLOCK, words)
        chosen = multiply_high(words[0], np.uint64(count))
        for column in range(runs[row, chosen, 0], min(runs[row, chosen, 1], lengths[row])):
            tokens[row, column] = mask
