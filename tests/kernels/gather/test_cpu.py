import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.kernels import reference
from nemo_dali.kernels.gather import cpu as gather_cpu
from nemo_dali.kernels.normalise import recipe_of
from nemo_dali.kernels.tile import RESAMPLE, TILE
from tests.helpers.counts import examples
from tests.helpers.mosaics import DTYPES, MEAN, STD, by_tiles, samples

RESIZE = {
    RESAMPLE["cv2-linear"]: reference.resize_cv2_linear,
    RESAMPLE["pillow-bilinear"]: reference.resize_pillow_bilinear,
}


def gathered(tiles, photos, frame, table):
    """``write(tiles, photos, frame, table)`` from planes that the oracle resampled."""
    planes = []
    for tile, photo in zip(tiles, photos, strict=True):
        pixels = RESIZE[tile["resample"]](photo, tile["y1"] - tile["y0"], tile["x1"] - tile["x0"])
        planes.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    sample = np.zeros(9, TILE)
    sample[: len(tiles)] = tiles
    sample["photo"][: len(tiles)] = [one.ctypes.data for one in planes]
    gather_cpu.write_sample(sample)


@pytest.mark.fuzz
@settings(max_examples=examples(120), deadline=None)
@given(sample=samples(), kind=st.sampled_from(DTYPES), compute=st.booleans())
def test_equals_the_reference_for_any_sample(sample, kind, compute):
    photos, options = sample
    options["table"] = reference.normalisation_table(MEAN, STD, kind)
    recipe = recipe_of(options["table"], MEAN, STD, kind) if compute else None
    frame, mask = by_tiles(gathered, photos, **options, recipe=recipe)
    expected_frame, expected_mask = reference.mosaic(photos, **options)
    assert frame.tobytes() == expected_frame.tobytes()
    assert np.array_equal(mask, expected_mask)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_cell_leaves_the_rest_of_the_frame_alone(channels_last):
    frame, mask = np.full((12, 10, 3) if channels_last else (3, 12, 10), 7, np.uint8), np.full((12, 10), 7, np.uint8)
    planes, table = np.ones((3, 4, 5), np.uint8), np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    tiles = np.zeros(2, TILE)
    tile = tiles[:1]
    tile["image"], tile["mask"] = frame.ctypes.data, mask.ctypes.data
    tile["table"], tile["photo"] = table.ctypes.data, planes.ctypes.data
    tile["frame_height"], tile["frame_width"], tile["itemsize"], tile["channels_last"] = 12, 10, 1, channels_last
    tile["y0"], tile["y1"], tile["x0"], tile["x1"] = 3, 7, 2, 7
    gather_cpu.write_sample(tiles)
    inside = np.zeros((12, 10), bool)
    inside[3:7, 2:7] = True
    planar = frame.transpose(2, 0, 1) if channels_last else frame
    assert (planar[:, inside] == 1).all() and (planar[:, ~inside] == 7).all()
    assert (mask[inside] == 0).all() and (mask[~inside] == 7).all()


def test_nothing_is_written_without_cells():
    gather_cpu.write_sample(np.zeros(4, TILE))
