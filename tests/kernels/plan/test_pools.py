"""The pools of many sentences against their definition, and against the window that the plan draws from."""

import numpy as np
import pytest

from nemo_dali.kernels.plan.draws import window
from nemo_dali.kernels.plan.pools import pool_begins, pool_ends, pools, valid_ends

TAUS = (-np.inf, -0.2, 0.0, 0.1, 0.3, 0.5, np.inf)


def rows(dtype, *, count=200, width=40):
    """neighbors int32 and similarity of ``dtype`` [count, width], with ties and of any length."""
    rng = np.random.default_rng(2)
    neighbors = np.full((count, width), -1, np.int32)
    similarity = np.full((count, width), -np.inf, np.float32)
    for row in range(count):
        valid = int(rng.integers(width + 1)) if row % 3 else width
        neighbors[row, :valid] = rng.permutation(width)[:valid]
        similarity[row, :valid] = np.sort(rng.choice([-0.3, -0.1, 0.0, 0.1, 0.3, 0.30000001, 0.4], valid))[::-1]
    return neighbors, similarity.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tau", TAUS)
def test_a_pool_is_what_its_definition_says(dtype, tau):
    neighbors, similarity = rows(dtype)
    valid = (neighbors >= 0).sum(axis=1)
    np.testing.assert_array_equal(valid_ends(similarity), valid)
    begins = [next((k for k, value in enumerate(row.tolist()) if value <= tau), row.size) for row in similarity]
    np.testing.assert_array_equal(pool_begins(similarity, tau), begins)
    for top_k in (1, 7, 40, 2**31 - 1):
        begin, end = pools(similarity, tau, top_k)
        assert begin.dtype == end.dtype == np.int64
        np.testing.assert_array_equal(begin, begins)
        np.testing.assert_array_equal(end, [min(b + top_k, v) for b, v in zip(begins, valid, strict=True)])
        np.testing.assert_array_equal(pool_ends(begin, valid, top_k), end)


@pytest.mark.parametrize("tau", TAUS)
def test_a_pool_is_the_window_that_the_plan_draws_from(tau):
    neighbors, similarity = rows(np.float32)
    for top_k in (1, 7, 40):
        for row, (begin, end) in enumerate(zip(*pools(similarity, tau, top_k), strict=True)):
            found = window(neighbors[row], similarity[row], top_k, tau, 0, -1)
            assert found[:2] == (begin, end) and not found[3]
