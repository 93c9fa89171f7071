"""The GPU benchmarks: without a GPU all that needs none, and the way of a batch played by the host; with one, a run."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_dali.commands import bench
from nemo_dali.commands.doctor import driver
from nemo_dali.errors import NemoError
from nemo_dali.kernels import reference
from nemo_dali.kernels.tile import CV2_LINEAR, RESAMPLE
from nemo_dali.loader.loader import Loader
from nemo_dali.pipeline.paths import encode_path
from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers.cuda_host import launch, needs_compiler
from tests.helpers.paths import ROOT
from tests.helpers.played_launches import Event, play_at_once, play_clock

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where a script finds what it shares with others
common, batches, kernels, stream, measures = map(
    importlib.import_module, ("common", "kernel_batches", "gpu_kernels", "gpu_stream", "stream_measures")
)

ENVIRONMENT_KEYS = {"device", "driver", "cuda", "revision", "machine", "versions"}
CASE_KEYS = {"kernel", "size", "dtype", "batch", "grid", "resample", "placement", "share_of_copy_rate", "microseconds"}
STREAM_KEYS = {
    "mode",
    "samples_per_s",
    "decode_only",
    "ratio_decode_only",
    "single",
    "host_microseconds",
    "next_while_busy",
    "memory_mib",
    "decode_difference",
    "hardware_difference",
    "sweep",
    "config",
}


# --- bytes -----------------------------------------------------------------------------------------------------------


def rows_by_oracle(source, size, resample):
    if resample == CV2_LINEAR:
        return len(np.unique(reference._linear_taps(source, size, clamp_weight=False)[0]))
    if source == size:  # left alone
        return source
    return len({first + i for first, weights in reference._antialias_taps(source, size) for i in range(len(weights))})


@pytest.mark.parametrize("resample", RESAMPLE.values())
def test_touched_rows_are_those_of_the_oracles_taps(resample):
    random = np.random.default_rng(0)
    lengths = [(1, 1), (1, 9), (2, 1), (480, 480), (480, 240), (480, 160), (8192, 3), (37, 480), (7, 8)]
    lengths += [tuple(random.integers(1, 300, 2).tolist()) for _ in range(300)]
    for source, size in lengths:
        expected = rows_by_oracle(source, size, resample)
        assert batches.touched_rows(source, size, resample) == expected, (source, size)


@pytest.mark.parametrize(
    ("grid", "resample", "dtype", "expected"),
    [
        (2, "cv2-linear", "float16", 64 * (4 * 480 * 640 * 3 + 480 * 480 * 3 * 2)),
        (1, "cv2-linear", "float32", 64 * (480 * 640 * 3 + 480 * 480 * 3 * 4)),
        (3, "cv2-linear", "uint8", 64 * (9 * 320 * 640 * 3 + 480 * 480 * 3)),  # every third row is passed over
        (3, "pillow-bilinear", "uint8", 64 * (9 * 480 * 640 * 3 + 480 * 480 * 3)),
    ],
)
def test_bytes_of_a_mosaic(grid, resample, dtype, expected):
    assert batches.least_bytes(batches.Case("mosaic", grid, resample, dtype, 64)) == expected


@pytest.mark.parametrize(("dtype", "values"), [("uint8", 1 + 1), ("float16", 1 + 2), ("float32", 1 + 4)])
def test_bytes_of_a_gather(dtype, values):
    case = batches.Case("gather", 3, None, dtype, 64)
    assert batches.least_bytes(case) == values * 64 * 480 * 480 * 3
    assert batches.least_bytes(replace(case, placement="pinned")) == 64 * 480 * 480 * 3  # what crosses the bus


def test_bytes_of_masks_and_how_many_batches_fill_the_cache():
    assert batches.least_bytes(batches.Case("mask", 2, "cv2-linear", "uint8", 8)) == 8 * 480 * 480
    assert [kernels.batch_count(size, 50) for size in (1, 50, 51, 75, 1000)] == [150, 3, 3, 2, 2]


def test_the_cases():
    cases = batches.cases((8, 64, 256), ("float16", "uint8"))
    assert len(set(cases)) == len(cases) == 2 * 2 * 5 + 2 * 5 + 2 * 5 + 3
    assert {(c.grid, c.batch) for c in cases if c.kernel == "mosaic"} == {(2, 8), (2, 64), (2, 256), (1, 64), (3, 64)}
    assert {c.dtype for c in cases if c.kernel == "mask"} == {"uint8"}
    assert {(c.grid, c.batch) for c in cases if c.kernel == "gather"} == {(2, 8), (2, 64), (2, 256), (1, 64), (3, 64)}
    assert {c.kernel for c in cases if c.resample is None} == {"gather"}
    assert {(c.kernel, c.grid, c.dtype, c.batch) for c in cases if c.placement == "pinned"} == {
        ("gather", grid, "float16", 64) for grid in (1, 2, 3)
    }
    assert {(c.grid, c.batch) for c in batches.cases((8,), ("uint8",))} == {(1, 8), (2, 8), (3, 8)}


# --- batches ---------------------------------------------------------------------------------------------------------


def a_batch(grid, resample, dtype):
    """A small batch, its photos, and its frames and masks by the oracle; the target is in cell ``sample % cells``."""
    case = batches.Case("mosaic", grid, resample, dtype, 2, size=50)
    random = np.random.default_rng(grid)
    photos = random.integers(0, 256, (2 * grid**2, *batches.PHOTO, 3), dtype=np.uint8)
    runs = batches.masks_of(case)[0]
    drawn = [
        reference.mosaic(
            photos[sample * grid**2 :][: grid**2],
            grid=grid,
            center=(25, 25),
            counts=runs[sample],
            cell=sample % grid**2,
            size=50,
            resample=resample,
            table=reference.normalisation_table(IMAGENET_MEAN, IMAGENET_STD, dtype),
        )
        for sample in range(2)
    ]
    return case, photos, *(np.stack(arrays).view(np.uint8).reshape(-1) for arrays in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("grid", "resample", "dtype"),
    [(1, "cv2-linear", "uint8"), (2, "pillow-bilinear", "float32"), (3, "cv2-linear", "float16")],
)
def test_what_kernels_are_compared_with_is_the_oracles(grid, resample, dtype):
    case, photos, frames, masks = a_batch(grid, resample, dtype)
    table = np.ascontiguousarray(reference.normalisation_table(IMAGENET_MEAN, IMAGENET_STD, dtype))
    assert np.array_equal(batches.mosaic_on_cpu(case, photos, table), frames)
    assert masks.any() and np.array_equal(batches.masks_on_cpu(case, *batches.masks_of(case)[:2]), masks)


@pytest.mark.parametrize("grid", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_what_the_gather_is_compared_with_shows_the_tiles(grid, dtype):
    case = batches.Case("gather", grid, None, dtype, 2, size=50)
    photos = np.random.default_rng(grid).integers(0, 256, (2 * grid**2, *batches.PHOTO, 3), dtype=np.uint8)
    table = np.ascontiguousarray(reference.normalisation_table(IMAGENET_MEAN, IMAGENET_STD, dtype))
    expected = np.empty((2, 3, 50, 50), table.dtype)
    for cell, (photo, (y0, x0, y1, x1)) in enumerate(zip(photos, batches.boxes(case), strict=True)):
        planes = photo.reshape(-1)[: 3 * (y1 - y0) * (x1 - x0)].reshape(3, y1 - y0, x1 - x0)
        for channel in range(3):
            expected[cell // grid**2, channel, y0:y1, x0:x1] = table[channel][planes[channel]]
    assert batches.gathered_on_cpu(case, photos, table).tobytes() == expected.tobytes()


@needs_compiler
def test_a_single_wrong_byte_ends_the_run(cuda_library):
    case, photos, frames, _ = a_batch(2, "cv2-linear", "float16")
    table = np.ascontiguousarray(reference.normalisation_table(IMAGENET_MEAN, IMAGENET_STD, "float16"))
    output = torch.empty(frames.size, dtype=torch.uint8)
    tiles = batches.tiles_of(case, image=output.data_ptr(), mask=0, table=table.ctypes.data)
    tiles["photo"] = [photo.ctypes.data for photo in photos]

    def right():
        launch(cuda_library, tiles)

    def wrong():
        right()
        output[-1] += 1

    def unwritten():
        launch(cuda_library, tiles[:-1].copy())

    def work(run, run_whole):
        return batches.Work(run, run_whole, output, lambda: frames, frames.size, None)

    kernels.check(case, work(right, right))
    with pytest.raises(SystemExit, match=rf"grid=2.* is wrong in 1 of {frames.size} bytes"):
        kernels.check(case, work(wrong, right))
    with pytest.raises(SystemExit, match="is wrong in"):
        kernels.check(case, work(right, unwritten))


@needs_compiler
@pytest.mark.usefixtures("played")
def test_all_cases_are_checked_and_timed(cuda_library, monkeypatch):
    """With kernels of the host, and a clock that says 250 us for everything."""

    play_clock(monkeypatch)
    play_at_once(monkeypatch, cuda_library, batches)
    monkeypatch.setattr(kernels, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "launch_costs", lambda case, **_: {"case": case})
    todo = [replace(case, size=50) for case in batches.cases((2,), ("uint8",))]
    result = kernels.measure(todo, rounds=1, device=0, stream=0)
    assert result["copy_rate_gb_s"] == pytest.approx(2 * 2**20 / 250e-6 / 1e9, abs=1e-3)
    assert result["pinned_copy_rate_gb_s"]["median"] == pytest.approx(2**20 / 250e-6 / 1e9, abs=1e-3)
    for case, row in zip(todo, result["cases"], strict=True):
        assert {name: row[name] for name in asdict(case)} == asdict(case)
        assert row["microseconds"] == row["with_upload_microseconds"]["median"] == 250
        copied = 2**20 if case.placement == "pinned" else 2 * 2**20
        assert row["share_of_copy_rate"] == pytest.approx(row["bytes"] / copied, abs=1e-3)
        assert row["bytes"] == batches.least_bytes(case) or case.kernel == "mask"
    assert result["launch_host_microseconds"]["case"] == batches.Case("mask", 1, "cv2-linear", "uint8", 2, 50)


# --- time, and what is written ---------------------------------------------------------------------------------------


def test_times_are_microseconds_a_launch_of_launches_queued_in_time(monkeypatch):
    begun = iter([False, True, False, True, *[False] * 99])  # before the last launch of the round was queued
    naps, calls = [], []

    class NotedEvent(Event):
        def record(self):
            calls.append("event")

        def query(self):
            return next(begun)

    monkeypatch.setattr(torch.cuda, "Event", NotedEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", naps.append)
    gpu, host = kernels.timed([lambda: calls.append(1), lambda: calls.append(2)], rounds=3)
    assert gpu.tolist() == [250.0] * 3 and host.shape == (3,) and (host > 0).all()
    assert calls == ["event", *[1, 2] * 4, "event"] * 7  # three rounds, two to warm up, two that were late
    assert [nap // kernels.CYCLES for nap in naps] == [8, 8, 16, 16, 32, 32, 32]

    naps.clear()
    kernels.timed([lambda: None], rounds=1, ahead=False)
    assert naps == []


def test_a_host_that_waits_for_each_launch_is_told_so(monkeypatch):
    """As CUDA_LAUNCH_BLOCKING=1 makes it: the GPU has begun whenever it is asked."""
    naps = []

    class BegunEvent(Event):
        def query(self):
            return True

    monkeypatch.setattr(torch.cuda, "Event", BegunEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", naps.append)
    with pytest.raises(NemoError, match="Unset CUDA_LAUNCH_BLOCKING"):
        kernels.timed([lambda: None], rounds=3)
    assert len(naps) == kernels.DOUBLINGS + 1 and naps[-1] == naps[0] * 2**kernels.DOUBLINGS
    kernels.timed([lambda: None], rounds=3, ahead=False)  # does not ask


def test_the_kernels_document_from_given_numbers():
    case = batches.Case("mosaic", 2, "cv2-linear", "float16", 64)
    times = np.array([90.0, 100, 110])
    row = kernels.row(case, 200_000_000, 2500.0, alone=times, whole=times + 20, host=times - 50)
    assert set(row) >= CASE_KEYS
    assert (row["microseconds"], row["microseconds_p25"], row["microseconds_p75"]) == (100, 95, 105)
    assert row["gb_s"] == 2000 and row["share_of_copy_rate"] == 0.8  # 200 MB in 100 us
    assert row["with_upload_microseconds"]["median"] == 120 and row["host_microseconds"]["median"] == 50
    rates = {"device": [2400.0, 2500.0, 2600.0], "pinned": [50.0, 54.0, 55.0]}
    document = kernels.document(rates, 50 << 20, [row], {"cupy": {"median": 5.0}})
    assert document["copy_rate_gb_s"] == 2500 and document["cases"] == [row]
    assert document["pinned_copy_rate_gb_s"]["median"] == 54
    json.dumps(document)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu_kernels.nvidia-h100-80gb-hbm3.json"),
        ("NVIDIA GeForce RTX 4090 / Laptop (R)", "gpu_kernels.nvidia-geforce-rtx-4090-laptop-r.json"),
    ],
)
def test_the_files_name(tmp_path, device, name):
    path = common.save({"device": device, "cases": []}, "gpu_kernels", tmp_path / "new")
    assert path == tmp_path / "new" / name
    assert json.loads(path.read_text()) == {"device": device, "cases": []}


def test_where_it_was_measured(monkeypatch):
    gpu = driver.Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30)
    monkeypatch.setattr(bench, "read_driver", lambda: driver.Driver("570.1", "12.8", (gpu,)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu.name)
    found = common.described(0, "abc+")
    assert set(found) == ENVIRONMENT_KEYS
    assert (found["device"], found["driver"], found["revision"]) == (gpu.name, "570.1", "abc+")
    assert found["cuda"] == {"driver": "12.8", "torch": torch.version.cuda}
    assert found["machine"]["gpus"] == [gpu.name] and {"torch", "numba-cuda"} <= set(found["versions"])


# --- the stream, with the GPU's part played by the host --------------------------------------------------------------


@pytest.fixture
def loader(files):
    return lambda policy="2x2", **options: Loader(
        files.dataset, files.negatives, batch_size=8, policy=stream.POLICIES[policy], size=40, device="cuda", **options
    )


@needs_compiler
@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("policy", stream.POLICIES)
def test_decode_only_is_fed_what_the_loader_shows(loader, policy, monkeypatch):
    fed = {measures.DecodeOnly: [], measures.CudaStreamPipeline: []}
    feed = measures.CudaStreamPipeline.feed

    def noting(self, paths, *rest, **options):
        fed[type(self)].append([bytes(path) for path in paths])
        feed(self, paths, *rest, **options)

    monkeypatch.setattr(measures.CudaStreamPipeline, "feed", noting)
    found = measures.compare(loader(policy), 0.5, 0, pairs=2, steps=3)
    ours, theirs = fed.values()
    assert ours == theirs and len(ours) == 2 * (measures.WARM_UP + 3 + 2)
    assert {len(paths) for paths in ours} == {8 * (4 if policy == "2x2" else 1)}
    assert all(0 < one["p25"] <= one["median"] <= one["p75"] for one in found.values())


@needs_compiler
@pytest.mark.usefixtures("played")
def test_what_a_batch_costs_the_host(loader):
    costs = measures.host_costs(loader, 6)
    assert set(costs) == {"plan", "prepare", "feed", "wait", "python_function", "next"}
    assert all(cost["median"] > 0 for cost in costs.values())
    parts = sum(costs[name]["median"] for name in ("plan", "prepare", "feed", "wait"))
    assert parts < 1.5 * costs["next"]["median"]
    assert next(iter(loader())).image.shape == (8, 3, 40, 40)  # the clocks are gone, and a loader works


@pytest.mark.usefixtures("played")
def test_the_difference_between_decoders(files, monkeypatch):
    from nvidia.dali import fn

    photos = sorted(files.photos.glob("*.jpg"))[:5]
    paths = [encode_path(str(path)) for path in photos]
    same = measures.decode_difference(paths, 1, 0.5, 0)
    assert same == {"mean": 0, "max": 0, "share_differing": 0, "photos": 5}

    decode = fn.decoders.image

    def flipped_on_gpu(data, device="cpu", **options):
        image = decode(data, device=device, **options)
        return fn.flip(image) if device == "mixed" and options["hw_decoder_load"] else image

    monkeypatch.setattr(fn.decoders, "image", flipped_on_gpu)
    pixels = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in photos]
    differences = np.concatenate([np.abs(image - image[:, ::-1]).ravel() for image in pixels])
    found = measures.decode_difference(paths, 1, 0.5, 0)
    assert found["mean"] == pytest.approx(differences.mean(), abs=1e-4) and found["max"] == differences.max()
    assert found["share_differing"] == pytest.approx((differences > 0).mean(), abs=1e-4)
    assert measures.decode_difference(paths, 1, 1.0, 0, beside=0.0) == found  # the hardware decoder beside the other
    assert measures.decode_difference(paths, 1, 1.0, 0, beside=1.0)["max"] == 0


def test_a_host_that_waits_is_told_from_one_that_does_not():
    assert measures.waits(np.array([2.0, 3, 410, 40]), 500, 2)["synchronises"] is False
    assert measures.waits(np.array([2.0, 480, 4, 4]), 500, 2) == {
        "busy_ms": 500,
        "next_ms": [2, 480, 4, 4],
        "synchronises": True,
    }


@needs_compiler
@pytest.mark.usefixtures("played")
def test_the_streams_document(files, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "require_gpu", lambda: 0)
    monkeypatch.setattr(stream, "described", lambda device, measured: {"device": "Host", "revision": measured})
    monkeypatch.setattr(stream, "memory_peak", lambda *_: {"device": 1.0, "torch": 1.0})
    monkeypatch.setattr(stream, "next_while_busy", lambda *_: {"synchronises": False})
    files = [str(files.dataset), str(files.negatives)]
    stream.main([*files, "--quick", "--num-threads", "2", "--revision", "abc", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "gpu_stream.host.json").read_text())
    assert set(result) == STREAM_KEYS | {"device", "revision"} and result["revision"] == "abc"
    assert result["samples_per_s"]["median"] > 0 and result["single"]["decode_only"]["median"] > 0
    assert result["config"]["batch_size"] == 8 and result["config"]["photos"] == 24
    assert [one["photos"] for one in result["decode_difference"]] == [24] * 3
    assert result["hardware_difference"] == {"mean": 0, "max": 0, "share_differing": 0, "photos": 24}


# --- the command lines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (kernels, "--batches 64 4", r"--batches \(4\) must be >= 8"),
        (kernels, "--rounds 0", r"--rounds \(0\) must be >= 1"),
        (kernels, "extra", "unrecognized arguments"),
        (stream, "F.ris.h5", "needs its negative table"),
        (stream, "--steps 0", r"--steps \(0\) must be >= 1"),
        (stream, "--num-threads -1", r"--num-threads \(-1\) must be >= 1"),
    ],
)
def test_arguments_that_cannot_be(module, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(arguments.split())
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def run(script, *arguments, **environment):
    command = [sys.executable, BENCHMARKS / script, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["gpu_kernels.py", "gpu_stream.py"])
def test_without_a_gpu_a_sentence_says_so(script):
    done = run(script, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "This benchmark needs a GPU, and torch sees none; 'nemo-dali doctor' says what is missing.\n"


@pytest.mark.gpu
def test_both_run_on_a_gpu(tmp_path):
    for script in ("gpu_kernels.py", "gpu_stream.py"):
        done = run(script, "--quick", "--output", tmp_path, "--revision", "abc")
        assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu_kernels.*.json")
    result = json.loads(path.read_text())
    assert set(result) >= ENVIRONMENT_KEYS | {"copy_rate_gb_s", "cases", "launch_host_microseconds"}
    assert {case["kernel"] for case in result["cases"]} == {"mosaic", "mask", "gather"}
    for case in result["cases"]:
        assert set(case) >= CASE_KEYS and 0 < case["share_of_copy_rate"] < 2
    assert set(result["launch_host_microseconds"]) == {"cupy", "cupy_kernel", "numba"}
    (path,) = tmp_path.glob("gpu_stream.*.json")
    result = json.loads(path.read_text())
    assert set(result) == ENVIRONMENT_KEYS | STREAM_KEYS
    assert not result["next_while_busy"]["synchronises"]
    assert 0 < result["ratio_decode_only"]["median"] < 2 and result["memory_mib"]["device"] > 0
