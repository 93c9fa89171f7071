"""The layout of a new nemo_dali file: where its index and its arrays are, and the HDF5 around them."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import h5py
import numpy as np

from nemo_dali._version import __version__
from nemo_dali.io.index import UNFINISHED, UNKNOWN, Entry, Index, Value, encode, first_line

PAGE = 4096  # bytes; arrays begin at a page, so that no small record spans two, of which a kill may leave only one
CHECKSUMS = "checksums/"  # before the name of an array: the name of the array of its rows' checksums


class Layout(NamedTuple):
    """The layout of an array that is to be written.

    Attributes:
        by_row: a checksum for each row, so that a reader need not read the whole array first.
    """

    dtype: str
    shape: tuple[int, ...]
    by_row: bool = False


def room_for(arrays: Mapping[str, Layout]) -> int:
    """How large the file is, to within a few pages."""
    rows = sum(8 * layout.shape[0] for layout in arrays.values() if layout.by_row)
    sizes = [np.dtype(layout.dtype).itemsize * int(np.prod(layout.shape)) for layout in arrays.values()]
    return sum(sizes) + rows + (32 + 2 * len(sizes)) * PAGE


def create(
    descriptor: int,
    nbytes: int,
    *,
    format: str,
    version: int,
    attributes: Mapping[str, Value],
    arrays: Mapping[str, Layout],
) -> None:
    """Write everything but content, checksums and fingerprint; the same arguments give the same bytes."""
    layouts = dict(arrays)
    for name, layout in arrays.items():
        if layout.by_row:
            layouts[CHECKSUMS + name] = Layout("<u8", layout.shape[:1])
    entries = {
        name: Entry(
            layout.dtype,
            layout.shape,
            0,
            "" if layout.by_row else UNKNOWN,
            CHECKSUMS + name if layout.by_row else "",
        )
        for name, layout in layouts.items()
    }
    made_by = f"nemo-dali {__version__}"
    index = Index(format, version, UNFINISHED, made_by, attributes, entries)
    # As large as the longest index can be: no offset has more digits than the file's length.
    longest = replace(index, arrays={name: replace(entry, offset=10 * nbytes) for name, entry in entries.items()})
    user_block = block_of(encode(longest))
    os.pwrite(descriptor, f"{format} ".encode(), 0)  # whoever finds the file after a kill knows that it is ours
    os.ftruncate(descriptor, nbytes)  # if files are limited in size, this fails, and not HDF5
    offsets = _lay_out(descriptor, user_block, index)
    index = replace(index, arrays={name: replace(entry, offset=offsets[name]) for name, entry in entries.items()})
    os.pwrite(descriptor, encode(index, user_block).ljust(user_block // 2, b"\0") * 2, 0)


def block_of(begin: bytes) -> int:
    """Bytes of the user block of a file with this beginning."""
    line = first_line(begin)
    assert line is not None
    return line.user_block


def _lay_out(descriptor: int, user_block: int, index: Index) -> dict[str, int]:
    """Make an HDF5 file with a place for every array; return where in the file each is."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    # The earliest structures have no checksums of HDF5's own, so that the fingerprint can be changed in place.
    access.set_libver_bounds(h5py.h5f.LIBVER_EARLIEST, h5py.h5f.LIBVER_V110)
    access.set_file_locking(False, True)  # HDF5's own lock would collide with ours: both are flock
    access.set_alignment(1, PAGE)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_userblock(user_block)
    creation.set_obj_track_times(False)  # the same content gives the same bytes
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # now, but nothing is written: the file is as long as it will be
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    path = f"/proc/self/fd/{descriptor}".encode()  # whatever has the file's name by now
    created = h5py.h5f.create(path, h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    os.pwrite(descriptor, f"{index.format} ".encode(), 0)  # again: HDF5 has started the file from scratch
    offsets = {}
    with h5py.File(created) as file:
        common = {"fingerprint": index.fingerprint, "made_by": index.made_by, "format": index.format}
        for name, value in {**common, "version": index.version, **index.attributes}.items():
            _write_attribute(file, name, value)
        for name, entry in index.arrays.items():
            group = file
            if above := name.rpartition("/")[0]:
                group = file[above] if above in file else _make_groups(file, above)
            kind = h5py.h5t.py_create(np.dtype(entry.dtype))
            space = h5py.h5s.create_simple(entry.shape)
            made = h5py.h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, layout)
            offsets[name] = made.get_offset() if entry.nbytes else user_block
    return offsets


def _make_groups(file: h5py.File, name: str) -> h5py.Group:
    """A group and those above it, made without the timestamps that HDF5 would add by itself."""
    group = file
    for part in name.split("/"):
        group = group[part] if part in group else group.create_group(part, track_times=False)
    return group


def _write_attribute(file: h5py.File, name: str, value: Value) -> None:
    """An attribute of a fixed length; lists are JSON, as HDF5 has none."""
    if isinstance(value, list | tuple):
        value = json.dumps(value)
    if isinstance(value, str):
        encoded = value.encode()
        file.attrs.create(name, np.bytes_(encoded), dtype=h5py.string_dtype("utf-8", max(len(encoded), 1)))
    else:
        file.attrs.create(name, value, dtype="<f8" if isinstance(value, float) else "<i8")
