"""The Numba kernel against Pillow itself, and against the oracle, which the tests beside hold against Pillow too."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from nemo_dali.kernels.mosaic.pillow_bilinear import resize_pillow_bilinear
from nemo_dali.kernels.reference import resize_pillow_bilinear as resize
from tests.helpers.counts import examples

lengths = st.one_of(st.integers(1, 12), st.integers(1, 250))

# (photo height, photo width), (height, width)
SIZES = [
    ((1, 1), (1, 1)),
    ((1, 1), (6, 5)),
    ((13, 9), (1, 1)),
    ((1, 640), (1, 240)),
    ((1, 640), (33, 641)),
    ((480, 1), (240, 3)),
    ((37, 53), (37, 53)),
    ((37, 53), (37, 20)),
    ((37, 53), (90, 53)),
    ((480, 640), (240, 240)),
    ((640, 427), (161, 159)),
    ((427, 640), (480, 480)),
    ((3, 2), (301, 499)),
    ((1201, 2999), (239, 241)),
    ((1500, 2000), (17, 1000)),
    ((1, 20011), (1, 1)),
    ((20011, 202), (1, 3)),
]


def make_photo(height, width, seed):
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return photo if seed % 2 else np.where(photo > 60, np.uint8(255), np.uint8(0))


def check(photo, height, width):
    out = np.full((3, height, width), 77, np.uint8)
    resize_pillow_bilinear(photo, out)
    expected = Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(out.transpose(1, 2, 0), np.asarray(expected))
    np.testing.assert_array_equal(out.transpose(1, 2, 0), resize(photo, height, width))


@pytest.mark.parametrize("source, size", SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_pillow(source, size, seed):
    check(make_photo(*source, seed), *size)


@pytest.mark.fuzz
@settings(deadline=None, derandomize=True, max_examples=examples(200))
@given(source=st.tuples(lengths, lengths), size=st.tuples(lengths, lengths), seed=st.integers(0, 99))
def test_equals_pillow_at_any_size(source, size, seed):
    assume(source[0] <= 100 * source[1])  # beyond, Pillow goes down first from 12.2 on: see the reference's docstring
    check(make_photo(*source, seed), *size)


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_an_empty_cell_is_nothing_to_do(size):
    resize_pillow_bilinear(make_photo(3, 5, 0), np.empty((3, *size), np.uint8))


def test_writes_into_its_box_of_a_frame_and_nowhere_else():
    photo, frame = make_photo(61, 83, 1), np.full((3, 50, 60), 77, np.uint8)
    resize_pillow_bilinear(photo, frame[:, 7:39, 11:58])
    expected = np.full((50, 60, 3), 77, np.uint8)
    expected[7:39, 11:58] = np.asarray(Image.fromarray(photo).resize((47, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(frame.transpose(1, 2, 0), expected)


GUARDED = """
import ctypes, mmap
import numpy as np
from nemo_dali.kernels.mosaic.pillow_bilinear import resize_pillow_bilinear

page = mmap.PAGESIZE
protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
memory = np.frombuffer(mmap.mmap(-1, 12 * page), np.uint8)
for forbidden in (memory[:page], memory[-page:]):
    assert protect(forbidden.ctypes.data, page, 0) == 0
inside = memory[page:-page]
out = np.empty((3, 9, 9), np.uint8)
for height in range(1, 10):
    for width in (1, 2, 7, 64):
        for place in (slice(0, 3 * height * width), slice(inside.size - 3 * height * width, None)):
            resize_pillow_bilinear(inside[place].reshape(height, width, 3), out)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")
def test_reads_no_byte_outside_the_photo():
    result = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
