"""Reading nemo_dali's HDF5 files: mapped by their own index, checked before use. libhdf5 takes no part in it.

A small array is compared with its checksum when it is opened; a row of a large one, and a column of strings, when it is
first used.
"""

import codecs
import hashlib
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import FileFormatError
from nemo_dali.io.files import open_regular
from nemo_dali.io.index import (
    LARGEST_BLOCK,
    UNFINISHED,
    DamagedIndex,
    Index,
    Line,
    checksum,
    decode,
    first_line,
    row_checksum,
)
from nemo_dali.io.output import HEAD

HDF5 = b"\x89HDF\r\n\x1a\n"  # how every HDF5 file without a user block begins, those of version 1 among them
PIECE = 1 << 20  # bytes, or offsets, of a column of strings that are checked together
OFFSETS = "_offsets"  # after the name of a column of strings: where in its bytes each begins, and the end


class MappedFile:
    """A file whose arrays are mapped, held open: replaced or removed under its name, it lives on here as it was.

    Cut short, it does not: touching what was beyond the new end kills the process with SIGBUS. Nothing catches that, so
    call ``check`` before work that reads the arrays: only the moment between the two remains.

    Args:
        path: of the file.
        format, version: what it must be.
        remedy: how to make such a file, put at the end of every message.
        unfinished: accept one that is still being written, too; its checksums are ignored.

    Attributes:
        index: what is in the file.
        path, remedy: as given.

    Raises:
        FileFormatError: missing, not a regular file, cut short, of another format or version, unfinished, or damaged.
    """

    def __init__(self, path: Path, *, format: str, version: int, remedy: str, unfinished: bool = False) -> None:
        self.path, self.remedy = path, remedy
        descriptor = _open(path, remedy)
        try:
            self._length = os.fstat(descriptor).st_size
            self._check_kind(os.pread(descriptor, HEAD, 0), format, version)
            self.index = self._read_index(descriptor, unfinished)
            self._map = mmap.mmap(descriptor, self._length, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if self.index.fingerprint == UNFINISHED and not unfinished:
            raise FileFormatError(f"{path} is half built. {remedy}")

    def _check_kind(self, head: bytes, format: str, version: int) -> None:
        path, remedy = self.path, self.remedy
        found = _first_line(head, path, remedy)
        if found.format != format:
            if found.format.startswith("nemo-dali/"):  # the remedy would say to overwrite it
                remedy = f"Give a '{format}' file in its place."
            raise FileFormatError(f"{path} has format '{found.format}', not '{format}'. {remedy}")
        if found.version != version:
            raise FileFormatError(
                f"{path} is version {found.version}; this nemo-dali reads version {version}. {remedy}"
            )

    def _read_index(self, descriptor: int, unfinished: bool) -> Index:
        try:
            return read_index(descriptor)
        except DamagedIndex as error:
            if unfinished:  # possibly killed while the final one was put in place
                try:
                    return read_index(descriptor, copy=True)
                except DamagedIndex:
                    pass
            raise self.damage(str(error)) from error

    def damage(self, what: str) -> FileFormatError:
        """The error for something in the file that is not as it must be."""
        return FileFormatError(f"{self.path} is damaged: {what}. {self.remedy}")

    def check(self) -> None:
        """Check that the file is no shorter than it was; this takes a microsecond.

        Raises:
            FileFormatError: it is shorter, or it is gone from a network file system.
        """
        try:
            length = self._map.size()
        except OSError as error:
            raise FileFormatError(
                f"{self.path} disappeared while it was in use ({error.strerror}). Give each version a name of its own "
                "on a network file system, and start again."
            ) from error
        if length < self._length:
            raise FileFormatError(
                f"{self.path} was truncated while it was in use, from {self._length} to {length} bytes. Write it again "
                "under another name, rename that, and start again."
            )

    def array(
        self, name: str, dtypes: str | Collection[str], shape: Sequence[int | None], *, compare: bool = True
    ) -> npt.NDArray[Any]:
        """An array, read-only, which outlives this object. One that has a checksum is read whole and compared.

        Args:
            dtypes: the types that it may have, such as "<i4".
            shape: the shape that it must have; None: any length along that axis.
            compare: False: none of it is read; the caller makes sure that it is checked before it is used.

        Raises:
            FileFormatError: there is none, or it is of another type or shape, or damaged.
        """
        dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
        entry = self.index.arrays.get(name)
        if entry is None or entry.dtype not in dtypes or len(entry.shape) != len(shape):
            raise self.damage(f"/{name} is missing, or not of type {' or '.join(dtypes)} with {len(shape)} axes")
        if any(wanted not in (None, found) for wanted, found in zip(shape, entry.shape, strict=True)):
            wanted = ", ".join("any" if length is None else str(length) for length in shape)
            raise self.damage(f"/{name} is {list(entry.shape)}, not [{wanted}]")
        if not entry.nbytes:
            return np.empty(entry.shape, entry.dtype)
        array: npt.NDArray[Any] = np.ndarray(entry.shape, entry.dtype, self._map, entry.offset)
        compare = compare and bool(entry.checksum) and self.index.fingerprint != UNFINISHED
        if compare and checksum(array) != entry.checksum:
            raise self.damage(f"/{name} does not match its checksum")
        return array

    def rows(self, name: str) -> "CheckedRows":
        """The rows of an array that has a checksum for each, to be compared when first used."""
        entry = self.index.arrays[name]
        array = self.array(name, entry.dtype, entry.shape)
        if not entry.row_checksums:
            raise self.damage(f"/{name} has no checksum for each row")
        return CheckedRows(self, name, array, self.array(entry.row_checksums, "<u8", (len(array),)))

    def strings(self, name: str, *, allowed: Callable[[str], bool] | None = None, otherwise: str = "") -> "Strings":
        """A column of strings, of which nothing is read until one is used.

        Args:
            allowed: whether it may hold a string. otherwise: what is wrong if it may not, such as "has a number".

        Raises:
            FileFormatError: there is none.
        """
        return Strings(self, name, allowed, otherwise)

    def text(self, name: str) -> str:
        """An attribute that is a string."""
        value: str = self._attribute(name, str)
        return value

    def texts(self, name: str) -> list[str]:
        """An attribute that is a list of strings."""
        return [self._checked(name, str, value) for value in self._attribute(name, list)]

    def integer(self, name: str, *, least: int, most: int = 2**63 - 1) -> int:
        """An attribute that is an integer in a range."""
        return self._in_range(name, self._attribute(name, int), least, most)

    def integers(self, name: str, *, least: int, most: int) -> tuple[int, ...]:
        """An attribute that is a list of integers in a range."""
        values = self._attribute(name, list)
        return tuple(self._in_range(name, self._checked(name, int, value), least, most) for value in values)

    def bound(self, name: str) -> float | None:
        """An attribute that is a list of one number; None for an empty list."""
        values = [self._checked(name, float, value) for value in self._attribute(name, list)]
        if len(values) > 1:
            raise self.damage(f"its attribute {name} has {len(values)} numbers")
        return values[0] if values else None

    def _attribute(self, name: str, kind: type) -> Any:
        return self._checked(name, kind, self.index.attributes.get(name))

    def _checked(self, name: str, kind: type, value: Any) -> Any:
        if type(value) is not kind:
            raise self.damage(f"its attribute {name} is missing, or of the wrong type")
        return value

    def _in_range(self, name: str, value: int, least: int, most: int) -> int:
        if not least <= value <= most:
            raise self.damage(f"its attribute {name} is out of range")
        return value


class CheckedRows:
    """Which rows of an array were found to be as they were written. May be used by several threads."""

    def __init__(self, file: MappedFile, name: str, array: npt.NDArray[Any], expected: npt.NDArray[np.uint64]) -> None:
        self._file, self._name, self.array = file, name, array
        self._expected = expected
        self._sound = np.zeros(len(array), bool)

    def check(self, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Compare rows with their checksums, each once; 1 to 2 us for a row of 4 kB.

        Raises:
            FileFormatError: naming the first that is damaged.
        """
        new = rows[~self._sound[rows]]
        array, expected, digest = self.array, self._expected, row_checksum
        for row in new.tolist():
            if digest(array[row]) != expected[row]:
                raise self._file.damage(f"row {row} of /{self._name} does not match its checksum")
        self._sound[new] = True

    def check_all(self) -> None:
        """Compare all rows, so that the whole array is read."""
        if not self._sound.all():
            self.check(np.arange(len(self.array)))


class Strings(Sequence[str]):
    """A column of UTF-8 strings, made when they are used. Before the first one, all of them are checked.

    Using one raises FileFormatError if the column is damaged or not UTF-8, or must not hold that string.
    """

    def __init__(self, file: MappedFile, name: str, allowed: Callable[[str], bool] | None, otherwise: str) -> None:
        self._file, self._name, self._allowed, self._otherwise = file, name, allowed, otherwise
        self._bytes = file.array(name, "|u1", (None,), compare=False)
        self._offsets = file.array(name + OFFSETS, "<i8", (None,), compare=False)
        if not len(self._offsets):
            raise file.damage(f"/{name}{OFFSETS} are not contiguous")
        self._sound = False

    def _check(self) -> None:
        """Check that the file is no shorter than it was and, once, the whole column."""
        file, name = self._file, self._name
        file.check()
        if self._sound:
            return
        content, offsets = file.array(name, "|u1", (None,)), file.array(name + OFFSETS, "<i8", (None,))
        if offsets[0] or offsets[-1] != len(content) or (offsets[1:] < offsets[:-1]).any():
            raise file.damage(f"/{name}{OFFSETS} are not contiguous")
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for begin in range(0, len(content), PIECE):  # so that it takes no memory of its own
                decoder.decode(content[begin : begin + PIECE].tobytes())
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise file.damage(f"/{name} is not UTF-8") from error
        for begin in range(1, len(offsets) - 1, PIECE):
            inner = offsets[begin : min(begin + PIECE, len(offsets) - 1)]
            if ((content[inner[inner < len(content)]] & 0xC0) == 0x80).any():
                raise file.damage(f"/{name} has a string that begins in the middle of a character")
        self._sound = True

    def _allow(self, text: str) -> str:
        if self._allowed is not None and not self._allowed(text):
            raise self._file.damage(f"/{self._name} {self._otherwise}")
        return text

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        self._check()
        return self._allow(self._bytes[self._offsets[row] : self._offsets[row + 1]].tobytes().decode("utf-8"))

    def __iter__(self) -> Iterator[str]:
        self._check()
        whole, offsets = self._bytes.tobytes(), self._offsets.tolist()
        ascii_text = whole.decode("ascii") if whole.isascii() else None
        for begin, end in pairwise(offsets):
            yield self._allow(whole[begin:end].decode("utf-8") if ascii_text is None else ascii_text[begin:end])


def _open(path: Path, remedy: str) -> int:
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist. {remedy}") from error
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}. {remedy}") from error


def _first_line(head: bytes, path: str | Path, remedy: str) -> Line:
    """What a file says it is, by its first bytes."""
    if (line := first_line(head)) is not None:
        return line
    if head.startswith(HDF5):
        raise FileFormatError(
            f"{path} is of version 1, which this nemo-dali no longer reads, or some other HDF5 file. {remedy}"
        )
    raise FileFormatError(f"{path} is not an HDF5 file of nemo-dali's, or is truncated. {remedy}")


def read_index(descriptor: int, *, copy: bool = False) -> Index:
    """The index of an open file.

    Args:
        copy: read the one that was made when the file was begun.

    Raises:
        DamagedIndex: there is none, or it is damaged.
    """
    line = first_line(os.pread(descriptor, HEAD, 0))
    if line is None:
        raise DamagedIndex("its first line is not that of an index")
    begin = os.pread(descriptor, min(line.json.stop, LARGEST_BLOCK), line.user_block // 2 if copy else 0)
    return decode(begin, os.fstat(descriptor).st_size)


def read_kind(path: str | Path, *, remedy: str) -> str:
    """The format of any file of nemo_dali's.

    Raises:
        FileFormatError: it cannot be read, or is not one.
    """
    descriptor = _open(Path(path), remedy)
    try:
        return _first_line(os.pread(descriptor, HEAD, 0), path, remedy).format
    finally:
        os.close(descriptor)


def fingerprint(parts: Mapping[str, npt.NDArray[Any] | list[str] | str | int]) -> str:
    """sha256 over named arrays, string lists and scalars, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        digest.update(name.encode() + b"\0")
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        elif isinstance(part, list):
            for text in part:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        else:
            digest.update(str(part).encode())
        digest.update(b"\1")
    return digest.hexdigest()
