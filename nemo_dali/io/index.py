"""The index of a nemo_dali file: which arrays it holds, and where, in a few kilobytes of JSON before the HDF5 data.

    0       half       user block, a power of two >= 8192 bytes
    │ index │ its copy │ HDF5: superblock, groups, attributes │ arrays ... │
    └ "nemo-dali/ris 2 00008192 00001234 0123456789abcdef\\n" + 1,234 bytes of JSON + zeros
       format, version, bytes of the user block and of the JSON, XXH3-64 of the JSON

libhdf5 skips a user block. Nothing else of the file's structure is read: libhdf5 is not a parser for untrusted bytes.
The copy is the unfinished file's index: a writer that was killed while it put the final index in place finds it there;
a reader never looks at it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

SMALLEST_BLOCK = 1 << 13  # size of the user block in bytes; half of it holds the index
LARGEST_BLOCK = 1 << 21
MAX_ARRAYS = 100
MAX_LENGTH = 2**48  # of an array along an axis
DTYPES = ("|u1", "|i1", "<i4", "<i8", "<u4", "<u8", "<f2", "<f4", "<f8")
UNFINISHED = "unfinished".ljust(64, "-")  # in place of the fingerprint, and as long
UNKNOWN = "0" * 16  # in place of a checksum, in an unfinished file
LONGEST_LINE = 100  # bytes, rounded up
ALIGNMENT = 8  # bytes; arrays begin at a multiple of it

_LINE = re.compile(rb"([a-z0-9/-]{1,40}) ([0-9]{1,9}) ([0-9]{8}) ([0-9]{8}) ([0-9a-f]{16})\n")
_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")

Value = str | int | float | list[Any]


class DamagedIndex(ValueError):
    """An index that contradicts its checksum, its file or itself; the message says how."""


@dataclass(frozen=True)
class Entry:
    """An array: where it is, and what its content must be.

    Attributes:
        checksum: XXH3-64 of the whole array; "" where each row has one.
        row_checksums: name of the array, u8 [rows], that holds them; "" where there is one for the whole.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksum: str = ""
    row_checksums: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that the array takes."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Index:
    """What is in a file.

    Attributes:
        format: what kind of file it is, such as "nemo-dali/ris".
        fingerprint: sha256 over the content that matters, in hexadecimal digits; UNFINISHED while it is written.
        attributes: strings, 64-bit integers, finite floats, and lists of these.
        arrays: by name.
    """

    format: str
    version: int
    fingerprint: str
    made_by: str
    attributes: Mapping[str, Value]
    arrays: Mapping[str, Entry]


row_checksum = xxhash.xxh3_64_intdigest  # of a row of an array, an integer of 64 bits


def checksum(content: Any) -> str:
    """XXH3-64 of bytes, in 16 hexadecimal digits."""
    return f"{row_checksum(content):016x}"


class Line(NamedTuple):
    """What a file's first line says."""

    format: str
    version: int
    user_block: int
    json: slice  # where it is
    checksum: bytes


def first_line(head: bytes) -> Line | None:
    """What a file's first bytes say it is; None: it has no index."""
    if (line := _LINE.match(head)) is None:
        return None
    json_bytes = slice(line.end(), line.end() + int(line[4]))
    return Line(line[1].decode(), int(line[2]), int(line[3]), json_bytes, line[5])


def encode(index: Index, user_block: int | None = None) -> bytes:
    """An index as it begins the file, without the zeros.

    Args:
        user_block: its size in bytes, as ``layout.block_of`` gives it; None: as large as this index needs.

    Raises:
        ValueError: it is too large.
    """
    arrays = {}
    for name, entry in index.arrays.items():
        arrays[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "offset": entry.offset}
        arrays[name] |= {"row_checksums": entry.row_checksums} if entry.row_checksums else {"checksum": entry.checksum}
    content = {"fingerprint": index.fingerprint, "made_by": index.made_by}
    text = json.dumps(content | {"attributes": dict(index.attributes), "arrays": arrays}, allow_nan=False).encode()
    block = user_block or max(SMALLEST_BLOCK, 2 << (len(text) + LONGEST_LINE - 1).bit_length())
    if block > LARGEST_BLOCK:
        raise ValueError(f"attributes ({len(text)} bytes with the arrays' names) must fit {LARGEST_BLOCK // 2} bytes")
    return f"{index.format} {index.version} {block:08} {len(text):08} {checksum(text)}\n".encode() + text


def decode(begin: bytes, file_size: int) -> Index:
    """The index that a file, or the second half of its user block, begins with.

    Args:
        begin: its first bytes, to the end of the JSON at least.
        file_size: of the whole file, in bytes.

    Raises:
        DamagedIndex: it is not as it was written, or describes something impossible.
    """
    if (line := first_line(begin)) is None:
        raise DamagedIndex("its first line is not that of an index")
    block, text = line.user_block, begin[line.json]
    if not SMALLEST_BLOCK <= block <= LARGEST_BLOCK or block & (block - 1) or line.json.stop > block // 2:
        raise DamagedIndex("its user block has an impossible size")
    if checksum(text).encode() != line.checksum:
        raise DamagedIndex("its index does not match its checksum")
    try:
        content = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedIndex("its index is not JSON") from error
    fingerprint, made_by = _get(content, "fingerprint", str), _get(content, "made_by", str)
    if re.fullmatch("[0-9a-f]{64}", fingerprint) is None and fingerprint != UNFINISHED:
        raise DamagedIndex("its fingerprint is not a sha256")
    attributes = _get(content, "attributes", dict)
    for name, value in attributes.items():
        if not _is_attribute(value):
            raise DamagedIndex(f"its attribute {name} is neither text nor a number, nor a list of these")
    records = _get(content, "arrays", dict)
    if len(records) > MAX_ARRAYS:
        raise DamagedIndex("its index has too many arrays")
    arrays = {name: _entry(name, record, block, file_size) for name, record in records.items()}
    _check(arrays)
    return Index(line.format, line.version, fingerprint, made_by, attributes, arrays)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _get(record: Any, key: str, kind: type) -> Any:
    if type(record) is not dict or type(value := record.get(key)) is not kind:
        raise DamagedIndex(f"its index has no {key}")
    return value


def _is_attribute(value: Any) -> bool:
    if type(value) is list:
        return all(type(item) is not list and _is_attribute(item) for item in value)
    if type(value) is int:
        return -(2**63) <= value < 2**63
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is str and re.search("[\ud800-\udfff]", value) is None


def _entry(name: str, record: Any, user_block: int, file_size: int) -> Entry:
    """One array, which must be inside the file, after the index."""
    if len(name) > 100 or _NAME.fullmatch(name) is None:
        raise DamagedIndex("its index has an array of an impossible name")
    dtype, shape, offset = _get(record, "dtype", str), _get(record, "shape", list), _get(record, "offset", int)
    if dtype not in DTYPES:
        raise DamagedIndex(f"/{name} has a type that no such file has")
    if not 1 <= len(shape) <= 4 or not all(type(n) is int and 0 <= n < MAX_LENGTH for n in shape):
        raise DamagedIndex(f"/{name} has an impossible shape")
    found, rows = record.get("checksum", ""), record.get("row_checksums", "")
    if type(found) is not str or type(rows) is not str or re.fullmatch("|[0-9a-f]{16}", found) is None:
        raise DamagedIndex(f"/{name} has no checksum")
    entry = Entry(dtype, tuple(shape), offset, found, rows)
    if not user_block <= offset < 2**63 or offset % ALIGNMENT:
        raise DamagedIndex(f"/{name} begins at an impossible place")
    if offset + entry.nbytes > file_size:
        raise DamagedIndex(f"/{name} ends past the end of the file, which is truncated")
    return entry


def _check(arrays: Mapping[str, Entry]) -> None:
    """Refuse arrays that overlap, and those without checksums."""
    end, before = 0, ""
    for name, entry in sorted(arrays.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.nbytes and entry.offset < end:
            raise DamagedIndex(f"/{name} overlaps /{before}")
        end, before = max(end, entry.offset + entry.nbytes), name
        if bool(entry.checksum) == bool(entry.row_checksums):
            raise DamagedIndex(f"/{name} has no checksum")
        if entry.row_checksums:
            sums = arrays.get(entry.row_checksums)
            if sums is None or sums.row_checksums or (sums.dtype, sums.shape) != ("<u8", entry.shape[:1]):
                raise DamagedIndex(f"/{name} has no checksum for each row")
