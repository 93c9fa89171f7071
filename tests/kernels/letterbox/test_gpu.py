"""The letterbox's CUDA source: on the CPU, also as PTX, and under sanitizers, compiled for every GPU; on a GPU.

What is expected comes from the CPU's kernel, which is held to OpenCV elsewhere.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemo_dali.kernels import reference
from nemo_dali.kernels.letterbox import cpu as letterbox_cpu
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mosaic import cpu as mosaic_cpu
from nemo_dali.kernels.tile import CV2_LETTERBOX, TILE
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
from tests.helpers.cuda_host import (
    GATHER_KERNELS,
    KERNELS,
    LETTERBOX_KERNELS,
    SANITIZERS,
    needs_compiler,
    run_sanitized,
    sanitized,
)
from tests.helpers.mask_batches import some_runs

DTYPES = ["float32", "float16", "bfloat16", "uint8"]
ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=WAYS)
def on_cpu(request):
    """``write(tiles, photos, frames, masks, table)``: one launch, by a single thread of the host or as PTX."""
    launch = launch_of("letterbox", request.param)
    return lambda tiles, *_: launch(tiles)


@pytest.fixture
def on_gpu():
    """The same launch on the current GPU; what stands in frames and masks before goes there and comes back."""
    import torch

    def write(tiles, photos, frames, masks, table):
        there = {}
        for name, array in (("image", frames), ("mask", masks), ("table", np.ascontiguousarray(table))):
            there[name] = torch.from_numpy(array.view(np.uint8).reshape(-1).copy()).cuda()
            tiles[name] = tiles[name] - np.uint64(array.ctypes.data) + np.uint64(there[name].data_ptr())
        photos = [torch.from_numpy(photo).cuda() for photo in photos]
        tiles["photo"] = [photo.data_ptr() for photo in photos]
        stream = torch.cuda.current_stream()
        letterbox_gpu.write_tiles(tiles, device=torch.cuda.current_device(), stream=stream.cuda_stream)
        for name, array in (("image", frames), ("mask", masks)):
            array.view(np.uint8).reshape(-1)[:] = there[name].cpu().numpy()

    return write


def check(write, shapes, cell, *, dtype="float32", soft=False, channels_last=False, margin=(0, 0), seed=0):
    """Photos of given shapes in cells of height x width that lie ``margin`` pixels inside their frames."""
    random = np.random.default_rng(seed)
    photos = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    runs = [some_runs(random, height * width) for height, width in shapes]
    table = reference.normalisation_table((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), dtype)
    frame = tuple(size + before + 2 for size, before in zip(cell, margin, strict=True))
    kind = (len(shapes), *frame, 3) if channels_last else (len(shapes), 3, *frame)
    expected_frames, expected_masks = np.full(kind, 77, table.dtype), np.full((len(shapes), *frame), 77, np.uint8)
    frames, masks = expected_frames.copy(), expected_masks.copy()
    tiles = np.zeros(len(shapes), TILE)
    tiles["frame_height"], tiles["frame_width"] = frame
    tiles["y0"], tiles["x0"] = margin
    tiles["y1"], tiles["x1"] = np.add(margin, cell)
    tiles["photo_height"], tiles["photo_width"] = np.transpose(shapes)
    tiles["table"], tiles["itemsize"], tiles["channels_last"] = table.ctypes.data, table.itemsize, channels_last
    tiles["resample"], tiles["border"], tiles["soft_mask"] = CV2_LETTERBOX, random.integers(0, 2**24), soft
    tiles["photo"] = [photo.ctypes.data for photo in photos]
    tiles["runs"], tiles["run_count"] = [array.ctypes.data for array in runs], [array.size for array in runs]
    for index, photo in enumerate(photos):
        tiles["image"][index] = expected_frames[index].ctypes.data
        tiles["mask"][index] = expected_masks[index].ctypes.data
        assert mosaic_cpu.write_tile(tiles[index], photo) == mosaic_cpu.DONE
        tiles["image"][index], tiles["mask"][index] = frames[index].ctypes.data, masks[index].ctypes.data
    write(tiles, photos, frames, masks, table)
    assert np.array_equal(masks, expected_masks)
    assert frames.tobytes() == expected_frames.tobytes()


def some(largest_photo, largest_cell):
    side = st.integers(1, largest_photo)
    return {
        "shapes": st.lists(st.tuples(side, side), min_size=1, max_size=3),
        "cell": st.tuples(st.integers(1, largest_cell), st.integers(1, largest_cell)),
        "dtype": st.sampled_from(DTYPES),
        "soft": st.booleans(),
        "channels_last": st.booleans(),
        "margin": st.tuples(st.integers(0, 9), st.integers(0, 9)),
        "seed": st.integers(0, 2**32),
    }


# Photos: heights and widths; the cell's. A photo as large as the cell, whose taps are whole; a pixel; lines; CRIS's.
SHAPES = [
    ([(60, 60)], (60, 60)),
    ([(1, 1)], (1, 1)),
    ([(1, 1)], (70, 33)),
    ([(1, 900), (900, 1)], (64, 64)),
    ([(2, 2), (3, 4)], (97, 65)),
    ([(480, 640), (640, 480), (333, 500)], (416, 416)),
]
LARGEST = [([(8192, 8192)], (480, 480)), ([(8192, 3), (3, 8192)], (480, 480)), ([(480, 640)] * 64, (416, 416))]


@pytest.mark.fuzz
@settings(ANY, max_examples=examples(300))
@example([(40, 90), (31, 7)], (64, 64), "float32", True, False, (0, 0), 0)
@given(**some(150, 100))
def test_the_source_equals_the_cpus_kernel_for_any_batch(
    on_cpu, shapes, cell, dtype, soft, channels_last, margin, seed
):
    check(on_cpu, shapes, cell, dtype=dtype, soft=soft, channels_last=channels_last, margin=margin, seed=seed)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("shapes", "cell"), SHAPES)
def test_the_source_equals_the_cpus_kernel_at_the_ends_of_what_is_allowed(on_cpu, shapes, cell, soft):
    check(on_cpu, shapes, cell, soft=soft)


def test_weights_of_masks_are_products():
    """So the source needs no table of them: whichever of the 2 x 2 pixels a mask covers, the value is the same."""
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    exact = 32 * np.stack([(32 - x) * (32 - y), x * (32 - y), (32 - x) * y, x * y], axis=-1)
    table = letterbox_cpu.WEIGHTS_LINEAR.astype(int).reshape(32, 32, 4)
    covered = 255 * (np.arange(16)[:, None] >> np.arange(4) & 1)
    assert not np.array_equal(exact, table)
    assert np.array_equal(*((weights @ covered.T + (1 << 14)) >> 15 for weights in (exact, table)))


def test_every_part_of_every_cell_is_written_by_one_block():
    random = np.random.default_rng(1)
    tiles = np.zeros(50, TILE)
    tiles["y1"], tiles["x1"] = random.choice([1, 31, 32, 33, 480], (2, 50))
    tiles["photo_height"] = tiles["photo_width"] = 9
    runs = np.array([3, 5, 100], np.uint32)
    tiles["runs"], tiles["run_count"] = runs.ctypes.data, random.integers(0, 4, 50)
    tile_of_block, lines = letterbox_gpu.blocks_of(tiles)
    assert tile_of_block.dtype == np.uint32 and lines.dtype == np.int32
    begin = 0
    for index, tile in enumerate(tiles):
        mine = np.flatnonzero(tile_of_block == index)
        assert len(mine) == -(-tile["y1"] // 32) * -(-tile["x1"] // 32) and mine[0] == tile["first_block"]
        assert tile["runs"] == begin
        begin += int(tile["y1"] + tile["x1"] + tile["run_count"])
        assert lines[begin - tile["run_count"] : begin].tolist() == [3, 8, 81][: tile["run_count"]]
    assert len(lines) == begin


def test_nothing_is_launched_without_cells():
    letterbox_gpu.write_tiles(np.zeros(0, TILE), device=0, stream=0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_source_passes_a_sanitizer(tmp_path, sanitizer):
    """No access beyond photo, lines and frame; no two threads of a block at one place without a barrier."""
    program, count = sanitized(sanitizer)
    random = np.random.default_rng(0)
    for kernel, itemsize in enumerate([1, 2, 4], len(KERNELS) + len(GATHER_KERNELS)):
        tiles = np.zeros(count, TILE)
        for low, high, frame, photo in (
            ("y0", "y1", "frame_height", "photo_height"),
            ("x0", "x1", "frame_width", "photo_width"),
        ):
            tiles[low], tiles[photo] = random.integers(0, 9, count), random.choice([1, 2, 17, 60, 90], count)
            tiles[high] = tiles[low] + random.choice([1, 5, 30, 70], count)
            tiles[frame] = tiles[high] + random.integers(0, 3, count)
        runs = [some_runs(random, int(tile["photo_height"]) * int(tile["photo_width"])) for tile in tiles]
        tiles["runs"], tiles["run_count"] = [array.ctypes.data for array in runs], [array.size for array in runs]
        tiles["photo"] = random.integers(0, 128, count)
        tiles["itemsize"], tiles["channels_last"] = itemsize, random.integers(0, 2, count)
        tiles["soft_mask"] = random.integers(0, 2, count)
        tile_of_block, lines = letterbox_gpu.blocks_of(tiles)
        run_sanitized(program, tmp_path, kernel, tiles, tile_of_block, lines=lines)


def check_compiled(report, title):
    # 64 registers: four blocks of 256 threads on a multiprocessor.
    check_report(report, title, LETTERBOX_KERNELS, registers=64)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_the_source_without_spills(tmp_path, architecture):
    check_compiled(report_of_nvcc(letterbox_gpu.SOURCE, architecture, tmp_path), f"nvcc sm_{architecture}")


@pytest.mark.parametrize("architecture", ONE_FAST)
def test_the_run_time_compiler_compiles_the_source_without_spills(architecture):
    check_compiled(report_of_run_time_compiler(letterbox_gpu.SOURCE, architecture), f"NVRTC sm_{architecture}")


@pytest.mark.fuzz
@pytest.mark.gpu
@settings(ANY, max_examples=examples(300))
@given(**some(700, 500))
def test_a_gpu_equals_the_cpus_kernel_for_any_batch(on_gpu, shapes, cell, dtype, soft, channels_last, margin, seed):
    check(on_gpu, shapes, cell, dtype=dtype, soft=soft, channels_last=channels_last, margin=margin, seed=seed)


@pytest.mark.gpu
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("shapes", "cell"), SHAPES + LARGEST)
def test_a_gpu_equals_the_cpus_kernel_at_the_ends_of_what_is_allowed(on_gpu, shapes, cell, soft):
    check(on_gpu, shapes, cell, soft=soft)
