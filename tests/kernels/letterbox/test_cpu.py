"""The letterbox against OpenCV 4's own calls, written as CRIS's utils/dataset.py makes them."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from nemo_dali.kernels.letterbox.cpu import warp_letterbox, write_letterbox_mask
from nemo_dali.kernels.warp_weights import warp_weights
from tests.helpers.counts import examples
from tests.helpers.oracles import letterbox_matrix


def letterbox(photo, size, border):
    out = np.full((size, size, 3), 77, np.uint8)
    warp_letterbox(photo, border[0] | border[1] << 8 | border[2] << 16, out)
    return out


def letterbox_mask(mask, size, *, soft):
    runs = coco.encode(np.asfortranarray(mask))
    counts = np.array(uncompressed(mask), np.uint32)
    assert coco.area(runs) == counts[1::2].sum()
    cell = np.full((size, size), 77, np.uint8)
    write_letterbox_mask(counts, *mask.shape, soft, cell)
    return cell


def uncompressed(mask):
    flat = np.concatenate([[0], mask.T.ravel()])
    cuts = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], cuts, [mask.size]]))


def a_photo(random, height, width):
    return random.integers(0, 256, (height, width, 3), np.uint8)


def a_mask(random, height, width):
    return cv2.resize(random.integers(0, 2, (6, 6), np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)


@pytest.mark.fuzz
@settings(max_examples=examples(80), deadline=None)
@given(height=st.integers(1, 400), width=st.integers(1, 400), size=st.integers(1, 180), seed=st.integers(0, 2**32))
def test_equals_warp_affine_for_any_size(height, width, size, seed):
    random = np.random.default_rng(seed)
    photo, mask, border = a_photo(random, height, width), a_mask(random, height, width), random.integers(0, 256, 3)
    to_frame = letterbox_matrix(height, width, size)
    expected = cv2.warpAffine(
        photo, to_frame, (size, size), flags=cv2.INTER_CUBIC, borderValue=[float(value) for value in border]
    )
    assert np.array_equal(letterbox(photo, size, border.tolist()), expected)
    soft = cv2.warpAffine(mask * 255, to_frame, (size, size), flags=cv2.INTER_LINEAR, borderValue=0.0)
    assert np.array_equal(letterbox_mask(mask, size, soft=True), soft)
    assert np.array_equal(letterbox_mask(mask, size, soft=False), soft >= 128)


@pytest.mark.parametrize("shape", [(480, 640), (427, 640), (640, 480), (333, 500), (1200, 900), (416, 416)])
@pytest.mark.parametrize("size", [416, 448])
def test_equals_warp_affine_at_the_sizes_of_cris(shape, size):
    random = np.random.default_rng(0)
    photo, mask = a_photo(random, *shape), random.integers(0, 2, shape, np.uint8)
    color = [0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255]
    expected = cv2.warpAffine(
        photo, letterbox_matrix(*shape, size), (size, size), flags=cv2.INTER_CUBIC, borderValue=color
    )
    assert np.array_equal(letterbox(photo, size, (123, 117, 104)), expected)
    soft = cv2.warpAffine(
        mask * 255, letterbox_matrix(*shape, size), (size, size), flags=cv2.INTER_LINEAR, borderValue=0.0
    )
    assert np.array_equal(letterbox_mask(mask, size, soft=True), soft)
    assert len(np.unique(soft)) > 2 or shape == (size, size)


def test_a_mask_without_an_object_is_empty():
    assert not letterbox_mask(np.zeros((30, 50), np.uint8), 40, soft=True).any()


@pytest.mark.parametrize("taps", [2, 4])
def test_weights_add_up(taps):
    assert (warp_weights(taps).astype(int).sum((2, 3)) == 32768).all()
