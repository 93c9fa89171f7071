"""The weights of OpenCV 4's warpAffine, by the fractions of a source coordinate; ``letterbox.cpu`` has the rules."""

import numpy as np

from nemo_dali.kernels.arrays import I16

FRACTIONS = 32  # a source coordinate's steps per pixel: OpenCV's INTER_TAB_SIZE
CUBIC, LINEAR = 4, 2  # taps along one axis
ONE = 1 << 15  # fixed-point one: OpenCV's INTER_REMAP_COEF_SCALE
_SHARPNESS = np.float32(-0.75)  # of OpenCV's cubic kernel


def warp_weights(taps: int) -> I16:
    """int16 [32, 32, taps, taps]: of the fractions down and across, the weights down and across, in 1/32768."""
    x = np.arange(FRACTIONS, dtype=np.float32) / np.float32(FRACTIONS)
    one, a = np.float32(1), _SHARPNESS
    if taps == LINEAR:
        along = np.stack([one - x, x], axis=1)
    else:
        far = ((a * (x + one) - 5 * a) * (x + one) + 8 * a) * (x + one) - 4 * a
        near, behind = (((a + 2) * t - (a + 3)) * t * t + one for t in (x, one - x))
        along = np.stack([far, near, behind, one - far - near - behind], axis=1)
    products = along[:, None, :, None] * along[None, :, None, :] * np.float32(ONE)
    weights = np.clip(np.rint(products), -ONE, ONE - 1).astype(np.int64).reshape(-1, taps, taps)
    for whole in weights:
        lacking = ONE - whole.sum()
        middle = whole[taps // 2 : taps // 2 + 2, taps // 2 : taps // 2 + 2]
        middle[np.unravel_index(middle.argmax() if lacking > 0 else middle.argmin(), middle.shape)] += lacking
    return weights.astype(np.int16).reshape(FRACTIONS, FRACTIONS, taps, taps)


WEIGHTS_CUBIC, WEIGHTS_LINEAR = warp_weights(CUBIC), warp_weights(LINEAR)
