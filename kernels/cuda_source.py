"""The CUDA C++ sources: their complete text, and the kernels compiled from it.

CuPy compiles a source at first use, for the device at hand, and keeps the result in its cache on disk.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali.kernels.arrays import I16
from nemo_dali.kernels.tile import TILE
from nemo_dali.kernels.warp_weights import WEIGHTS_CUBIC

OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted multiply-add would round once where the CPU rounds twice


def struct_of(dtype: np.dtype[Any], name: str) -> str:
    """The C struct of a structured dtype without hidden padding."""
    kinds = {"u8": "unsigned long long", "i8": "long long", "u4": "unsigned", "i4": "int"}
    fields = "".join(f"    {kinds[dtype[field].str[1:]]} {field};\n" for field in dtype.names or ())
    return f"struct {name} {{\n{fields}}};\n"


def table_of(array: I16, name: str) -> str:
    """The C array of uint4 in device memory with the bytes of an array, a multiple of 16."""
    words = array.view(np.uint32).reshape(-1, 4).tolist()
    rows = ",\n".join("    {" + ", ".join(f"{word}u" for word in row) + "}" for row in words)
    return f"__device__ const uint4 {name}[] = {{\n{rows}}};\n"


def source(*files: str) -> str:
    """The CUDA C++ text of files below this folder, such as "mosaic/mosaic.cu", with all that they need before it."""
    texts = [(Path(__file__).parent / file).read_text() for file in ("lines.cuh", *files)]
    if "letterbox/letterbox.cu" in files:
        texts.insert(0, table_of(WEIGHTS_CUBIC, "CUBIC"))
    return struct_of(TILE, "Tile") + "".join(texts)


@cache
def load_kernel(file: str, name: str, device: int) -> Any:
    """A kernel of a file, ready to launch on a device; compiling takes seconds, loading from the cache far less."""
    return _load_module(file, device).get_function(name)


@cache
def _load_module(file: str, device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=source(file), options=OPTIONS)
        module.compile()
    return module
