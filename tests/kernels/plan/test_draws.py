import numpy as np
import pytest

from nemo_dali.kernels.plan.draws import shuffle_keys
from nemo_dali.kernels.plan.words import multiply_high, philox


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("epoch", [0, 5])
@pytest.mark.parametrize("position", [0, 1, 123_456_789_012])
def test_words_are_numpys(seed, epoch, position):
    words = np.empty(16, np.uint64)
    for block in range(4):
        philox(np.uint64(seed), np.uint64(epoch), position, block, words[4 * block : 4 * block + 4])
    expected = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=[0, position, 0, 0]).random_raw(16)
    assert np.array_equal(words, expected)


def test_shuffle_keys_are_each_items_first_word():
    keys = np.empty(7, np.uint64)
    shuffle_keys(np.uint64(3), np.uint64(4), keys)
    expected = [np.random.Philox(key=[3, 4], counter=[0, item, 0, 0]).random_raw() for item in range(7)]
    assert keys.tolist() == [int(word) for word in expected]


def test_golden_words():
    """Should NumPy's stream ever change, ours must not."""
    words = np.empty(4, np.uint64)
    philox(np.uint64(1), np.uint64(2), 3, 0, words)
    assert words.tolist() == [2533144363980168765, 4154714089138655030, 4708083050069965526, 15439169602403406943]


def test_multiply_high():
    from numba import njit

    high = njit(lambda a, b: multiply_high(a, b))
    for a, b in ((2**64 - 1, 2**64 - 1), (2**63, 2), (12345, 67890), (0, 5)):
        assert int(high(np.uint64(a), np.uint64(b))) == a * b >> 64
