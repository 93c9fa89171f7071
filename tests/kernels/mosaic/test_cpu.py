import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.kernels import reference
from nemo_dali.kernels.mosaic import cpu as mosaic_cpu
from nemo_dali.kernels.normalise import recipe_of
from nemo_dali.kernels.tile import TILE
from tests.helpers.counts import examples
from tests.helpers.mosaics import DTYPES, MEAN, STD, by_tiles, samples


def write_on_cpu(tiles, photos, frame, table):
    for tile, photo in zip(tiles, photos, strict=True):
        assert mosaic_cpu.write_tile(tile, photo) == mosaic_cpu.DONE


@pytest.mark.fuzz
@settings(max_examples=examples(120), deadline=None)
@given(sample=samples(), kind=st.sampled_from(DTYPES), compute=st.booleans())
def test_equals_the_reference_for_any_sample(sample, kind, compute):
    photos, options = sample
    options["table"] = reference.normalisation_table(MEAN, STD, kind)
    recipe = recipe_of(options["table"], MEAN, STD, kind) if compute else None
    frame, mask = by_tiles(write_on_cpu, photos, **options, recipe=recipe)
    expected_frame, expected_mask = reference.mosaic(photos, **options)
    assert frame.tobytes() == expected_frame.tobytes()
    assert np.array_equal(mask, expected_mask)


def test_a_photo_of_another_size_is_refused_and_nothing_is_written():
    frame, mask = np.full((3, 8, 8), 7, np.uint8), np.full((8, 8), 7, np.uint8)
    tile = np.zeros(1, TILE)
    tile["image"], tile["mask"], tile["frame_height"], tile["frame_width"] = frame.ctypes.data, mask.ctypes.data, 8, 8
    tile["x1"] = tile["y1"] = 8
    tile["photo_height"], tile["photo_width"] = 5, 6
    for shape in ((6, 5, 3), (5, 7, 3), (4, 6, 3)):
        assert mosaic_cpu.write_tile(tile[0], np.zeros(shape, np.uint8)) == mosaic_cpu.WRONG_SIZE
    assert (frame == 7).all() and (mask == 7).all()


@pytest.mark.parametrize("address", ["run_address", "setup_address"])
def test_callbacks_have_addresses(address):
    assert getattr(mosaic_cpu, address) > 0


def test_a_tile_has_no_hidden_padding():
    """The record crosses to compiled code as bytes: its size is the sum of its fields, its fields are aligned."""
    assert TILE.itemsize == sum(TILE[name].itemsize for name in TILE.names) and TILE.itemsize % 8 == 0
    for name in TILE.names:
        kind, offset = TILE.fields[name]
        assert offset % kind.itemsize == 0
