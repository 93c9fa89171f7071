import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.kernels.mosaic.cv2_linear import write_cv2_linear
from nemo_dali.kernels.normalise import RECIPE
from nemo_dali.kernels.reference import resize_cv2_linear
from tests.helpers.counts import examples
from tests.helpers.lanes import lanes

IDENTITY = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
LOOK_UP = np.zeros(1, RECIPE)


def resize(photo, height, width, table=IDENTITY):
    cell = np.zeros((3, height, width), table.dtype)
    write_cv2_linear(photo, table, LOOK_UP, cell)
    return cell.transpose(1, 2, 0)


def photo_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("photo", [(1, 1), (1, 7), (7, 1), (2, 2), (480, 640), (427, 640), (1200, 1600), (33, 3000)])
@pytest.mark.parametrize("cell", [(1, 1), (240, 240), (160, 160), (480, 480), (3, 301), (301, 3)])
def test_equals_opencv(photo, cell):
    image = photo_of(*photo)
    expected = cv2.resize(image, cell[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(resize(image, *cell), expected.reshape(*cell, 3))


@pytest.mark.fuzz
@settings(max_examples=examples(150), deadline=None)
@given(*[st.integers(1, 700)] * 2, *[st.integers(1, 400)] * 2, st.integers(0, 2**32))
def test_equals_opencv_and_the_reference_for_any_size(height, width, h, w, seed):
    image = photo_of(height, width, seed)
    ours = resize(image, h, w)
    assert np.array_equal(ours, cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR))
    assert np.array_equal(ours, resize_cv2_linear(image, h, w))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.uint8])
def test_values_come_from_the_table_of_their_channel(dtype):
    table = np.random.default_rng(1).permutation(768).reshape(3, 256).astype(dtype)
    image = photo_of(50, 60)
    expected = cv2.resize(image, (31, 41), interpolation=cv2.INTER_LINEAR)
    ours = resize(image, 41, 31, table)
    for channel in range(3):
        assert np.array_equal(ours[..., channel], table[channel][expected[..., channel]])


def test_writes_its_cell_and_nothing_else():
    frame = np.full((3, 40, 50), 7, np.uint8)
    write_cv2_linear(np.zeros((9, 9, 3), np.uint8), IDENTITY, LOOK_UP, frame[:, 10:20, 5:48])
    inside = np.zeros((40, 50), bool)
    inside[10:20, 5:48] = True
    assert (frame[:, inside] == 0).all() and (frame[:, ~inside] == 7).all()


@pytest.mark.parametrize("cell", [(0, 5), (5, 0), (0, 0)])
def test_a_cell_without_pixels_is_left_alone(cell):
    assert resize(photo_of(5, 5), *cell).size == 0


@pytest.mark.slow
def test_no_memory_is_read_after_it_was_freed():
    """malloc overwrites what is given back, so that the kernel would read something else."""
    code = """
import cv2
import numpy as np
from nemo_dali.kernels.mosaic.cv2_linear import write_cv2_linear
from nemo_dali.kernels.normalise import RECIPE
identity = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
for seed in range(40):
    random = np.random.default_rng(seed)
    photo = random.integers(0, 256, (*random.integers(1, 300, 2), 3), dtype=np.uint8)
    height, width = random.integers(1, 200, 2).tolist()
    cell = np.zeros((3, height, width), np.uint8)
    write_cv2_linear(photo, identity, np.zeros(1, RECIPE), cell)
    expected = cv2.resize(photo, (width, height)).reshape(height, width, 3)
    assert np.array_equal(cell.transpose(1, 2, 0), expected), seed
"""
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=environment)


@pytest.mark.parametrize("shape", lanes([(1, 1), (2, 1), (40, 1), (33, 2), (7, 3), (5, 64)], fast=[(33, 2)]))
def test_reads_nothing_outside_the_photo(shape):
    """The photo ends, then begins, where a page without access does: a read beyond it ends the process."""
    code = f"""
import ctypes, mmap
import numpy as np
from nemo_dali.kernels.mosaic.cv2_linear import write_cv2_linear
from nemo_dali.kernels.normalise import RECIPE
libc = ctypes.CDLL(None)
size, page = {shape[0] * shape[1] * 3}, mmap.PAGESIZE
room = -(-size // page) * page
for at_end in (True, False):
    block = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
    for guard in (0, page + room):
        assert libc.mprotect(ctypes.c_void_p(block.ctypes.data + guard), page, 0) == 0
    begin = page + (room - size if at_end else 0)
    photo = block[begin : begin + size].reshape({shape[0]}, {shape[1]}, 3)
    for cell in (1, 20, 90):
        frame = np.zeros((3, cell, cell), np.uint8)
        write_cv2_linear(photo, np.zeros((3, 256), np.uint8), np.zeros(1, RECIPE), frame)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
