"""Files of ours with other content and all checksums right: what a hostile author would write.

Only what is read is written: the index and the arrays, without the structures of HDF5.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nemo_dali.data.dataset import RUN_CHECKSUMS
from nemo_dali.io.h5 import read_index
from nemo_dali.io.index import Entry, Index, checksum, encode

UNIT = 4096


@dataclass
class Parts:
    """What is in a file, to be changed."""

    index: Index
    attributes: dict[str, Any]
    arrays: dict[str, Any]
    by_row: dict[str, str]  # names of arrays, and of the arrays with their rows' checksums

    def strings(self, name: str) -> list[str]:
        content, offsets = self.arrays[name].tobytes(), self.arrays[f"{name}_offsets"]
        return [content[a:b].decode() for a, b in pairwise(offsets)]

    def set_strings(self, name: str, strings: list[str]) -> None:
        encoded = [text.encode() for text in strings]
        self.arrays[name] = np.frombuffer(b"".join(encoded), np.uint8)
        self.arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)


def parts_of(path: Path) -> Parts:
    with open(path, "rb") as file:
        index = read_index(file.fileno())
    content = path.read_bytes()
    arrays = {
        name: np.frombuffer(content, entry.dtype, int(np.prod(entry.shape)), entry.offset).reshape(entry.shape).copy()
        for name, entry in index.arrays.items()
    }
    by_row = {name: entry.row_checksums for name, entry in index.arrays.items() if entry.row_checksums}
    return Parts(index, dict(index.attributes), arrays, by_row)


def forge(path: Path, edit: Callable[[Parts], None], output: Path | None = None) -> Path:
    """Change a file's parts and write it again, under the same or another name."""
    parts = parts_of(path)
    edit(parts)
    output = output or path
    for name, sums in parts.by_row.items():
        if name in parts.arrays and sums in parts.arrays:
            rows = np.ascontiguousarray(parts.arrays[name])
            with suppress(TypeError):  # a scalar, say, has no rows
                parts.arrays[sums] = np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows], np.uint64)
    if RUN_CHECKSUMS in parts.arrays:
        with suppress(KeyError, TypeError, ValueError):
            begin, count = parts.arrays["refs/rle_begin"].tolist(), parts.arrays["refs/rle_count"].tolist()
            runs = [parts.arrays["rle/counts"][first : first + n] for first, n in zip(begin, count, strict=True)]
            parts.arrays[RUN_CHECKSUMS] = np.array([xxhash.xxh3_64_intdigest(run.tobytes()) for run in runs], np.uint64)
    entries, offset = {}, 1 << 16
    for name, array in parts.arrays.items():
        sums = parts.by_row.get(name, "")
        content = np.ascontiguousarray(array)
        entries[name] = Entry(content.dtype.str, array.shape, offset, "" if sums else checksum(content.tobytes()), sums)
        offset += -(-content.nbytes // UNIT) * UNIT
    begin = encode(replace(parts.index, attributes=parts.attributes, arrays=entries), 1 << 16)
    whole = bytearray(offset)
    whole[: len(begin)] = begin
    for name, array in parts.arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        whole[entries[name].offset : entries[name].offset + len(content)] = content
    output.write_bytes(whole)
    return output
