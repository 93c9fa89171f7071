import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.kernels import normalise, reference
from nemo_dali.kernels.normalise import COPY, FUSED, LOOK_UP, RECIPE
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
    kind = normalise.KINDS[dtype]
    assert recipe["kind"] == FUSED.get(kind, kind)
    found, expected = rows(table, recipe)
    assert np.array_equal(found, expected)


def lines(table, recipe, *, first, count):
    """What ``stream_normalised`` writes ``first`` values behind a cache line's beginning, and what there must be."""
    bits = table.view(f"u{table.itemsize}")
    memory = np.full(count + 256, 7, bits.dtype)
    first += -memory.ctypes.data % 64 // memory.itemsize
    pixels = np.random.default_rng(first).integers(0, 256, count, dtype=np.uint8)
    done = normalise.stream_normalised(pixels, 1, bits, recipe, np.uint64(memory.ctypes.data + first * memory.itemsize))
    expected = np.full_like(memory, 7)
    expected[first : first + done] = bits[1, pixels[:done]]
    return memory, expected, done


@pytest.mark.parametrize("numbers", ["computed", "looked up"])
@pytest.mark.parametrize("dtype", normalise.KINDS)
def test_whole_lines_are_written_wherever_a_row_begins(dtype, numbers):
    table = reference.normalisation_table(*IMAGENET, dtype)
    recipe = normalise.recipe_of(table, *IMAGENET, dtype) if numbers == "computed" else np.zeros(1, RECIPE)
    of_line = 64 // table.itemsize
    for first in (0, 1, of_line // 2, of_line - 1):
        for count in (0, 1, of_line - 1, of_line, 5 * of_line + 3):
            found, expected, done = lines(table, recipe, first=first, count=count)
            assert np.array_equal(found, expected)
            assert done == min(-first % of_line, count) or (first + done) % of_line == 0
            assert 0 <= count - done < of_line


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_that_one_addition_does_not_round_as_torch_does_are_computed_in_full(dtype):
    """Some 300 of 1,000 such numbers are so with float16, 60 with bfloat16."""
    random, kinds = np.random.default_rng(0), set()
    for _ in range(200):
        mean, std = random.random(3).tolist(), (0.1 + 0.4 * random.random(3)).tolist()
        table = reference.normalisation_table(mean, std, dtype)
        recipe = normalise.recipe_of(table, mean, std, dtype)
        kinds.add(int(recipe["kind"][0]))
        found, expected = rows(table, recipe)
        assert np.array_equal(found, expected)
    assert kinds == {normalise.KINDS[dtype], FUSED[normalise.KINDS[dtype]]}


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
