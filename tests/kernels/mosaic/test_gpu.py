"""The CUDA source: on the CPU, also as PTX, against the oracle; under sanitizers, compiled for every GPU; on a GPU."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from nemo_dali.kernels import reference
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.kernels.tile import RESAMPLE, TILE
from tests.helpers.counts import examples
from tests.helpers.cpu_launches import WAYS, launch_of
from tests.helpers.cuda_compile import (
    ARCHITECTURES,
    ONE_FAST,
    check_report,
    needs_nvcc,
    report_of_nvcc,
    report_of_run_time_compiler,
)
from tests.helpers.cuda_host import KERNELS, SANITIZERS, needs_compiler, run_sanitized, sanitized
from tests.helpers.mosaics import by_tiles, samples


@pytest.fixture(params=WAYS)
def on_cpu(request):
    """``write(tiles, photos, frame, table)``: one launch, by a single thread of the host or as PTX."""
    launch = launch_of("mosaic", request.param)

    def write(tiles, photos, frame, table):
        tiles["photo"] = [photo.ctypes.data for photo in photos]
        launch(tiles)

    return write


@pytest.fixture
def on_gpu():
    """The same launch on the current GPU; what stands in the frame before goes there and comes back."""
    import torch

    def write(tiles, photos, frame, table):
        there = [torch.from_numpy(np.ascontiguousarray(a).view(np.uint8).reshape(-1)).cuda() for a in photos]
        frame_there, table_there = (
            torch.from_numpy(a.view(np.uint8).reshape(-1).copy()).cuda() for a in (frame, np.ascontiguousarray(table))
        )
        tiles["photo"] = [photo.data_ptr() for photo in there]
        tiles["image"] = tiles["image"] - np.uint64(frame.ctypes.data) + np.uint64(frame_there.data_ptr())
        tiles["table"] = table_there.data_ptr()
        stream = torch.cuda.current_stream()
        mosaic_gpu.write_tiles(tiles, device=torch.cuda.current_device(), stream=stream.cuda_stream)
        frame.view(np.uint8).reshape(-1)[:] = frame_there.cpu().numpy()

    return write


def check(write, sample):
    photos, options = sample
    frame, _ = by_tiles(write, photos, **options)
    expected, _ = reference.mosaic(photos, **options)
    # Where the crossing of a 2x2 leaves cells without pixels nothing is lost: the other cells fill the frame.
    assert frame.tobytes() == expected.tobytes()


def one_cell(write, height, width, h, w, *, resample, dtype="uint8", margin=(0, 0), channels_last=False):
    """A photo of height x width in a box of h x w that lies ``margin`` pixels inside its frame."""
    random = np.random.default_rng(height * width + h * w)
    photo = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    table = reference.normalisation_table((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), dtype)
    top, left = margin
    frame = np.full((3, h + top + 2, w + left + 3), 7, table.dtype)
    expected = frame.copy()
    pixels = getattr(reference, "resize_" + resample.replace("-", "_"))(photo, h, w)
    for c in range(3):
        expected[c, top : top + h, left : left + w] = table[c][pixels[:, :, c]]
    if channels_last:
        frame, expected = (np.ascontiguousarray(a.transpose(1, 2, 0)) for a in (frame, expected))
    tile = np.zeros(1, TILE)
    tile["image"], tile["table"], tile["photo"] = frame.ctypes.data, table.ctypes.data, photo.ctypes.data
    tile["frame_height"], tile["frame_width"] = h + top + 2, w + left + 3
    tile["y0"], tile["y1"], tile["x0"], tile["x1"] = top, top + h, left, left + w
    tile["photo_height"], tile["photo_width"] = height, width
    tile["itemsize"], tile["resample"], tile["channels_last"] = table.itemsize, RESAMPLE[resample], channels_last
    write(tile, [photo], frame, table)
    assert frame.tobytes() == expected.tobytes()


# height, width of the photo, height, width of the cell
SIZES = [
    (1, 1, 480, 480),
    (1, 1, 1, 1),
    (480, 640, 240, 240),
    (427, 640, 160, 160),
    (640, 427, 480, 480),
    (99, 77, 480, 479),
    (480, 640, 1, 240),  # what a jittered crossing can leave of a cell
    (480, 640, 240, 1),
    (37, 8192, 5, 1),  # more weights along x than are kept at a time
    (8192, 37, 1, 5),
    (1500, 2000, 240, 240),
    (3, 8192, 2, 480),
]
LARGEST = [(8192, 8192, 3, 3), (8192, 8192, 240, 240), (2, 2, 8192, 3), (2, 2, 3, 8192)]


@pytest.mark.fuzz
@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sample=samples())
def test_the_source_equals_the_reference_for_any_sample(on_cpu, sample):
    check(on_cpu, sample)


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_source_equals_the_reference_at_the_ends_of_what_is_allowed(on_cpu, sizes, resample):
    one_cell(on_cpu, *sizes, resample=resample)


@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_a_cell_leaves_its_surroundings_alone_wherever_it_lies(on_cpu, dtype, channels_last, resample):
    for left in range(17):
        sizes = (60, 50, 23, 40 + left)
        one_cell(on_cpu, *sizes, resample=resample, dtype=dtype, margin=(2, left), channels_last=channels_last)


def boxes(random, count):
    """Tiles of one kernel in frames of their own, among them some of very different size."""
    tiles = np.zeros(count, TILE)
    for name in ("photo_height", "photo_width"):
        tiles[name] = random.choice([1, 2, 17, 60, 90], count)
    for low, high, frame in (("y0", "y1", "frame_height"), ("x0", "x1", "frame_width")):
        tiles[low] = random.integers(0, 9, count)
        tiles[high] = tiles[low] + random.choice([1, 5, 30, 70], count)
        tiles[frame] = tiles[high] + random.integers(0, 3, count)
    tiles["channels_last"] = random.integers(0, 2, count)
    return tiles


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_source_passes_a_sanitizer(tmp_path, sanitizer):
    """No access beyond photo, frame and shared memory; no two threads of a block at one place without a barrier."""
    program, count = sanitized(sanitizer)
    random = np.random.default_rng(0)
    for kernel, (resample, itemsize) in enumerate([(r, i) for r in RESAMPLE.values() for i in (1, 2, 4)]):
        tiles = boxes(random, count)
        tiles["resample"], tiles["itemsize"] = resample, itemsize
        run_sanitized(program, tmp_path, kernel, tiles, *mosaic_gpu.blocks_of(tiles))


def check_compiled(report, title):
    # 80 registers: three blocks of 256 threads on a multiprocessor.
    check_report(report, title, KERNELS, registers=80, dynamic_shared=mosaic_gpu._LARGEST_STAGE)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_the_source_without_spills(tmp_path, architecture):
    check_compiled(report_of_nvcc(mosaic_gpu.SOURCE, architecture, tmp_path), f"nvcc sm_{architecture}")


@pytest.mark.parametrize("architecture", ONE_FAST)
def test_the_run_time_compiler_compiles_the_source_without_spills(architecture):
    check_compiled(report_of_run_time_compiler(mosaic_gpu.SOURCE, architecture), f"NVRTC sm_{architecture}")


def test_a_photo_that_is_too_large_is_refused():
    tiles = boxes(np.random.default_rng(0), 2)
    tiles["photo_width"][1] = mosaic_gpu.LARGEST_PHOTO + 1
    with pytest.raises(ValueError, match="at most 8192 pixels"):
        mosaic_gpu.blocks_of(tiles)


def test_every_part_of_every_cell_is_written_by_one_block():
    random = np.random.default_rng(1)
    for resample in RESAMPLE.values():
        tiles = boxes(random, 50)
        tiles["resample"], tiles["photo_width"] = resample, random.integers(1, 8193, 50)
        tile_of_block, stage_bytes = mosaic_gpu.blocks_of(tiles)
        assert stage_bytes % 16 == 0 and stage_bytes <= mosaic_gpu._LARGEST_STAGE
        if resample == RESAMPLE["cv2-linear"]:  # each warp copies into two lines, and no more than this of either
            assert stage_bytes <= 2 * mosaic_gpu.THREADS[1] * mosaic_gpu._PHOTO_LINE
        for index, tile in enumerate(tiles):
            mine = np.flatnonzero(tile_of_block == index)
            across, down = (-(-(tile[b] - tile[a]) // tile[p]) for a, b, p in PARTS)
            assert len(mine) == across * down and mine[0] == tile["first_block"]


PARTS = [("x0", "x1", "part_width"), ("y0", "y1", "part_height")]


@pytest.mark.fuzz
@pytest.mark.gpu
@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sample=samples(largest_photo=700, largest_frame=500))
def test_a_gpu_equals_the_reference_for_any_sample(on_gpu, sample):
    check(on_gpu, sample)


@pytest.mark.gpu
@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("sizes", SIZES + LARGEST)
def test_a_gpu_equals_the_reference_at_the_ends_of_what_is_allowed(on_gpu, sizes, resample):
    one_cell(on_gpu, *sizes, resample=resample)


@pytest.mark.gpu
@pytest.mark.parametrize("resample", RESAMPLE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_on_a_gpu_a_cell_leaves_its_surroundings_alone(on_gpu, dtype, channels_last, resample):
    for left in range(17):
        sizes = (60, 50, 23, 40 + left)
        one_cell(on_gpu, *sizes, resample=resample, dtype=dtype, margin=(2, left), channels_last=channels_last)
