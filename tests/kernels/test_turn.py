"""Photos transposed and flipped, against NumPy."""

import numpy as np
import pytest

from nemo_dali.kernels.turn import BLOCK, transpose


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (BLOCK, BLOCK), (BLOCK + 1, 2 * BLOCK - 1), (100, 61)])
@pytest.mark.parametrize(("left_to_right", "top_to_bottom"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_equals_numpy(shape, left_to_right, top_to_bottom):
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    turned = np.full((*shape[::-1], 3), 9, np.uint8)
    transpose(photo, left_to_right, top_to_bottom, turned)
    expected = photo.swapaxes(0, 1)
    axes = [axis for axis, flipped in ((1, left_to_right), (0, top_to_bottom)) if flipped]
    np.testing.assert_array_equal(turned, np.flip(expected, axes))
