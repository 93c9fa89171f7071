"""This project's kernels as PTX, launched on the machine as their launchers launch them on a GPU."""

import functools

import numpy as np
import pytest

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.kernels.text import gpu as text_gpu
from tests.helpers.cuda_compile import OPTIONS_OF_CUPY, room_for
from tests.helpers.ptx.assembler import assemble
from tests.helpers.ptx.machine import run

ARCHITECTURES = ("75", "80", "90", "100", "120")
FAST = "80"  # the one of the fast lane: the oldest with asynchronous copies
ONE_FAST = [pytest.param(name, marks=[pytest.mark.slow] * (name != FAST)) for name in ARCHITECTURES]


@functools.cache
def ptx_of(source, architecture):
    """What NVRTC makes of a ``cuda_source.Source`` with CuPy's options."""
    return compile_text(cuda_source.text_of(source), architecture)


def compile_text(text, architecture):
    """The PTX of a CUDA C++ text."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernels.cu", 0, [], [])
    options = [option.encode() for option in (*cuda_source.OPTIONS, *OPTIONS_OF_CUPY, f"-arch=compute_{architecture}")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = room_for(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == 0, log.decode()
    ptx = room_for(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, ptx)
    return ptx.rstrip(b"\0").decode()


@functools.cache
def mask_ptx_of(dtype, architecture):
    """What Numba makes of the mask kernel."""
    return mask_gpu.compile_ptx(dtype, (int(architecture[:-1]), int(architecture[-1])))


assembled = functools.cache(assemble)


def memory_of(*arrays):
    """(address, bytes) of each."""
    return [(array.ctypes.data, array.nbytes) for array in arrays]


def _each(addresses, sizes):
    return sorted({(int(address), int(size)) for address, size in zip(addresses, sizes, strict=True)})


def _frames(tiles):
    return _each(tiles["image"], 3 * tiles["frame_height"] * tiles["frame_width"] * tiles["itemsize"])


def _tables(tiles):
    return _each(tiles["table"], 768 * tiles["itemsize"])


def mosaic(tiles, architecture, *, text=None, **options):
    """``mosaic.gpu.write_tiles``, with host addresses; ``text`` takes the place of the compiler's PTX."""
    tile_of_block, stage_bytes = mosaic_gpu.blocks_of(tiles)
    name = mosaic_gpu.kernel_name(int(tiles["resample"][0]), int(tiles["itemsize"][0]))
    photos = _each(tiles["photo"], 3 * tiles["photo_height"] * tiles["photo_width"])
    return run(
        assembled(text or ptx_of(mosaic_gpu.SOURCE, architecture))[name],
        (len(tile_of_block),),
        mosaic_gpu.THREADS,
        (tiles.ctypes.data, tile_of_block.ctypes.data, stage_bytes),
        readable=[*memory_of(tiles, tile_of_block), *photos, *_tables(tiles)],
        writable=_frames(tiles),
        dynamic_shared=stage_bytes,
        **options,
    )


def gather(tiles, architecture, *, text=None, **options):
    """``gather.gpu.write_tiles``, in the same way."""
    tiles = tiles.copy()
    tile_of_block = gather_gpu.blocks_of(tiles)
    planes = _each(tiles["photo"], 3 * (tiles["y1"] - tiles["y0"]) * (tiles["x1"] - tiles["x0"]))
    return run(
        assembled(text or ptx_of(gather_gpu.SOURCE, architecture))[gather_gpu.kernel_name(int(tiles["itemsize"][0]))],
        (len(tile_of_block),),
        gather_gpu.THREADS,
        (tiles.ctypes.data, tile_of_block.ctypes.data),
        readable=[*memory_of(tiles, tile_of_block), *planes, *_tables(tiles)],
        writable=_frames(tiles),
        **options,
    )


def letterbox(tiles, architecture, *, text=None, **options):
    """``letterbox.gpu.write_tiles``, in the same way."""
    tiles = tiles.copy()
    tile_of_block, lines = letterbox_gpu.blocks_of(tiles)
    name = letterbox_gpu.kernel_name(int(tiles["itemsize"][0]))
    photos = _each(tiles["photo"], 3 * tiles["photo_height"] * tiles["photo_width"])
    masks = _each(tiles["mask"], tiles["frame_height"] * tiles["frame_width"])
    return run(
        assembled(text or ptx_of(letterbox_gpu.SOURCE, architecture))[name],
        (len(tile_of_block),),
        letterbox_gpu.THREADS,
        (tiles.ctypes.data, tile_of_block.ctypes.data, lines.ctypes.data),
        readable=[*memory_of(tiles, tile_of_block, lines), *photos, *_tables(tiles)],
        writable=[*_frames(tiles), *masks],
        **options,
    )


def text(launch, table, taken, architecture):
    """``text.gpu.launch_of``'s launch, with host addresses: of a table, int [sentences, 1 + L], into ``taken``."""
    (rows,) = launch.arrays
    return run(
        assembled(ptx_of(text_gpu.SOURCE, architecture))[text_gpu.kernel_name(table.itemsize)],
        launch.blocks,
        launch.threads,
        (rows.ctypes.data, *launch.arguments),
        readable=memory_of(rows, table),
        writable=memory_of(taken),
    )


def masks(batch, architecture, *, text=None, **options):
    """The masks of a ``mask_batches.Batch`` by ``mask.gpu.write_masks``, and what was counted."""
    targets, ends = batch.targets()
    found = np.full((len(targets), *batch.frame), 7, batch.dtype)
    counted = run(
        assembled(text or mask_ptx_of(batch.dtype, architecture))["write_masks"],
        mask_gpu.grid(len(targets), *batch.frame),
        (mask_gpu.THREADS,),
        (targets.ctypes.data, ends.ctypes.data, found.ctypes.data, *batch.frame, mask_gpu.BAND),
        readable=memory_of(targets, ends),
        writable=memory_of(found),
        dynamic_shared=mask_gpu.shared_bytes(),
        **options,
    )
    return found, counted
