"""Small files of ours in a format for tests, written at once or row by row; and how two views of one compare."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from nemo_dali.io.h5 import MappedFile, read_index
from nemo_dali.io.layout import Layout
from nemo_dali.io.writer import Content, Unfinished, unfinished, write_h5

KIND = {"format": "nemo-dali/test", "version": 3}
ATTRIBUTES = {"name": "größer", "rows": 3, "bound": 0.25, "list": ["a", "b"], "empty": "", "long": "x" * 5000}


def content(values: Any) -> Content:
    columns = {"values": values, "group/values": values * 2, "group/names": ["", "blue jay", "größer 犬"]}
    return Content(columns, ATTRIBUTES, "0123456789abcdef" * 4)


def write(path: Path, values: Any, **kind: Any) -> None:
    with write_h5(path, **(KIND | kind)) as write_content:
        write_content(content(values))


def opened(path: Path) -> MappedFile:
    return MappedFile(path, **KIND, remedy="Make it again.")


def assert_views_agree(path: Path) -> None:
    """Check that h5py shows of a file what its index says, and nothing else."""
    with open(path, "rb") as raw, h5py.File(path) as file:
        index = read_index(raw.fileno())
        found = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        assert set(found) == set(index.arrays)
        for name, entry in index.arrays.items():
            dataset = found[name]
            assert (dataset.dtype.str, dataset.shape) == (entry.dtype, entry.shape)
            assert dataset.chunks is None and dataset.compression is None and not dataset.external
            if entry.nbytes:
                assert dataset.id.get_offset() == entry.offset
        shown = {}
        for name, value in file.attrs.items():
            assert h5py.check_string_dtype(file.attrs.get_id(name).dtype) is None or isinstance(value, np.bytes_)
            shown[name] = value.decode() if isinstance(value, bytes) else value
        common = {"format": index.format, "version": index.version, "fingerprint": index.fingerprint}
        expected = common | {"made_by": index.made_by} | dict(index.attributes)
        assert shown == {name: json.dumps(v) if isinstance(v, list) else v for name, v in expected.items()}


class Table:
    def __init__(self, path: Path) -> None:
        self.mapped = MappedFile(path, **KIND, remedy="Make it again.", unfinished=True)


ARRAYS = {"rows": Layout("<i4", (6, 4), by_row=True), "done": Layout("<i8", (1,))}


def begin(path: Path, rows: int = 0, **attributes: Any) -> Any:
    def done(table: Table) -> str:
        count = int(table.mapped.array("done", "<i8", (1,))[0])
        return f"{count} rows are done" if count else ""

    return unfinished(path, **KIND, attributes={"a": 1} | attributes, arrays=ARRAYS, read=Table, done=done)


def fill(made: Unfinished[Table], first: int, last: int) -> None:
    for row in range(first, last):
        made.writable("rows")[row] = row
        made.seal("rows", [row])
        made.sync()
        made.record("done", 0, (row + 1).to_bytes(8, "little"))
