"""Writing nemo_dali's HDF5 files: full length from the start, filled in place, named when complete.

    F.partial ──▶ created, all of its room taken ──▶ rows ──▶ checksums, fingerprint ──▶ fsync ──▶ F

h5py only lays the file out; from then on it is filled through mappings. A run that was killed is resumed where its file
says it stopped. ``index`` says what is where.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import shorten
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import HDF5, OFFSETS, MappedFile, read_index
from nemo_dali.io.index import LARGEST_BLOCK, UNFINISHED, Entry, Index, Value, checksum, encode, row_checksum
from nemo_dali.io.layout import PAGE, Layout, block_of, create, room_for
from nemo_dali.io.output import FREE_SPACE, cannot_write, disk_errors_reported, output_file, partial_name

SEARCHED = 1 << 24  # bytes at a file's beginning and end in which the name of a format is looked for


class HasFile(Protocol):
    """An object with an open file."""

    @property
    def mapped(self) -> MappedFile:
        """The file."""
        ...


T = TypeVar("T", bound=HasFile)


def amount(nbytes: int) -> str:
    """A number of bytes as a person reads it."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


class Unfinished(Generic[T]):
    """A file that is being written.

    Attributes:
        file: what ``read`` made of it: mapped, read-only arrays that show what is written.
        path: its name until it is finished.
    """

    def __init__(self, file: T, path: Path, descriptor: int) -> None:
        self.file, self.path, self._descriptor = file, path, descriptor
        self._arrays = file.mapped.index.arrays
        self._writable: dict[str, npt.NDArray[Any]] = {}

    def writable(self, name: str) -> npt.NDArray[Any]:
        """An array, to be written into."""
        if name not in self._writable:
            self._writable[name] = _writable(self._descriptor, self._arrays[name])
        return self._writable[name]

    def record(self, name: str, row: int, content: bytes) -> None:
        """Write a small record that says what is done, in place."""
        os.pwrite(self._descriptor, content, self._arrays[name].offset + len(content) * row)

    def seal(self, name: str, rows: Sequence[int] | None = None) -> None:
        """Write the checksums of an array's rows, which must not change any more; None: of all rows."""
        array, sums = self.writable(name), self.writable(self._arrays[name].row_checksums)
        for row in range(len(array)) if rows is None else rows:
            sums[row] = row_checksum(array[row])

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        os.fsync(self._descriptor)

    def finish(self, fingerprint: str) -> None:
        """Put checksums and fingerprint in place; rows with a checksum each must have been sealed before."""
        _finish(self._descriptor, self.file.mapped.index, fingerprint)


@contextmanager
def unfinished(
    output: Path,
    *,
    format: str,
    version: int,
    attributes: Mapping[str, Value],
    arrays: Mapping[str, Layout],
    read: Callable[[Path], T],
    done: Callable[[T], str],
) -> Iterator[Unfinished[T]]:
    """Begin a file or resume one; it gets its name when the block ends without an exception.

    After an exception it is left for the next run, if anything in it is done.

    Args:
        output: its name when it is complete; one that exists is replaced only then.
        attributes: what the file is made from and how; a file that was begun with others is refused.
        arrays: all of its arrays, except for checksums.
        read: opens a file, finished or not.
        done: says how much of a file is done ("12 of 24 photos are done"); "" where nothing is.

    Raises:
        FileFormatError: something else has that name, the file cannot be written, the disk has no room for it, another
            run is writing it, or an unfinished one was begun with other attributes.
    """
    partial, kind = partial_name(output), f"a file of format '{format}'"
    looked, file = False, None

    def keep() -> bool:
        return not looked or (file is not None and bool(done(file)))

    with (
        disk_errors_reported(output),
        output_file(output, is_ours=_is_ours(output, format), kind=kind, keep=keep) as descriptor,
    ):
        file = _begun(partial, read, done)
        looked = True
        if file is None:
            _check_room(output, descriptor, nbytes := room_for(arrays))
            create(descriptor, nbytes, format=format, version=version, attributes=attributes, arrays=arrays)
            file = read(partial)
        else:
            _check_attributes(output, partial, file.mapped.index.attributes, attributes, done(file))
            _check_room(output, descriptor, os.fstat(descriptor).st_size)
        # All of it now: if the disk is full later, a mapped page cannot be written, and the process is killed.
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
        yield Unfinished(file, partial, descriptor)


@dataclass
class Content:
    """What goes into a file that is written at once: arrays and lists of strings by name, and its fingerprint."""

    columns: Mapping[str, npt.NDArray[Any] | list[str]]
    attributes: Mapping[str, Value]
    fingerprint: str


@contextmanager
def write_h5(output: str | Path, *, format: str, version: int) -> Iterator[Callable[[Content], None]]:
    """Write a file that appears under its name only when the block ends without an exception.

    The block is given a function that writes the content, to be called once, at its end: by then it is known that the
    file can be written.

    Raises:
        FileFormatError: something else has that name, the file cannot be written, the disk is full, or another run is
            writing it.
    """
    output, kind = Path(output), f"a file of format '{format}'"
    with disk_errors_reported(output), output_file(output, is_ours=_is_ours(output, format), kind=kind) as descriptor:

        def write(content: Content) -> None:
            arrays = _as_arrays(content.columns)
            layouts = {name: Layout(array.dtype.str, array.shape) for name, array in arrays.items()}
            _check_room(output, descriptor, nbytes := room_for(layouts))
            create(descriptor, nbytes, format=format, version=version, attributes=content.attributes, arrays=layouts)
            os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
            index = read_index(descriptor)
            for name, array in arrays.items():
                _writable(descriptor, index.arrays[name])[...] = array
            _finish(descriptor, index, content.fingerprint)

        yield write


def _as_arrays(columns: Mapping[str, npt.NDArray[Any] | list[str]]) -> dict[str, npt.NDArray[Any]]:
    """Columns as arrays: strings become their bytes, and where each begins in these."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, column in columns.items():
        if isinstance(column, np.ndarray):
            arrays[name] = column
            continue
        encoded = [text.encode() for text in column]
        arrays[name] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[name + OFFSETS] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return arrays


def _is_ours(output: Path, format: str) -> Callable[[bytes], bool]:
    """A check, by its first bytes, that a file may be overwritten: it has the same format, of any version."""

    def ours(head: bytes) -> bool:
        if head.startswith(HDF5):
            return _names(output, format.encode())
        return head.startswith(f"{format} ".encode()) or (not head.strip(b"\0") and _is_bare(partial_name(output)))

    return ours


def _is_bare(path: Path) -> bool:
    """Whether a file has nothing but what HDF5 begins it with, as after a kill at the wrong moment."""
    with suppress(OSError), open(path, "rb") as file:
        content = file.read(LARGEST_BLOCK + PAGE).lstrip(b"\0")
        return content.startswith(HDF5) and len(content) < PAGE // 16
    return False


def _names(path: Path, format: bytes) -> bool:
    """Whether a file without an index names a format, as an attribute of version 1 did."""
    with suppress(OSError), open(path, "rb") as file:
        if format in file.read(SEARCHED):
            return True
        file.seek(max(os.fstat(file.fileno()).st_size - SEARCHED, 0))
        return format in file.read(SEARCHED)
    return False


def _begun(partial: Path, read: Callable[[Path], T], done: Callable[[T], str]) -> T | None:
    """What an earlier run left, if anything in it is done."""
    try:
        file = read(partial)
    except FileFormatError:  # killed while the file itself was being made
        return None
    return file if done(file) else None


def _check_attributes(
    output: Path, partial: Path, found: Mapping[str, Value], wanted: Mapping[str, Value], done: str
) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            here, there = shorten(str(found.get(name)), str(value))
            raise cannot_write(
                output,
                f"{done} for {name.replace('_', ' ')} {here}, not {there}",
                "To continue, give the same options again; to start over, remove "
                f"{partial}, or choose another place with -o.",
            )


def _check_room(output: Path, descriptor: int, needed: int) -> None:
    there, free = os.fstat(descriptor).st_blocks * 512, shutil.disk_usage(output.parent).free
    if needed - there > free:
        why = f"it needs {amount(needed)}, and the disk has {amount(free + there)} for it"
        raise cannot_write(output, why, FREE_SPACE)


def _finish(descriptor: int, index: Index, fingerprint: str) -> None:
    """Put checksums and fingerprint into the index and the fingerprint into HDF5's attribute."""
    arrays = {
        name: replace(entry, checksum=checksum(_writable(descriptor, entry))) if entry.checksum else entry
        for name, entry in index.arrays.items()
    }
    os.fsync(descriptor)
    first = min((entry.offset for entry in arrays.values() if entry.nbytes), default=os.fstat(descriptor).st_size)
    user_block = block_of(os.pread(descriptor, PAGE, 0))
    head = os.pread(descriptor, first - user_block, user_block)
    # A run that was killed right here has put it in place already.
    place = max(head.find(UNFINISHED.encode()), head.find(fingerprint.encode()))
    if place >= 0:
        os.pwrite(descriptor, fingerprint.encode(), user_block + place)
    os.pwrite(descriptor, encode(replace(index, fingerprint=fingerprint, arrays=arrays), user_block), 0)


def _writable(descriptor: int, entry: Entry) -> npt.NDArray[Any]:
    if not entry.nbytes:
        return np.empty(entry.shape, entry.dtype)
    return np.memmap(f"/proc/self/fd/{descriptor}", entry.dtype, "r+", entry.offset, entry.shape)
