"""Builds the CUDA sources with a C++ compiler, for tests on machines without a GPU."""

import ctypes
import functools
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from nemo_dali.kernels.text import gpu as text_gpu
from nemo_dali.kernels.tile import RESAMPLE
from tests.helpers.building import built
from tests.helpers.building import needs_compiler as needs_compiler

KERNELS = [mosaic_gpu.kernel_name(resample, itemsize) for resample in RESAMPLE.values() for itemsize in (1, 2, 4)]
GATHER_KERNELS = [gather_gpu.kernel_name(itemsize) for itemsize in (1, 2, 4)]
LETTERBOX_KERNELS = [letterbox_gpu.kernel_name(itemsize) for itemsize in (1, 2, 4)]
TEXT_KERNELS = [text_gpu.kernel_name(itemsize) for itemsize in (2, 4)]
HERE = Path(__file__).parent
RUN = f"""
extern "C" void run(int which, unsigned blocks, const Tile* tiles, const unsigned* tile_of_block, int stage_bytes) {{
    decltype(&{KERNELS[0]}) kernels[] = {{{", ".join(KERNELS)}}};
    host::launch(blocks, LANES, ROWS, stage_bytes, kernels[which], tiles, tile_of_block, stage_bytes);
}}
const int FIRST_GATHER = {len(KERNELS)};  // kernels from this number on are those of the gather
extern "C" void run_gather(int which, unsigned blocks, const Tile* tiles, const unsigned* tile_of_block) {{
    decltype(&{GATHER_KERNELS[0]}) kernels[] = {{{", ".join(GATHER_KERNELS)}}};
    host::launch(blocks, THREADS, 1, 0, kernels[which], tiles, tile_of_block);
}}
const int FIRST_LETTERBOX = FIRST_GATHER + {len(GATHER_KERNELS)};
extern "C" void run_letterbox(int which, unsigned blocks, const Tile* tiles, const unsigned* tile_of_block,
                              const int* lines) {{
    decltype(&{LETTERBOX_KERNELS[0]}) kernels[] = {{{", ".join(LETTERBOX_KERNELS)}}};
    host::launch(blocks, LANES, ROWS, 0, kernels[which], tiles, tile_of_block, lines);
}}
extern "C" void run_text(int wide, unsigned blocks, const int* rows, const void* table, long long* tokens,
                         long long* seen, int samples, int length) {{
    if (wide)
        host::launch(blocks, THREADS, 1, 0, {TEXT_KERNELS[1]}, rows, (const int*)table, tokens, seen, samples,
                     length);
    else
        host::launch(blocks, THREADS, 1, 0, {TEXT_KERNELS[0]}, rows, (const unsigned short*)table, tokens, seen,
                     samples, length);
}}
"""

SANITIZERS = {"bounds": ("address,undefined", 1, 1, 60), "races": ("thread", 4, 2, 5)}  # threads of a block, tiles


def build(*options, lanes, rows, main=""):
    """Compile for blocks of lanes x rows threads; returns the path of the output, kept until a source changes."""
    blocks = {"LANES": lanes, "ROWS": rows, "THREADS": lanes * rows}
    sources = [
        replace(gpu.SOURCE, constants={name: blocks.get(name, value) for name, value in gpu.SOURCE.constants.items()})
        for gpu in (mosaic_gpu, gather_gpu, letterbox_gpu, text_gpu)
    ]
    text = f'#include "cuda_on_host.hpp"\n{cuda_source.text_of(*sources)}{RUN}{main}'
    command = ["g++", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", *options]
    header = (HERE / "cuda_on_host.hpp").read_text()
    return built({"kernel.cpp": text, "cuda_on_host.hpp": header}, [*command, "kernel.cpp", "-pthread"])


def launch(library, tiles):
    """What ``mosaic.gpu.write_tiles`` does, here and now, with host addresses."""
    if not len(tiles):
        return
    tile_of_block, stage_bytes = mosaic_gpu.blocks_of(tiles)
    which = KERNELS.index(mosaic_gpu.kernel_name(int(tiles["resample"][0]), int(tiles["itemsize"][0])))
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (tiles, tile_of_block))
    library.run(which, len(tile_of_block), *pointers, stage_bytes)


def launch_gather(library, tiles):
    """What ``gather.gpu.write_tiles`` does, here and now, with host addresses.

    Args:
        library: what ``library`` gives; the fixture ``cuda_library``.
        tiles: dtype ``TILE`` [n], n >= 1, contiguous; ``first_block`` is set.
    """
    tile_of_block = gather_gpu.blocks_of(tiles)
    which = GATHER_KERNELS.index(gather_gpu.kernel_name(int(tiles["itemsize"][0])))
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (tiles, tile_of_block))
    library.run_gather(which, len(tile_of_block), *pointers)


def launch_letterbox(library, tiles):
    """What ``letterbox.gpu.write_tiles`` does, here and now, with host addresses."""
    if not len(tiles):
        return
    tiles = tiles.copy()
    tile_of_block, lines = letterbox_gpu.blocks_of(tiles)
    which = LETTERBOX_KERNELS.index(letterbox_gpu.kernel_name(int(tiles["itemsize"][0])))
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (tiles, tile_of_block, lines))
    library.run_letterbox(which, len(tile_of_block), *pointers)


def launch_text(library, blocks, wide, pointers, samples, length):
    """A launch of ``tokens.cu``; the library's blocks are single threads, so there is one for each token."""
    del blocks
    library.run_text(wide, samples * length, *map(ctypes.c_void_p, pointers), samples, length)


@functools.cache
def library():
    """The sources as a library whose blocks are single threads."""
    return ctypes.CDLL(str(build("-O2", "-shared", "-fPIC", lanes=1, rows=1)))


def sanitized(name):
    """A program that runs a launch under one of SANITIZERS, and how many tiles it can do in reasonable time."""
    sanitizer, lanes, rows, count = SANITIZERS[name]
    options = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O1", "-g"]
    return build(*options, lanes=lanes, rows=rows, main=(HERE / "sanitize.cpp").read_text()), count


def run_sanitized(program, folder, kernel, tiles, tile_of_block, stage_bytes=0, lines=()):
    """Run a launch; ``photo`` is the offset of a photo from a multiple of 128 bytes, other addresses are made up."""
    head = np.array([kernel, len(tile_of_block), stage_bytes, len(tiles), len(lines)], np.int32)
    file = folder / "launch"
    file.write_bytes(head.tobytes() + tiles.tobytes() + tile_of_block.tobytes() + np.array(lines, np.int32).tobytes())
    run = subprocess.run([program, file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:4000]
