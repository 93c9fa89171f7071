"""Launches ``mask.kernel``: the masks of all samples of a batch at once, on a stream of the caller's.

Numba compiles the kernel at first use. CuPy launches it, as it does ``mosaic.cu``, so that Numba need not manage the
GPU as well. The machine code is kept in the cache (``io.cache``), a file for each GPU architecture and type of mask.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from nemo_dali.errors import NemoError
from nemo_dali.io.cache import cached
from nemo_dali.kernels.arrays import I64, U32, U64
from nemo_dali.kernels.device import Launch
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.mask.cpu import TARGET, Targets, add_up
from nemo_dali.kernels.stores import as_pointer
from nemo_dali.kernels.tile import CV2_LETTERBOX, TileRecords

THREADS = 128  # columns of a block; a multiple of a warp's 32
BAND = 32  # rows of a block: fewer search more often, more leave too few blocks for a small batch

_ENTRY = "write_masks"  # of the compiled kernel
_SOURCES = ("mask/cpu.py", "mask/kernel.py", "tile.py")  # what its machine code depends on


def run_addresses(runs: Sequence[U32]) -> tuple[U64, I64]:
    """Addresses uint64 [B] and counts int64 [B] of contiguous arrays, which the caller keeps alive."""
    return np.array([a.ctypes.data for a in runs], np.uint64), np.array([a.size for a in runs], np.int64)


@jit()
def fill_ends(addresses: U64, counts: I64, targets: Targets, ends: U32) -> None:
    """Write where the runs of all targets end.

    Args:
        addresses: uint64 [B], of each target's run lengths, uint32; any number where there are none.
        counts: int64 [B], how many run lengths.
        targets: ``mask.cpu.TARGET`` [B] with the photos' sizes; ``ends_begin`` and ``ends_count`` are set.
        ends: uint32 [sum of counts].
    """
    begin = 0
    for i in range(targets.size):
        target, count = targets[i], counts[i]
        target.ends_begin, target.ends_count = begin, count
        if count:
            runs = carray(as_pointer(addresses[i]), count, np.uint32)
            add_up(runs, np.int64(target.photo_height) * target.photo_width, ends[begin : begin + count])
        begin += count


def make_targets(
    *,
    addresses: U64,
    counts: I64,
    boxes: npt.ArrayLike,
    photos: npt.ArrayLike,
    resample: npt.ArrayLike,
) -> tuple[Targets, U32]:
    """What the kernel reads, in host memory.

    Args:
        addresses, counts: of the samples' run lengths, as ``run_addresses`` gives them; count 0 for an empty mask.
        boxes: [B, 4], half-open (y0, x0, y1, x1) of the target's cell in the frame.
        photos: [B, 2], height and width of the target's photo.
        resample: one of ``tile.RESAMPLE``'s values, or [B] of them.

    Returns:
        targets, dtype ``mask.cpu.TARGET`` [B], and ends, uint32 [n].

    Raises:
        NemoError: the batch has 2**31 run lengths or more.
    """
    total = int(counts.sum())
    _check_total(total)
    targets = np.zeros(len(addresses), TARGET)
    for fields, values in ((("y0", "x0", "y1", "x1"), boxes), (("photo_height", "photo_width"), photos)):
        for field, column in zip(fields, np.asarray(values).T, strict=True):
            targets[field] = column
    targets["resample"] = resample
    ends = np.empty(total, np.uint32)
    fill_ends(np.ascontiguousarray(addresses, np.uint64), np.ascontiguousarray(counts, np.int64), targets, ends)
    return targets, ends


@jit()
def _find_targets(tiles: TileRecords, sample: I64, cell_of: I64) -> int:
    """Set each sample's target cell, or -1 where there is none; how many run lengths they have together."""
    cell_of[:] = -1
    total = 0
    for i in range(tiles.size):
        if tiles[i].run_count > 0 and tiles[i].resample != CV2_LETTERBOX:
            cell_of[sample[i]] = i
            total += tiles[i].run_count
    return total


@jit()
def _describe_targets(tiles: TileRecords, cell_of: I64, targets: Targets, ends: U32) -> None:
    begin = 0
    for i in range(targets.size):
        target = targets[i]
        target.ends_begin = begin
        if cell_of[i] < 0:
            continue
        tile = tiles[cell_of[i]]
        target.y0, target.x0, target.y1, target.x1 = tile.y0, tile.x0, tile.y1, tile.x1
        target.photo_height, target.photo_width, target.resample = tile.photo_height, tile.photo_width, tile.resample
        target.ends_count = tile.run_count
        runs = carray(as_pointer(tile.runs), tile.run_count, np.uint32)
        add_up(runs, np.int64(tile.photo_height) * tile.photo_width, ends[begin : begin + tile.run_count])
        begin += tile.run_count


def targets_of(tiles: TileRecords, sample: I64, samples: int) -> tuple[Targets, U32]:
    """``make_targets`` from the cells of a batch; the mask is empty where a sample's target is letterboxed.

    Args:
        tiles: dtype ``TILE`` [cells] with boxes, photos' sizes and, in the targets' cells, ``run_count`` and ``runs``.
        sample: int64 [cells], the sample that each belongs to, of so many.

    Raises:
        NemoError: see ``make_targets``.
    """
    cell_of = np.empty(samples, np.int64)
    total = _find_targets(tiles, sample, cell_of)
    _check_total(total)
    targets, ends = np.zeros(samples, TARGET), np.empty(total, np.uint32)
    _describe_targets(tiles, cell_of, targets, ends)
    return targets, ends


def _check_total(total: int) -> None:
    if total >= 2**31:
        raise NemoError(f"The masks of a batch have {total} runs, more than a GPU is given at once; lower batch_size.")


def grid(
    samples: int, frame_height: int, frame_width: int, *, threads: int = THREADS, band: int = BAND
) -> tuple[int, int, int]:
    """Blocks of a launch: along a row, down a column, samples."""
    return -(-frame_width // threads), -(-frame_height // band), samples


def shared_bytes(*, threads: int = THREADS, band: int = BAND) -> int:
    """Dynamic shared memory of a block."""
    return 4 * (threads + band)


def compile_ptx(dtype: str, cc: tuple[int, int]) -> str:
    """The kernel's PTX for masks of ``dtype`` and a compute capability, entry ``write_masks``; no GPU is needed."""
    from numba import cuda, types

    from nemo_dali.kernels.mask.kernel import write_masks

    pointers = (types.CPointer(kind) for kind in (types.int32, types.uint32, getattr(types, dtype)))
    signature = types.void(*pointers, types.int32, types.int32, types.int32)
    ptx: str = cuda.compile_ptx(write_masks.py_func, signature, cc=cc)[0]
    entry = re.search(r"\.entry (\w+)", ptx)
    if entry is None:
        raise RuntimeError("Numba's PTX has no entry.")
    return ptx.replace(entry[1], _ENTRY)


def compiled_kernel(dtype: str, cc: tuple[int, int]) -> bytes:
    """The kernel's machine code, from the cache or made; no GPU is needed.

    Raises:
        NemoError: Numba finds no compiler, or none that fits the linker.
    """
    sources = b"".join((Path(__file__).parents[1] / name).read_bytes() for name in _SOURCES)
    parts = [hashlib.sha256(sources).hexdigest(), version("numba-cuda"), dtype, cc]
    return cached(
        f"mask-{hashlib.sha256(repr(parts).encode()).hexdigest()}",
        np.uint8,
        (None,),
        make=lambda: np.frombuffer(_compile(dtype, cc), np.uint8),
        fits=lambda code: code.tobytes().startswith(b"\x7fELF"),
    ).tobytes()


def _compile(dtype: str, cc: tuple[int, int]) -> bytes:
    try:
        from cuda.core import Linker, LinkerOptions, ObjectCode

        # Machine code, because PTX does not load where the driver is older than the compiler.
        ptx = ObjectCode.from_ptx(compile_ptx(dtype, cc).encode())
        return bytes(Linker(ptx, options=LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}")).link("cubin").code)
    except Exception as error:  # Numba and the libraries behind it raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NemoError(
            f"The mask kernel cannot be compiled for compute capability {cc[0]}.{cc[1]} ({reason}). Install the "
            "compiler of your CUDA version: pip install 'nemo-dali[cuda12]' or 'nemo-dali[cuda13]'."
        ) from error


@functools.cache
def load_kernel(dtype: str, device: int) -> Any:
    """The kernel for masks of ``dtype`` on a device, ready to launch; compiled where the cache does not hold it.

    Raises:
        NemoError: as ``compiled_kernel`` does, or the driver refuses the kernel.
    """
    import cupy

    with cupy.cuda.Device(device) as here:
        digits = here.compute_capability  # "90", "120"
        module = cupy.cuda.Module()  # not a RawModule, of which CuPy keeps one for each path
        try:
            module.load(compiled_kernel(dtype, (int(digits[:-1]), int(digits[-1]))))
            return module.get_function(_ENTRY)
        except cupy.cuda.driver.CUDADriverError as error:
            raise NemoError(f"GPU {device} does not take the mask kernel ({error}). Update NVIDIA's driver.") from error


def _launch(
    arguments: tuple[int, ...], arrays: Sequence[Any], samples: int, frame: tuple[int, int], dtype: str = "uint8"
) -> Launch:
    return Launch(
        load=lambda device: load_kernel(dtype, device),
        blocks=grid(samples, *frame),
        threads=(THREADS,),
        arrays=arrays,
        arguments=(*arguments, *map(np.int32, (*frame, BAND))),
        shared_mem=shared_bytes(),
    )


def launch_of(targets: Targets, ends: U32, masks: int, *, frame_height: int, frame_width: int) -> Launch:
    """The launch that writes all masks of a batch.

    Args:
        targets, ends: as ``make_targets`` gives them.
        masks: device address of uint8 [B, frame_height, frame_width]; everything is set, to 0 or 1. It must stay until
            the launch's stream has come past it.
    """
    return _launch((masks,), (targets, ends), len(targets), (frame_height, frame_width))


def write_masks(
    targets: int,
    ends: int,
    masks: int,
    samples: int,
    *,
    frame_height: int,
    frame_width: int,
    dtype: str = "uint8",
    device: int,
    stream: int,
) -> None:
    """Queue the writing of all masks of a batch; the memory must stay until ``stream`` has come past this launch.

    Args:
        targets, ends: device addresses of copies of what ``make_targets`` gives.
        masks: device address of ``dtype`` [samples, frame_height, frame_width]; everything is set, to 0 or 1.
        samples: at most 65,535.
        frame_height, frame_width: in pixels.
        dtype: one of ``choices.MaskDType``.
        device: CUDA device number.
        stream: CUDA stream's address.

    Raises:
        NemoError: see ``load_kernel``.
    """
    if samples:
        launch = _launch((targets, ends, masks), (), samples, (frame_height, frame_width), dtype)
        launch.queue((), device=device, stream=stream)
