"""Builds the CUDA source with a C++ compiler, for tests on machines without a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_dali.kernels import mosaic_cuda
from nemo_dali.kernels.tile import RESAMPLE

KERNELS = [mosaic_cuda.kernel_name(resample, itemsize) for resample in RESAMPLE.values() for itemsize in (1, 2, 4)]
HERE = Path(__file__).parent
RUN = f"""
extern "C" void run(int which, unsigned blocks, const Tile* tiles, const unsigned* tile_of_block, int stage_bytes) {{
    decltype(&{KERNELS[0]}) kernels[] = {{{", ".join(KERNELS)}}};
    host::launch(blocks, LANES, ROWS, stage_bytes, kernels[which], tiles, tile_of_block, stage_bytes);
}}
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(folder, *options, lanes, rows, main=""):
    """Compile for blocks of lanes x rows threads; returns the path of what came out."""
    (folder / "kernel.cpp").write_text(f'#include "cuda_on_host.hpp"\n{mosaic_cuda.source()}{RUN}{main}')
    command = ["g++", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", f"-I{HERE}"]
    command += [f"-DLANES={lanes}", f"-DROWS={rows}", *options, "kernel.cpp", "-o", "kernel", "-pthread"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "kernel"


def launch(library, tiles):
    """What ``mosaic_cuda.write_tiles`` does, here and now, with host addresses."""
    tile_of_block, stage_bytes = mosaic_cuda.cut(tiles)
    which = KERNELS.index(mosaic_cuda.kernel_name(int(tiles["resample"][0]), int(tiles["itemsize"][0])))
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (tiles, tile_of_block))
    library.run(which, len(tile_of_block), *pointers, stage_bytes)


def library(folder):
    """The source as a library whose blocks are single threads."""
    return ctypes.CDLL(str(build(folder, "-O2", "-shared", "-fPIC", lanes=1, rows=1)))
