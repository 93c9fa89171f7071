"""The gather's CUDA source: on the CPU, also as PTX, and under sanitizers, compiled for every GPU; on a GPU."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_dali.kernels.gather import cpu as gather_cpu
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.tile import TILE
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
    SANITIZERS,
    launch_gather,
    needs_compiler,
    run_sanitized,
    sanitized,
)

CHUNK = gather_gpu._CHUNK
BLOCKS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=WAYS)
def on_cpu(request):
    """``write(tiles, memory)``: one launch, by a single thread of the host or as PTX."""
    launch = launch_of("gather", request.param)
    return lambda tiles, memory: launch(tiles)


@pytest.fixture(params=["device", "pinned"])
def on_gpu(request):
    """The same launch on the current GPU: all ``memory`` goes there and comes back, or is read in place."""
    import torch

    def write(tiles, memory):
        here = torch.from_numpy(memory)
        there = here.cuda()
        photos = here.pin_memory() if request.param == "pinned" else there
        tiles = tiles.copy()
        for name, moved in (("image", there), ("table", there), ("photo", photos)):
            tiles[name] = tiles[name] - np.uint64(memory.ctypes.data) + np.uint64(moved.data_ptr())
        stream = torch.cuda.current_stream()
        gather_gpu.write_tiles(tiles, device=torch.cuda.current_device(), stream=stream.cuda_stream)
        memory[:] = there.cpu().numpy()

    return write


def batch(boxes, frame, *, itemsize, channels_last=False, samples=1, offsets=(0, 0, 0), seed=0):
    """Tiles that all lie in one piece of memory, uint8 [n], which is random: planes, table and frames.

    Args:
        boxes: half-open (y0, x0, y1, x1) of a sample's cells. frame: height and width.
        offsets: of planes, table and frames, bytes behind a multiple of 128 (planes: of each cell in turn).
    """
    random = np.random.default_rng(seed)
    tiles = np.zeros(len(boxes) * samples, TILE)
    for name, column in zip(("y0", "x0", "y1", "x1"), np.tile(boxes, (samples, 1)).T, strict=True):
        tiles[name] = column
    tiles["frame_height"], tiles["frame_width"] = frame
    tiles["itemsize"], tiles["channels_last"] = itemsize, channels_last
    begin, parts = 0, []
    sizes = 3 * (tiles["y1"] - tiles["y0"]).astype(int) * (tiles["x1"] - tiles["x0"])
    frames = np.full(samples, 3 * frame[0] * frame[1] * itemsize)
    for count, offset in ((sizes, offsets[0] + np.arange(len(tiles)) * offsets[0]), ([768 * itemsize], [offsets[1]])):
        parts.append([])
        for bytes_, skew in zip(count, offset, strict=True):
            parts[-1].append(begin + int(skew) % 128)
            begin = -(-(parts[-1][-1] + int(bytes_)) // 128) * 128
    parts.append(begin + offsets[2] + np.arange(samples) * frames[0])
    whole = random.integers(0, 256, int(begin + offsets[2] + frames.sum()) + 256, dtype=np.uint8)
    memory = whole[-whole.ctypes.data % 128 :][: whole.size - 128]
    base = memory.ctypes.data
    tiles["photo"], tiles["table"] = np.add(parts[0], base), parts[1][0] + base
    tiles["image"] = np.repeat(parts[2] + base, len(boxes))
    return tiles, memory


def check(write, tiles, memory):
    """The kernel leaves the bytes that the CPU's leaves: in the cells, and around them what was there."""
    expected, here = memory.copy(), memory.ctypes.data
    samples = np.unique(tiles["image"])
    mask = np.empty((tiles["frame_height"][0], tiles["frame_width"][0]), np.uint8)
    for image in samples:
        sample = tiles[tiles["image"] == image]
        for name in ("image", "photo", "table"):
            sample[name] = sample[name] - np.uint64(here) + np.uint64(expected.ctypes.data)
        sample["mask"] = mask.ctypes.data
        gather_cpu.write_sample(sample)
    before = memory.copy()
    write(tiles, memory)
    assert not np.array_equal(before, expected)
    assert np.array_equal(memory, expected)


def cells(grid, size):
    edges = [size * j // grid for j in range(grid + 1)]
    return [(edges[y], edges[x], edges[y + 1], edges[x + 1]) for y in range(grid) for x in range(grid)]


@st.composite
def batches(draw, largest=200):
    itemsize = draw(st.sampled_from([1, 2, 4]))
    grid = draw(st.sampled_from([1, 2, 3]))
    size = draw(st.integers(grid, largest))
    offsets = draw(st.tuples(st.integers(0, 127), st.integers(0, 15), st.integers(0, 15)))
    return batch(
        cells(grid, size),
        (size, size),
        itemsize=itemsize,
        channels_last=draw(st.booleans()),
        samples=draw(st.integers(1, 3)),
        offsets=(offsets[0], offsets[1] * itemsize, offsets[2] * itemsize),
        seed=draw(st.integers(0, 2**32)),
    )


# y0, x0, y1, x1 of a cell and the frame: what is narrow, what is wide, and where chunks end
BOXES = [
    ((0, 0, 1, 1), (1, 1)),
    ((2, 3, 3, 4), (5, 6)),
    ((1, 0, 2401, 1), (2402, 2)),
    ((0, 1, 3, 9001), (4, 9002)),
    ((0, 0, 1, CHUNK), (2, CHUNK)),
    ((0, 0, 1, CHUNK + 1), (1, CHUNK + 1)),
    ((3, 5, 67, 37), (70, 41)),  # chunks end where rows end
    ((0, 0, 138, 139), (416, 416)),
]


def check_surroundings(write, itemsize, channels_last):
    for left in range(17):
        for offset in (0, 1, 5, 16, 127):
            box = (2, left, 32, left + 40 + left)
            tiles, memory = batch(
                [box],
                (35, box[3] + 3),
                itemsize=itemsize,
                channels_last=channels_last,
                offsets=(offset, itemsize * left, itemsize * (left % 5)),
            )
            check(write, tiles, memory)


@pytest.mark.fuzz
@settings(BLOCKS, max_examples=examples(200))
@given(made=batches())
def test_the_source_equals_the_cpus_kernel_for_any_batch(on_cpu, made):
    check(on_cpu, *made)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("box", "frame"), BOXES)
def test_the_source_equals_the_cpus_kernel_for_cells_of_any_shape(on_cpu, box, frame, channels_last, itemsize):
    for offset in (0, 3):
        check(on_cpu, *batch([box], frame, itemsize=itemsize, channels_last=channels_last, offsets=(offset, 0, 0)))


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_cell_leaves_its_surroundings_alone_wherever_it_lies(on_cpu, channels_last, itemsize):
    check_surroundings(on_cpu, itemsize, channels_last)


def ends_of(tile):
    """Where the chunks of a tile end, in bytes from 128-byte line to line, by the kernel's own rule."""
    planes = 3 if tile["channels_last"] else 1
    ahead, step = int(tile["photo"]) % 128, CHUNK // planes
    size = 3 // planes * (tile["y1"] - tile["y0"]) * (tile["x1"] - tile["x0"])
    return [min(end, size) for end in range(step - ahead, int(size) + step, step)]


def test_every_chunk_of_every_cell_is_read_by_one_block():
    random = np.random.default_rng(1)
    tiles = np.zeros(300, TILE)
    tiles["photo"] = random.integers(0, 2**40, 300)
    tiles["y1"], tiles["x1"] = random.choice([1, 30, 160, 480], 300), random.integers(1, 500, 300)
    tiles["channels_last"] = random.integers(0, 2, 300)
    tile_of_block = gather_gpu.blocks_of(tiles)
    assert tile_of_block.dtype == np.uint32
    for index, tile in enumerate(tiles):
        mine = np.flatnonzero(tile_of_block == index)
        ends = ends_of(tile)
        assert len(mine) == len(ends) and mine[0] == tile["first_block"] and mine[-1] - mine[0] == len(mine) - 1
        assert all((int(tile["photo"]) + end) % 128 == 0 for end in ends[:-1])


@needs_compiler
@pytest.mark.parametrize("channels_last", [False, True])
def test_chunks_meet_where_lines_of_memory_meet(cuda_library, channels_last):
    """So each byte is read by one block, and the bus carries whole lines."""
    planes = np.zeros(3 * 150 * 137 + 256, np.uint8)
    skew = -planes.ctypes.data % 128 + 37
    table = np.ones((3, 256), np.uint8)
    frame = np.zeros(3 * 150 * 137, np.uint8)
    tile = np.zeros(1, TILE)
    tile["image"], tile["table"], tile["photo"] = frame.ctypes.data, table.ctypes.data, planes.ctypes.data + skew
    tile["y1"] = tile["frame_height"] = 150
    tile["x1"] = tile["frame_width"] = 137
    tile["itemsize"], tile["channels_last"] = 1, channels_last
    blocks, written = gather_gpu.blocks_of(tile), []
    for block in range(len(blocks)):
        frame[:] = 0
        tile["first_block"] = -block  # the launch's only block then reads this chunk
        cuda_library.run_gather(0, 1, *(ctypes.c_void_p(array.ctypes.data) for array in (tile, blocks)))
        written.append(np.flatnonzero(frame))
    assert np.array_equal(np.concatenate(written), np.arange(frame.size))
    ends = [(chunk[-1] + 1) // (3 if channels_last else 1) for chunk in written[:-1]]
    assert len(ends) > 5 and all((37 + end) % 128 == 0 for end in ends)


def test_nothing_is_launched_without_cells():
    gather_gpu.write_tiles(np.zeros(0, TILE), device=0, stream=0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_source_passes_a_sanitizer(tmp_path, sanitizer):
    """No access beyond planes, frame and shared memory; no two threads of a block at one place without a barrier."""
    program, count = sanitized(sanitizer)
    random = np.random.default_rng(0)
    for kernel, itemsize in enumerate([1, 2, 4], len(KERNELS)):
        tiles = np.zeros(count, TILE)
        for low, high, frame, photo in (
            ("y0", "y1", "frame_height", "photo_height"),
            ("x0", "x1", "frame_width", "photo_width"),
        ):
            tiles[low], tiles[photo] = random.integers(0, 9, count), random.choice([1, 5, 30, 70], count)
            tiles[high] = tiles[low] + tiles[photo]
            tiles[frame] = tiles[high] + random.integers(0, 3, count)
        tiles["photo"] = random.integers(0, 128, count) * random.integers(0, 2, count)
        tiles["itemsize"], tiles["channels_last"] = itemsize, random.integers(0, 2, count)
        run_sanitized(program, tmp_path, kernel, tiles, gather_gpu.blocks_of(tiles))


def check_compiled(report, title):
    # 64 registers: eight blocks of 128 threads on a multiprocessor; there is shared memory for as many on each.
    check_report(report, title, GATHER_KERNELS, registers=64)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_the_source_without_spills(tmp_path, architecture):
    check_compiled(report_of_nvcc(gather_gpu.SOURCE, architecture, tmp_path), f"nvcc sm_{architecture}")


@pytest.mark.parametrize("architecture", ONE_FAST)
def test_the_run_time_compiler_compiles_the_source_without_spills(architecture):
    check_compiled(report_of_run_time_compiler(gather_gpu.SOURCE, architecture), f"NVRTC sm_{architecture}")


@pytest.mark.fuzz
@pytest.mark.gpu
@settings(BLOCKS, max_examples=examples(200))
@given(made=batches(largest=500))
def test_a_gpu_equals_the_cpus_kernel_for_any_batch(on_gpu, made):
    check(on_gpu, *made)


@pytest.mark.gpu
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("box", "frame"), BOXES)
def test_a_gpu_equals_the_cpus_kernel_for_cells_of_any_shape(on_gpu, box, frame, channels_last, itemsize):
    check(on_gpu, *batch([box], frame, itemsize=itemsize, channels_last=channels_last))


@pytest.mark.gpu
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_on_a_gpu_a_cell_leaves_its_surroundings_alone(on_gpu, channels_last, itemsize):
    check_surroundings(on_gpu, itemsize, channels_last)


@needs_compiler
def test_several_threads_may_launch_on_the_host_at_a_time(cuda_library):
    """What a launch shares there is the process's, and the threads of pipelines that the host plays launch as well."""

    def write(_):
        for seed in range(10):
            check(
                lambda tiles, memory: launch_gather(cuda_library, tiles),
                *batch(cells(2, 120), (120, 120), itemsize=2, seed=seed),
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
