"""What several tests of rankings share."""

import numpy as np


def unit(rng, rows, width):
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def check_ranking(text, image, own, depth, neighbors, similarity):
    """Check against all similarities in float64, up to ties within 1e-6; equal float32 similarities by row."""
    exact = text.astype(np.float64) @ image.astype(np.float64).T
    width = min(depth, len(image) - 1)
    assert neighbors.shape == similarity.shape == (len(text), width)
    assert neighbors.dtype == np.int32 and similarity.dtype == np.float32
    for row in range(len(text)):
        assert own[row] not in neighbors[row] and len(set(neighbors[row].tolist())) == width
        np.testing.assert_allclose(similarity[row], exact[row, neighbors[row]], rtol=0, atol=1e-6)
        best = np.sort(np.delete(exact[row], own[row]))[::-1][:width]
        np.testing.assert_allclose(similarity[row], best, rtol=0, atol=1e-6)
        step = np.diff(similarity[row])
        assert (step <= 0).all() and (np.diff(neighbors[row])[step == 0] > 0).all()
