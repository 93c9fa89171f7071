"""The mask kernel for the GPU: in Numba's simulator, as PTX on the CPU, as machine code, and where there is a GPU.

What is expected does not come from the code under test: the runs are painted into the whole photo, and the output
pixels pick theirs by the reference's rules.
"""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_dali.errors import NemoError
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mask.cpu import write_mask
from nemo_dali.kernels.tile import CV2_LETTERBOX, CV2_LINEAR, TILE
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.mask_batches import SOURCES, numba_launch, random_batch
from tests.helpers.paths import ROOT
from tests.helpers.ptx.launches import ONE_FAST, masks

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.slow
def test_the_kernel_in_the_simulator():
    code = "from tests.helpers.mask_batches import simulate; simulate(range(30))"
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "simulated 30\n", done.stderr


def test_the_cpu_kernel_writes_the_same():
    for seed in range(150):
        batch = random_batch(seed, largest_frame=80, largest_photo=120, samples=3)
        masks = np.zeros((3, *batch.frame), np.uint8)
        for mask, runs, (y0, x0, y1, x1), photo in zip(masks, batch.runs, batch.boxes, batch.photos, strict=True):
            write_mask(runs, *photo, batch.resample, mask[y0:y1, x0:x1])
        assert np.array_equal(masks, batch.expected()), seed


def test_targets():
    batch = random_batch(5, largest_frame=24, largest_photo=40, samples=40)
    targets, ends = batch.targets()
    assert targets.dtype.itemsize == 40
    assert [tuple(row) for row in targets[["y0", "x0", "y1", "x1"]].tolist()] == batch.boxes
    assert [tuple(row) for row in targets[["photo_height", "photo_width"]].tolist()] == batch.photos
    assert (targets["resample"] == batch.resample).all()
    for target, runs, (height, width) in zip(targets, batch.runs, batch.photos, strict=True):
        begin, count = target["ends_begin"], target["ends_count"]
        assert np.array_equal(ends[begin : begin + count], np.minimum(np.cumsum(runs), height * width))
    assert targets["ends_count"].sum() == len(ends)


def test_targets_of_cells_are_those_of_samples():
    """Cells of several samples, of which some have no target, an empty one, or a letterboxed one."""
    batch = random_batch(6, largest_frame=24, largest_photo=40, samples=40)
    addresses, counts = mask_gpu.run_addresses(batch.runs)
    random = np.random.default_rng(0)
    cells = random.integers(1, 5, 40)
    sample = np.repeat(np.arange(40), cells)
    shown = np.cumsum(cells) - cells + random.integers(0, cells)  # the cell that holds the target
    kind = random.integers(0, 4, 40)
    tiles = np.zeros(cells.sum(), TILE)
    for names, values in ((("y0", "x0", "y1", "x1"), batch.boxes), (("photo_height", "photo_width"), batch.photos)):
        for name, column in zip(names, np.array(values).T, strict=True):
            tiles[name][shown] = column
    tiles["resample"] = batch.resample
    tiles["resample"][shown[kind == 3]] = CV2_LETTERBOX
    tiles["runs"][shown], tiles["run_count"][shown] = addresses, np.where(kind == 1, 0, counts)
    targets, ends = mask_gpu.targets_of(tiles, sample, 40)
    there = (counts > 0) & (kind != 1) & (kind != 3)
    expected, expected_ends = mask_gpu.make_targets(
        addresses=addresses,
        counts=np.where(there, counts, 0),
        boxes=np.where(there[:, None], batch.boxes, 0),
        photos=np.where(there[:, None], batch.photos, 0),
        resample=np.where(there, batch.resample, 0),
    )
    assert 5 < there.sum() < 35
    assert targets.tobytes() == expected.tobytes() and np.array_equal(ends, expected_ends)


def test_more_runs_than_fit():
    tiles = np.zeros(2, TILE)
    tiles["run_count"] = 2**30
    with pytest.raises(NemoError, match=r"2147483648 runs.*lower batch_size"):
        mask_gpu.targets_of(tiles, np.arange(2), 2)
    with pytest.raises(NemoError, match=r"2147483648 runs.*lower batch_size"):
        mask_gpu.make_targets(
            addresses=np.zeros(2, np.uint64),
            counts=np.array([2**30, 2**30]),
            boxes=np.zeros((2, 4)),
            photos=np.ones((2, 2)),
            resample=CV2_LINEAR,
        )


@pytest.fixture
def compiler():
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    for library in ("nvvm", "nvrtc"):  # which compiles, and which knows what architectures there are
        try:
            load_nvidia_dynamic_lib(library)
        except DynamicLibNotFoundError:
            pytest.skip(f"needs lib{library}, which comes with the extra cuda12 or cuda13")


@pytest.mark.parametrize(
    ("dtype", "cc"),
    [
        *(pytest.param("uint8", cc, marks=[pytest.mark.slow] * (cc != (9, 0))) for cc in CAPABILITIES),
        pytest.param("int64", (9, 0), marks=pytest.mark.slow),
        pytest.param("float32", (9, 0), marks=pytest.mark.slow),
    ],
)
def test_machine_code(compiler, dtype, cc, tmp_path):
    """No local memory, and doubles are rounded as on the CPU."""
    ptx = mask_gpu.compile_ptx(dtype, cc)
    assert f".target sm_{cc[0]}{cc[1]}\n" in ptx
    assert re.findall(r"\.entry (\w+)", ptx) == ["write_masks"]
    assert not re.search(r"\.local|ld\.local|st\.local|\bfma\.|\bcall\b", ptx)
    assert set(re.findall(r"(?:div|rcp|mul|add)\.\w*\.?f64", ptx)) == {"div.rn.f64", "rcp.rn.f64", "mul.f64", "add.f64"}
    # ptxas may fuse a multiplication into an addition that takes its result: only half a step is added to anything.
    products = re.findall(r"mul\.f64\s+(%\w+), %\w+, (\S+);", ptx)
    sums = [word for line in re.findall(r"add\.f64\s+%\w+, (.*);", ptx) for word in line.split(", ")]
    assert {by for name, by in products if name in sums} == {"0d3FE0000000000000"}

    ptxas = shutil.which("ptxas")
    if ptxas is None:
        return
    (tmp_path / "mask.ptx").write_text(ptx)
    command = [ptxas, "-v", f"-arch=sm_{cc[0]}{cc[1]}", "mask.ptx", "-o", "mask.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "Unsupported .version" in done.stderr:
        pytest.skip("the ptxas on the path is older than Numba's compiler")
    assert done.returncode == 0, done.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in done.stderr
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    print(f"masks of {dtype}, sm_{cc[0]}{cc[1]}: {registers} registers")  # pytest -rP shows it
    assert registers <= 64  # eight blocks of 128 threads on a multiprocessor


@pytest.mark.slow
def test_numbas_own_launch_compiles(compiler):
    from numba import cuda

    from nemo_dali.kernels.mask.kernel import write_masks

    arguments = "void(int32[::1], uint32[::1], uint8[::1], int64, int64, int64)"
    ptx, _ = cuda.compile_ptx(write_masks.py_func, arguments, cc=(9, 0))
    assert not re.search(r"\.local|ld\.local|st\.local|\bfma\.|\bcall\b", ptx)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_machine_code_is_kept(compiler, cache, monkeypatch):
    try:
        code = mask_gpu.compiled_kernel("uint8", (8, 0))
    except NemoError as error:
        if "Unsupported .version" not in str(error):
            raise
        pytest.skip("needs libnvvm and libnvJitLink of one CUDA release, as the extra cuda12 or cuda13 brings them")
    assert code[:4] == b"\x7fELF" and b"write_masks" in code
    (path,) = cache.iterdir()

    assert len({code, mask_gpu.compiled_kernel("uint8", (9, 0)), mask_gpu.compiled_kernel("int64", (8, 0))}) == 3
    assert len(list(cache.iterdir())) == 3

    for damaged in (b"damaged", path.read_bytes()[:-1] + b"x"):
        path.write_bytes(damaged)
        assert mask_gpu.compiled_kernel("uint8", (8, 0))[:4] == code[:4]

    def compile_nothing(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(mask_gpu, "compile_ptx", compile_nothing)
    assert mask_gpu.compiled_kernel("uint8", (8, 0))[:4] == code[:4]


def test_each_type_of_mask_and_each_device_has_a_kernel_of_its_own(monkeypatch):
    """With CuPy's part played; the driver is asked to load what was compiled for the type."""
    import contextlib

    import cupy

    class Module:
        def load(self, code):
            self.code = code

        def get_function(self, name):
            return name, self.code

    here = SimpleNamespace(compute_capability="120")
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: contextlib.nullcontext(here))
    monkeypatch.setattr(cupy.cuda, "Module", Module)
    monkeypatch.setattr(mask_gpu, "compiled_kernel", lambda dtype, cc: f"{dtype} {cc}".encode())
    load = mask_gpu.load_kernel.__wrapped__  # what is loaded here must not stay
    found = [load(dtype, device) for dtype in ("uint8", "float32") for device in (0, 1)]
    assert found == [("write_masks", f"{dtype} (12, 0)".encode()) for dtype in ("uint8", "float32") for _ in range(2)]


def test_a_compiler_that_fails(cache, monkeypatch):
    monkeypatch.setattr(mask_gpu, "compile_ptx", lambda *_: "no PTX at all")
    with pytest.raises(NemoError, match=r"capability 9\.0 \(.*\)\. Install .*nemo-dali\[cuda12\]"):
        mask_gpu.compiled_kernel("uint8", (9, 0))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(mask_gpu, "_compile", lambda *_: b"\x7fELF...")
    assert mask_gpu.compiled_kernel("uint8", (9, 0)) == b"\x7fELF..."


@needs_compiler
@pytest.mark.parametrize("architecture", ONE_FAST)
def test_the_kernels_ptx_writes_the_same(compiler, architecture):
    for seed in range(60):
        batch = random_batch(seed, largest_frame=150, largest_photo=120, samples=3)
        assert np.array_equal(masks(batch, architecture, seed=seed)[0], batch.expected()), seed


def cupy_launch(batch):
    """The masks by ``write_masks``, on a stream of its own; there must be nothing written beside them."""
    import cupy

    targets, ends = batch.targets()
    expected = batch.expected()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        device_targets, device_ends = cupy.asarray(targets.view(np.int32)), cupy.asarray(ends)
        masks = cupy.full(expected.size + 64, 7, batch.dtype)
        mask_gpu.write_masks(
            device_targets.data.ptr,
            device_ends.data.ptr,
            masks.data.ptr,
            len(targets),
            frame_height=batch.frame[0],
            frame_width=batch.frame[1],
            dtype=batch.dtype,
            device=0,
            stream=stream.ptr,
        )
        found = masks.get()
    assert (found[expected.size :] == 7).all()
    return found[: expected.size].reshape(expected.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("launch", [cupy_launch, lambda batch: numba_launch(batch, threads=128, band=32)])
@pytest.mark.filterwarnings("ignore:Grid size")  # Numba's advice on small batches
def test_the_kernel_on_a_gpu(launch):
    for seed in range(60):
        batch = random_batch(seed, largest_frame=600, largest_photo=700, samples=5)
        assert np.array_equal(launch(batch), batch.expected()), seed
    largest = random_batch(0, largest_frame=1, largest_photo=1, samples=1)._replace(
        frame=(1024, 1024),
        runs=[np.array([2**25 + 5, 2**24, 7, 2**24 - 12], np.uint32)],
        boxes=[(0, 0, 1024, 1024)],
        photos=[(8192, 8192)],
    )
    for resample in SOURCES:
        batch = largest._replace(resample=resample)
        assert np.array_equal(launch(batch), batch.expected())
