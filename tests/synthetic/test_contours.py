"""Polygons along pixels' edges, against COCO's rasteriser."""

import numpy as np
import pytest
from pycocotools import mask as coco

from nemo_dali.synthetic._contours import traced


def parts_of(mask):
    polygons = traced(mask)
    assert all(len(polygon) >= 8 for polygon in polygons)  # four numbers would be a box to pycocotools
    return coco.decode(coco.frPyObjects(polygons, *mask.shape))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8, 1.0])
def test_cocos_rasteriser_gives_the_mask_back(density):
    random = np.random.default_rng(0)
    for _ in range(60):
        mask = random.random(random.integers(1, 24, 2)) < density
        if mask.any():
            np.testing.assert_array_equal(parts_of(mask).sum(axis=2), mask)  # parts do not overlap


def test_a_ring_is_cut_where_its_hole_begins():
    y, x = np.mgrid[:60, :80]
    mask = (np.hypot(x - 40, y - 30) < 25) & (np.hypot(x - 44, y - 30) >= 10)
    parts = parts_of(mask)
    np.testing.assert_array_equal(parts.sum(axis=2), mask)
    first, second = (np.flatnonzero(parts[..., part].any(axis=0)) for part in range(2))
    assert first.max() + 1 == second.min() == np.flatnonzero(~mask[30, 20:])[0] + 20


def test_parts_that_touch_by_a_corner_are_apart():
    for mask in (np.eye(2), np.eye(2)[::-1]):
        corners = sorted(traced(mask.astype(bool)))
        assert len(corners) == 2 and all(len(part) == 8 for part in corners)
    assert traced(np.ones((2, 3), bool)) == [[0, 0, 3, 0, 3, 2, 0, 2]]
