"""The oracle against programs that others wrote: OpenCV, Pillow, pycocotools, torchvision."""

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from nemo_dali.kernels import reference
from tests.helpers.counts import examples

exact = settings(deadline=None, derandomize=True, max_examples=examples(150))
lengths = st.one_of(st.integers(1, 12), st.integers(1, 250))

# (photo height, photo width), (height, width)
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (5, 7)),
    ((9, 13), (1, 1)),
    ((1, 640), (1, 240)),
    ((1, 640), (33, 641)),
    ((480, 1), (240, 3)),
    ((37, 53), (37, 53)),
    ((37, 53), (37, 20)),
    ((37, 53), (90, 53)),
    ((480, 640), (240, 240)),
    ((640, 427), (160, 160)),
    ((427, 640), (480, 480)),
    ((200, 300), (100, 150)),
    ((3, 2), (301, 499)),
    ((1201, 2999), (239, 241)),
    ((1, 20011), (1, 1)),
    ((20011, 202), (1, 3)),
]


def make_photo(height, width, seed=0):
    """Noise; each second one of 0 and 255 only, which brings out overshoot."""
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return photo if seed % 2 else np.where(photo > 60, np.uint8(255), np.uint8(0))


def by_cv2(photo, height, width):
    return cv2.resize(photo, (width, height), interpolation=cv2.INTER_LINEAR)


def by_pillow(photo, height, width):
    return np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR))


RESIZES = {"cv2": (reference.resize_cv2_linear, by_cv2), "pillow": (reference.resize_pillow_bilinear, by_pillow)}


@pytest.mark.parametrize("ours, theirs", RESIZES.values(), ids=RESIZES)
@pytest.mark.parametrize("source, size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_resize_equals_the_original(ours, theirs, source, size, seed):
    photo = make_photo(*source, seed)
    np.testing.assert_array_equal(ours(photo, *size), theirs(photo, *size))


@pytest.mark.fuzz
@pytest.mark.parametrize("ours, theirs", RESIZES.values(), ids=RESIZES)
@exact
@given(source=st.tuples(lengths, lengths), size=st.tuples(lengths, lengths), seed=st.integers(0, 99))
def test_resize_equals_the_original_at_any_size(ours, theirs, source, size, seed):
    assume(source[0] <= 100 * source[1])  # beyond, Pillow goes down first from 12.2 on: see the module's docstring
    photo = make_photo(*source, seed)
    np.testing.assert_array_equal(ours(photo, *size), theirs(photo, *size))


@pytest.mark.parametrize("ours", [ours for ours, _ in RESIZES.values()], ids=RESIZES)
@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_an_empty_cell_has_no_pixels(ours, size):
    result = ours(make_photo(3, 5), *size)
    assert result.shape == (*size, 3) and result.dtype == np.uint8


def nearest_by_cv2(source, size):
    return cv2.resize(np.arange(source, dtype=np.uint16)[:, None], (1, size), interpolation=cv2.INTER_NEAREST)[:, 0]


def nearest_by_pillow(source, size):
    column = Image.fromarray(np.arange(source, dtype=np.int32)[:, None])
    return np.asarray(column.resize((1, size), Image.Resampling.NEAREST))[:, 0]


NEAREST = {
    "cv2": (reference.nearest_sources_cv2, nearest_by_cv2),
    "pillow": (reference.nearest_sources_pillow, nearest_by_pillow),
}


@pytest.mark.parametrize("ours, theirs", NEAREST.values(), ids=NEAREST)
def test_nearest_reads_where_the_original_reads(ours, theirs):
    large = np.random.default_rng(0).integers(1, 6000, (600, 2)).tolist()
    for source, size in [(source, size) for source in range(1, 101) for size in range(1, 101)] + large:
        sources = ours(source, size)
        assert sources.dtype == np.int32
        assert np.array_equal(sources, theirs(source, size)), (source, size)
    assert ours(10, 0).shape == (0,)


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@exact
@given(data=st.data())
def test_mask_from_runs_equals_pycocotools(data):
    height, width = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    ends = data.draw(st.lists(st.integers(0, height * width), max_size=12))  # equal ends are runs of length 0
    counts = np.diff([0, *sorted(ends), height * width]).astype(np.uint32)
    dense = coco.decode(coco.frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width))
    everything = np.arange(height, dtype=np.int32), np.arange(width, dtype=np.int32)
    np.testing.assert_array_equal(reference.mask_from_runs(counts, (height, width), *everything), dense)

    size = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    rows, columns = (reference.nearest_sources_cv2(*pair) for pair in zip((height, width), size, strict=True))
    resized = cv2.resize(dense, size[::-1], interpolation=cv2.INTER_NEAREST)
    np.testing.assert_array_equal(reference.mask_from_runs(counts, (height, width), rows, columns), resized)


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    "mean, std", [(MEAN, STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0,) * 3, (1,) * 3)]
)
def test_normalisation_table_equals_torchvision_to_the_bit(mean, std):
    import torch
    from torchvision.transforms import Compose, Normalize, ToTensor

    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    expected = Compose([ToTensor(), Normalize(mean, std)])(Image.fromarray(ramp))[:, 0]
    tables = {dtype: reference.normalisation_table(mean, std, dtype) for dtype in ("float32", "float16", "bfloat16")}
    assert {dtype: table.dtype.name for dtype, table in tables.items()} == {
        "float32": "float32",
        "float16": "float16",
        "bfloat16": "uint16",
    }
    np.testing.assert_array_equal(tables["float32"].view(np.uint32), expected.numpy().view(np.uint32))
    np.testing.assert_array_equal(tables["float16"].view(np.uint16), expected.half().numpy().view(np.uint16))
    assert torch.equal(torch.from_numpy(tables["bfloat16"]).view(torch.bfloat16), expected.bfloat16())
    np.testing.assert_array_equal(reference.normalisation_table(mean, std, "uint8"), ramp[0].T)


def test_normalisation_table_refuses_other_types():
    with pytest.raises(ValueError, match="dtype \\('float64'\\) must be"):
        reference.normalisation_table(MEAN, STD, "float64")


CENTERS = {1: [None], 2: [(48, 48), (31, 70), (0, 96), (96, 5)], 3: [None]}


@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
@pytest.mark.parametrize("grid, center", [(grid, center) for grid, centers in CENTERS.items() for center in centers])
@pytest.mark.parametrize("size", [96, 97])
def test_mosaic_is_what_its_cells_are_alone(resample, grid, center, size):
    rng = np.random.default_rng(7)
    photos = [make_photo(*rng.integers(20, 150, 2), seed) for seed in range(grid * grid)]
    cell = grid * grid - 1 if size == 96 else 0
    truth = (rng.random(photos[cell].shape[:2]) < 0.5).astype(np.uint8)
    flat = truth.T.ravel()
    ends = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    counts = np.diff(ends if flat[0] == 0 else np.concatenate([[0], ends])).astype(np.uint32)
    table = reference.normalisation_table(MEAN, STD, "float32")

    frame, mask = reference.mosaic(
        photos, grid=grid, center=center, counts=counts, cell=cell, size=size, resample=resample, table=table
    )

    third, two_thirds = size // 3, 2 * size // 3
    cuts = {1: ([], []), 2: ([center and center[0]], [center and center[1]]), 3: ([third, two_thirds],) * 2}[grid]
    bands = [band for row in np.split(frame, cuts[1], axis=1) for band in np.split(row, cuts[0], axis=2)]
    parts = [part for row in np.split(mask, cuts[1], axis=0) for part in np.split(row, cuts[0], axis=1)]
    assert len(bands) == grid * grid and mask.shape == (size, size)
    for i, (band, part) in enumerate(zip(bands, parts, strict=True)):
        height, width = part.shape
        expected = np.zeros((height, width), np.uint8)
        if not expected.size:
            continue
        if resample == "cv2-linear":
            pixels = by_cv2(photos[i], height, width)
            small = cv2.resize(truth, (width, height), interpolation=cv2.INTER_NEAREST) if i == cell else expected
        else:
            pixels = by_pillow(photos[i], height, width)
            small = Image.fromarray(truth).resize((width, height), Image.Resampling.NEAREST) if i == cell else expected
        np.testing.assert_array_equal(band, np.stack([table[c][pixels[:, :, c]] for c in range(3)]))
        np.testing.assert_array_equal(part, np.asarray(small))
