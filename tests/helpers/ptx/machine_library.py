"""``machine.cpp`` as a library, built when it is needed."""

import ctypes
import functools
from pathlib import Path

from tests.helpers.building import built

HERE = Path(__file__).parent


@functools.cache
def library():
    """The library, from the cache or built, which takes ten seconds."""
    sources = {path.name: path.read_text() for path in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.hpp")))}
    command = ["g++", "-std=c++20", "-O2", "-Wall", "-Werror", "-fPIC", "-shared", "-ffp-contract=off", "machine.cpp"]
    found = ctypes.CDLL(str(built(sources, command)))
    found.ptx_shared_window.restype = ctypes.c_uint64
    return found


@functools.cache
def names():
    """The numbers of what the machine knows, by kind and name."""
    kinds = ("operations", "types", "spaces", "comparisons", "roundings", "shuffles")
    return {
        kind: {
            name: number
            for number, name in enumerate(ctypes.c_char_p.in_dll(library(), f"ptx_{kind}").value.decode().split())
        }
        for kind in kinds
    }
