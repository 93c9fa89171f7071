"""The GPU operators: on a GPU, and elsewhere with its part played by the host, as tests/loader/test_cuda.py tells."""

import ctypes
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, fn, types

import nemo_dali.fn
from nemo_dali import NemoError
from nemo_dali.kernels import device, reference
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mask.cpu import TARGET, write_mask
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.pipeline import fn_cpu, fn_gpu, gpu
from tests.helpers import cuda_host
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.operator_graphs import (
    BATCH,
    CENTERS,
    CONDITIONS,
    RESAMPLINGS,
    assert_conditionals_work,
    assert_equal,
    failures,
    feed,
    oracle,
    random_photos,
    random_runs,
    run,
)


def masks_on_host(targets, ends, masks, samples, *, frame_height, frame_width, dtype, **_):
    """``mask.gpu.write_masks`` where addresses are the host's."""
    targets = np.ctypeslib.as_array(ctypes.cast(targets, ctypes.POINTER(ctypes.c_uint8)), (samples * TARGET.itemsize,))
    shape = (samples, frame_height, frame_width)
    size = np.dtype(dtype).itemsize * np.prod(shape)
    frames = np.ctypeslib.as_array(ctypes.cast(masks, ctypes.POINTER(ctypes.c_uint8)), (size,)).view(dtype)
    frames = frames.reshape(shape)
    frames[:] = 0
    for frame, target in zip(frames, targets.view(TARGET), strict=True):
        runs = np.array([], np.uint32)
        if count := int(target["ends_count"]):
            at = ctypes.cast(ends + 4 * int(target["ends_begin"]), ctypes.POINTER(ctypes.c_uint32))
            runs = np.diff(np.ctypeslib.as_array(at, (count,)).astype(np.int64), prepend=0).astype(np.uint32)
        cell = frame[target["y0"] : target["y1"], target["x0"] : target["x1"]]
        write_mask(runs, target["photo_height"], target["photo_width"], target["resample"], cell)


@pytest.fixture
def played(monkeypatch, cuda_library):
    """The operators of the GPU then stand in for the CPU's."""
    import nvidia.dali.python_function_plugin as plugin
    from nvidia.dali.data_node import DataNode

    call = fn.dl_tensor_python_function
    monkeypatch.setattr(fn_cpu, "mosaic", fn_gpu.mosaic)
    monkeypatch.setattr(fn_cpu, "mask", fn_gpu.mask)
    monkeypatch.setattr(gpu, "cuda_device", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(DataNode, "gpu", lambda node: node)
    monkeypatch.setattr(
        fn, "dl_tensor_python_function", lambda *inputs, device="cpu", **options: call(*inputs, **options)
    )
    monkeypatch.setattr(plugin, "current_dali_stream", lambda: 0)
    monkeypatch.setattr(gpu, "place", lambda number: torch.device("cpu"))
    monkeypatch.setattr(device, "torch_stream", lambda device, address: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(mosaic_gpu, "write_tiles", lambda tiles, **_: cuda_host.launch(cuda_library, tiles))
    monkeypatch.setattr(device, "upload", lambda arrays, **_: (arrays, [array.ctypes.data for array in arrays]))
    monkeypatch.setattr(mask_gpu, "write_masks", masks_on_host)
    fn_gpu._table_on.cache_clear()
    yield
    fn_gpu._table_on.cache_clear()


def gpu_graph(steps, runs, centers, *, size, resample, send):
    """Mosaics and masks of every kind; ``send`` takes photos to the device."""
    count = len(steps[0])
    grid = {1: 1, 4: 2, 9: 3}[count]
    photos = [send(feed(*(step[i] for step in steps))) for i in range(count)]
    counts, sizes = feed(*runs), feed(*([np.array(p.shape) for p in step[count - 1]] for step in steps))
    options = {"size": size, "resample": resample}
    options |= {"center": feed(*centers)} if grid == 2 else {}
    frames = [
        nemo_dali.fn.mosaic(photos, dtype=dtype, channels_last=last, **options)
        for dtype, last in (("float32", False), ("float16", True), ("uint8", False))
    ]
    masks = [
        nemo_dali.fn.remap_mask(counts, sizes, cell=count - 1, grid=grid, dtype=dtype, **options | PLACE[send])
        for dtype in ("uint8", "int64", "float32")
    ]
    return (*frames, *masks)


def stay(node):
    return node


def go(node):
    return node.gpu()


PLACE = {stay: {}, go: {"device": "gpu"}}


def assert_gpu_draws_the_oracles(count, resample, send, device_id):
    random = np.random.default_rng(count)
    steps = [random_photos(random, count) for _ in range(3)]
    runs = [[random_runs(random, *photo.shape[:2]) for photo in step[count - 1]] for step in steps]
    runs[1][0] = np.array([], np.uint32)
    runs[2] = [np.array([], np.uint32)] * BATCH  # nothing at all for the GPU
    centers = [[np.array(center, np.int64) for center in CENTERS[i : i + BATCH]] for i in (1, 2, 4)]
    outputs, layouts = run(
        lambda: gpu_graph(steps, runs, centers, size=64, resample=resample, send=send),
        steps=3,
        device_id=device_id,
        prefetch_queue_depth=3,
    )
    assert layouts == ["CHW", "HWC", "CHW", "HW", "HW", "HW"]
    for step, output in enumerate(outputs):
        for i in range(BATCH):
            options = {"size": 64, "resample": resample, "center": tuple(centers[step][i])}
            mask = np.zeros((64, 64), np.uint8)
            if len(runs[step][i]):
                _, mask = oracle(steps[step], i, counts=runs[step][i], cell=count - 1, **options)
            expected = [
                *(
                    oracle(steps[step], i, dtype=dtype, last=last, **options)[0]
                    for dtype, last in (("float32", False), ("float16", True), ("uint8", False))
                ),
                *(mask.astype(dtype) for dtype in ("uint8", "int64", "float32")),
            ]
            assert_equal([frames[i] for frames in output], expected)


@needs_compiler
@pytest.mark.parametrize("resample", RESAMPLINGS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_gpus_way_ends_in_the_oracles_frames(count, resample, played):
    assert_gpu_draws_the_oracles(count, resample, stay, None)


@needs_compiler
@pytest.mark.parametrize("flags", CONDITIONS)
def test_the_gpus_way_works_inside_conditionals(flags, played):
    assert_conditionals_work(flags)


@needs_compiler
def test_the_gpus_way_takes_numbers_as_large_as_they_come(played):
    """Their product is beyond 64 bits, and they are the shape of a tensor."""
    height = width = 8192
    runs = [random_runs(np.random.default_rng(13), height, width)] * BATCH
    ((masks,),), _ = run(
        lambda: nemo_dali.fn.remap_mask(feed(runs), (height, width), cell=3, grid=2, size=1000, center=(900, 900))
    )
    rows, columns = (reference.nearest_sources_cv2(8192, 100) for _ in range(2))
    expected = np.zeros((1000, 1000), np.uint8)
    expected[900:, 900:] = reference.mask_from_runs(runs[0], (height, width), rows, columns)
    assert_equal(masks, [expected] * BATCH)


@needs_compiler
def test_with_a_fixed_crossing_the_gpus_way_is_the_same(played):
    photos = random_photos(np.random.default_rng(10), 4)
    (((frames,),), _) = run(lambda: nemo_dali.fn.mosaic([feed(b) for b in photos], size=40, center=(40, 13)))
    assert_equal(frames, [oracle(photos, i, size=40, center=(40, 13))[0] for i in range(BATCH)])


@needs_compiler
@pytest.mark.parametrize("name", failures())
def test_the_gpus_way_names_a_sample_that_cannot_be_drawn(name, played):
    graph, text = failures()[name]
    with pytest.raises(RuntimeError, match=text):
        run(graph)


@needs_compiler
def test_the_gpus_way_refuses_photos_of_another_type_and_too_large_ones(played):
    floats = [np.zeros((4, 4, 3), np.float32)] * BATCH
    with pytest.raises(RuntimeError, match=r"images\[0\] must be uint8, not numbers of 32 bits"):
        run(lambda: nemo_dali.fn.mosaic([feed(floats)], size=20))
    with pytest.raises(RuntimeError, match="at most 8192 pixels wide and high"):
        run(lambda: nemo_dali.fn.mosaic([feed([np.zeros((1, 8193, 3), np.uint8)] * BATCH)], size=20))


def test_run_lengths_may_lie_anywhere_in_memory():
    """The kernel counts from the lowest address, whatever order DALI has put the samples in."""
    memory = torch.arange(100, dtype=torch.int32)
    places = [(70, 5), (0, 0), (10, 3), (40, 1)]
    ends = [memory[begin : begin + count].__dlpack__() for begin, count in places]
    told = [torch.empty(0, count, 1, 2, 3, 4, 50, 60).__dlpack__() for _, count in places]
    targets, first = fn_gpu._targets(ends, told, 1)
    assert first == memory[10:].data_ptr()
    assert targets["ends_count"].tolist() == [5, 0, 3, 1]
    assert targets["ends_begin"].tolist() == [60, 0, 0, 30]
    fields = [targets[name].tolist() for name in ("y0", "x0", "y1", "x1", "photo_height", "photo_width", "resample")]
    assert fields == [[value] * 4 for value in (1, 2, 3, 4, 50, 60, 1)]


def test_without_a_gpu_the_error_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Pipeline(batch_size=1, num_threads=1, device_id=0), pytest.raises(NemoError, match="no CUDA device"):
        nemo_dali.fn.remap_mask(fn.zeros(shape=[0], dtype=types.UINT32), (2, 2), device="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("resample", RESAMPLINGS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_gpu_draws_the_oracles_frames(count, resample):
    assert_gpu_draws_the_oracles(count, resample, go, 0)


@pytest.mark.gpu
def test_inputs_on_a_gpu_come_back_and_masks_follow_their_runs():
    random = np.random.default_rng(11)
    photos = [random.integers(0, 256, (40, 30, 3), dtype=np.uint8) for _ in range(BATCH)]
    runs = [random_runs(random, 40, 30) for _ in photos]
    centers = [np.array(center, np.int32) for center in CENTERS[-BATCH:]]

    def graph():
        photo, center = feed(photos).gpu(), feed(centers).gpu()
        frame = nemo_dali.fn.mosaic([photo] * 4, size=64, center=center)
        mask = nemo_dali.fn.remap_mask(feed(runs).gpu(), photo.shape(), cell=2, grid=2, size=64, center=center)
        assert frame.device == mask.device == "gpu"
        return frame, mask

    ((frames, masks),), _ = run(graph, device_id=0)
    for i in range(BATCH):
        expected = oracle([photos] * 4, i, size=64, center=tuple(centers[i]), counts=runs[i], cell=2)
        assert_equal([frames[i], masks[i]], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["four channels", "no pixels", "below", "three values", "cell"])
def test_on_a_gpu_a_sample_that_cannot_be_drawn_is_named(name, monkeypatch):
    monkeypatch.setattr(
        fn_cpu, "mosaic", lambda images, *args, **kw: fn_gpu.mosaic([i.gpu() for i in images], *args, **kw)
    )
    monkeypatch.setattr(fn_cpu, "mask", fn_gpu.mask)
    graph, text = failures()[name]
    with pytest.raises(RuntimeError, match=text):
        run(graph, device_id=0)


@pytest.mark.gpu
def test_on_a_gpu_many_steps_made_ahead_do_not_overwrite_each_other():
    random = np.random.default_rng(12)
    steps = [random_photos(random, 4, largest=400) for _ in range(5)]

    def graph():
        photos = [feed(*(step[i] for step in steps)).gpu() for i in range(4)]
        return nemo_dali.fn.mosaic(photos, size=480), nemo_dali.fn.mosaic(photos, size=480, dtype="uint8")

    outputs, _ = run(graph, steps=20, device_id=0, prefetch_queue_depth=3)
    for step, (floats, bytes_) in enumerate(outputs):
        for i in range(BATCH):
            expected = [oracle(steps[step % 5], i, dtype=dtype, size=480)[0] for dtype in ("float32", "uint8")]
            assert_equal([floats[i], bytes_[i]], expected)
