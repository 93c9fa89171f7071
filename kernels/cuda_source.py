"""The CUDA C++ sources: their complete text, and the kernels compiled from it.

What a source and Python must agree on is written once, in Python: the fields of a tile, a launch's geometry and tables
of weights. It stands before the source's own text.

CuPy compiles a source at first use, for the device at hand, and keeps the result in its cache on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali.kernels.arrays import I16
from nemo_dali.kernels.tile import TILE

OPTIONS = ("--std=c++17", "--fmad=false")  # a contracted multiply-add would round once where the CPU rounds twice


@dataclass(frozen=True, eq=False)
class Source:
    """A file of CUDA C++ below this folder, and what it shares with its launcher, by the names that it has there.

    Attributes:
        constants: integers.
        tables: see ``table_of``.
        headers: files below this folder that stand before it.
    """

    file: str
    constants: Mapping[str, int]
    tables: Mapping[str, I16] = field(default_factory=dict)
    headers: tuple[str, ...] = ()


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


def text_of(*sources: Source) -> str:
    """The CUDA C++ text of sources, with all that they need before it.

    Raises:
        ValueError: a name stands for another number in each of two sources.
    """
    constants: dict[str, int] = {}
    for source in sources:
        for name, value in source.constants.items():
            if constants.setdefault(name, value) != value:
                raise ValueError(f"{name} ({value}) must be {constants[name]}, as in another source of the same text")
    texts = [struct_of(TILE, "Tile"), *(f"constexpr int {name} = {value};\n" for name, value in constants.items())]
    texts += [table_of(table, name) for source in sources for name, table in source.tables.items()]
    files = [file for source in sources for file in (*source.headers, source.file)]
    texts += [(Path(__file__).parent / file).read_text() for file in ("lines.cuh", *files)]
    return "".join(texts)


@cache
def load_kernel(source: Source, name: str, device: int) -> Any:
    """A kernel of a source, ready to launch on a device; compiling takes seconds, loading from the cache far less."""
    return _load_module(source, device).get_function(name)


@cache
def _load_module(source: Source, device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=text_of(source), options=OPTIONS)
        module.compile()
    return module
