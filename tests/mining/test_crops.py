"""Crops: squares that cover a photo."""

import numpy as np
import pytest

from nemo_dali.mining.crops import CROPS, crop_box


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (600, 400), (333, 333), (5, 3), (1, 1)])
def test_they_are_squares_that_cover_the_photo(width, height):
    boxes = [crop_box(width, height, place) for place in range(CROPS)]
    for some, share in ((boxes[:4], 0.75), (boxes[4:], 0.55)):
        seen = np.zeros((height, width), int)
        for x0, y0, x1, y1 in some:
            assert x1 - x0 == y1 - y0 == max(round(share * min(width, height)), 1)
            assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
            seen[y0:y1, x0:x1] += 1
        assert (seen > 0).all() or min(width, height) < 4
    assert len(boxes) == CROPS == 13 and (len(set(boxes)) == 13 or width == 1 or height < 4)


@pytest.mark.parametrize("place", [-1, CROPS])
def test_there_are_no_others(place):
    with pytest.raises(ValueError, match=r"place \("):
        crop_box(640, 480, place)
