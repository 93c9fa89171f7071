"""The CUDA C++ sources: their complete text, and the kernels compiled from it.

CuPy compiles a source at first use, for the device at hand, and keeps the result in its cache on disk.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali.kernels.tile import TILE

OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted multiply-add would round once where the CPU rounds twice


def struct_of(dtype: np.dtype[Any], name: str) -> str:
    """The C struct of a structured dtype without hidden padding."""
    kinds = {"u8": "unsigned long long", "i8": "long long", "u4": "unsigned", "i4": "int"}
    fields = "".join(f"    {kinds[dtype[field].str[1:]]} {field};\n" for field in dtype.names or ())
    return f"struct {name} {{\n{fields}}};\n"


def source(*files: str) -> str:
    """The CUDA C++ text of files of this folder, "mosaic.cu" or "gather.cu", with all that they need before it."""
    texts = (Path(__file__).with_name(file).read_text() for file in ("lines.cuh", *files))
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
