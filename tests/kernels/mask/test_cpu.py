import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nemo_dali.kernels.mask.cpu import add_up, find_run, nearest_sources, write_mask
from nemo_dali.kernels.tile import CV2_LINEAR, PILLOW_BILINEAR
from tests.helpers.counts import examples

RULES = [CV2_LINEAR, PILLOW_BILINEAR]


def run_lengths(mask):
    """COCO's run lengths of a dense mask: column-major, zeros first."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return np.concatenate([[0], counts] if flat[0] else [counts]).astype(np.uint32)


def expected(mask, h, w, rule):
    if rule == CV2_LINEAR:
        return cv2.resize(mask, (w, h), interpolation=cv2.INTER_NEAREST)
    return np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.NEAREST))


def ours(mask, h, w, rule):
    cell = np.full((h, w), 9, np.uint8)
    write_mask(run_lengths(mask), *mask.shape, rule, cell)
    return cell


@pytest.mark.fuzz
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=examples(150), deadline=None)
@given(data=st.data())
def test_equals_the_library_for_any_mask_and_size(rule, data):
    height, width = (data.draw(st.integers(1, 300)) for _ in range(2))
    h, w = (data.draw(st.integers(1, 300)) for _ in range(2))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    density = data.draw(st.sampled_from([0.001, 0.1, 0.5, 0.999]))
    mask = (random.random((height, width)) < density).astype(np.uint8)
    assert np.array_equal(ours(mask, h, w, rule), expected(mask, h, w, rule))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(480, 480), (160, 160), (1, 1), (700, 900)])
def test_a_blob(rule, size):
    mask = np.zeros((427, 640), np.uint8)
    cv2.ellipse(mask, (300, 200), (250, 100), 30, 0, 360, 1, -1)
    cv2.rectangle(mask, (630, 300), (639, 426), 1, -1)  # touches the right and the lower edge
    assert np.array_equal(ours(mask, *size, rule), expected(mask, *size, rule))


@pytest.mark.parametrize("rule", RULES)
def test_empty_and_full(rule):
    assert (ours(np.zeros((30, 40), np.uint8), 13, 17, rule) == 0).all()
    assert (ours(np.ones((30, 40), np.uint8), 13, 17, rule) == 1).all()
    cell = np.full((5, 6), 9, np.uint8)
    write_mask(np.empty(0, np.uint32), 30, 40, rule, cell)
    assert (cell == 0).all()


def test_runs_of_no_length_and_a_missing_tail():
    """COCO's writers may split a run by an empty one, and leave out the last run of zeros."""
    cell = np.full((4, 3), 9, np.uint8)
    write_mask(np.array([2, 1, 0, 2, 1, 0], np.uint32), 4, 3, CV2_LINEAR, cell)
    assert cell.T.reshape(-1).tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_runs_beyond_the_photo_are_cut():
    cell = np.full((4, 3), 9, np.uint8)
    write_mask(np.array([10, 2**32 - 1, 5, 7], np.uint32), 4, 3, CV2_LINEAR, cell)
    assert cell.T.reshape(-1).tolist() == [0] * 10 + [1, 1]


@pytest.mark.parametrize("rule", RULES)
def test_sources_are_the_librarys_for_every_small_pair(rule):
    for source in range(1, 90):
        line = np.arange(source, dtype=np.uint8)[None]
        for size in range(1, 90):
            found = np.empty(size, np.int32)
            nearest_sources(source, size, rule, 0, found)
            assert np.array_equal(found, expected(line, 1, size, rule)[0]), (source, size)


@pytest.mark.fuzz
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=examples(200), deadline=None)
@given(
    source=st.integers(1, 8192), size=st.integers(1, 1024), cut=st.tuples(st.integers(0, 1024), st.integers(0, 1024))
)
def test_a_part_of_the_sources(rule, source, size, cut):
    begin, end = sorted(min(place, size) for place in cut)
    whole, part = np.empty(size, np.int32), np.empty(end - begin, np.int32)
    nearest_sources(source, size, rule, 0, whole)
    nearest_sources(source, size, rule, begin, part)
    assert np.array_equal(part, whole[begin:end])


@pytest.mark.fuzz
@settings(max_examples=examples(300), deadline=None)
@given(runs=st.lists(st.integers(0, 9), max_size=40), data=st.data())
def test_find_run_is_a_search_in_the_ends(runs, data):
    pixels = data.draw(st.integers(0, 200))
    ends = np.empty(len(runs), np.uint32)
    add_up(np.array(runs, np.uint32), pixels, ends)
    assert np.array_equal(ends, np.minimum(np.cumsum(runs), pixels))
    pixel = data.draw(st.integers(0, 220))
    begin, end = sorted(data.draw(st.tuples(st.integers(0, len(runs)), st.integers(0, len(runs)))))
    assert find_run(ends, begin, end, pixel) == begin + np.searchsorted(ends[begin:end], pixel, side="right")
