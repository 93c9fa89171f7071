import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.kernels import normalise, reference
from nemo_dali.kernels.normalise import COPY, LOOK_UP, RECIPE
from tests.helpers.counts import examples

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
number = st.floats(-2, 2, width=32)
spread = st.floats(0.0009765625, 300, width=32)


def rows(table, recipe):
    bits = table.view(f"u{table.itemsize}")
    pixels = np.random.default_rng(0).integers(0, 256, 1003, dtype=np.uint8)
    found = np.empty((3, len(pixels)), bits.dtype)
    for channel in range(3):
        normalise.normalise(pixels, channel, bits, recipe, found[channel])
    return found, bits[:, pixels]


@pytest.mark.parametrize("dtype", normalise.KINDS)
def test_the_usual_numbers_are_computed_to_the_bit(dtype):
    table = reference.normalisation_table(*IMAGENET, dtype)
    recipe = normalise.recipe_of(table, *IMAGENET, dtype)
    assert recipe["kind"] == normalise.KINDS[dtype]
    found, expected = rows(table, recipe)
    assert np.array_equal(found, expected)


@pytest.mark.fuzz
@settings(max_examples=examples(200), deadline=None)
@given(mean=st.tuples(*[number] * 3), std=st.tuples(*[spread] * 3), dtype=st.sampled_from(sorted(normalise.KINDS)))
def test_any_numbers_give_the_table(mean, std, dtype):
    """Computed or, where that would differ, looked up."""
    table = reference.normalisation_table(mean, std, dtype)
    found, expected = rows(table, normalise.recipe_of(table, mean, std, dtype))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", normalise.KINDS)
def test_a_table_that_is_not_its_numbers_is_looked_up(dtype):
    table = reference.normalisation_table(*IMAGENET, dtype).copy()
    table.view(f"u{table.itemsize}")[1, 77] ^= 1
    recipe = normalise.recipe_of(table, *IMAGENET, dtype)
    assert recipe["kind"] == LOOK_UP
    found, expected = rows(table, recipe)
    assert np.array_equal(found, expected)


def test_an_empty_recipe_looks_up():
    assert np.zeros(1, RECIPE)["kind"] == LOOK_UP != COPY
