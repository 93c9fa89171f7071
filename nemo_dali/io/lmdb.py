"""Values of an LMDB by their keys, read from the file with every offset checked.

LMDB's own library maps the file and trusts it: one changed byte is enough to end the process. Pages have one size and
begin with a header. The newer of the first two gives the root of a B+ tree; a long value has pages of its own.
OpenLDAP's ``mdb.c`` describes it all.
"""

import os
import struct
from pathlib import Path

from nemo_dali.errors import AnnotationError
from nemo_dali.io.files import open_regular

MAX_DEPTH = 32  # of the tree; LMDB's own bound
MAX_KEY = 511  # bytes; LMDB's own bound
HEADER = struct.Struct("<Q2xHHH")  # page number, flags; where the list of nodes ends, where the nodes begin
META = struct.Struct("<II16xI48xHH32xQ8xQ")  # magic, version, page size; flags, depth, root of the tree; transaction
NODE = struct.Struct("<HHHH")  # low and high half of the value's size or the child's number, flags, size of the key
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, FIRST = 1, 2, 4, 8  # kinds of pages
ELSEWHERE = 1  # flag of a node whose value has pages of its own
NO_PAGE = 2**64 - 1


class Lmdb:
    """An LMDB with one plain table, open for reading; a context manager.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
        AnnotationError: it is not an LMDB, is damaged or cut short, or has tables of another kind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_regular(path)
        try:
            self._size = self._unread = os.fstat(self._file).st_size
            self._page_size = 4096
            metas = [self._meta(0)]
            self._page_size = metas[0][1]
            metas.append(self._meta(1))
            _, _, flags, self._root = max(metas)
            if flags:
                raise self._damaged("its table sorts or repeats keys in a different way than CRIS's")
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Lmdb":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None if there is none; ask for each key only once."""
        number = self._root
        if number == NO_PAGE or not 0 < len(key) <= MAX_KEY:
            return None
        for _ in range(MAX_DEPTH):
            page = self._read(number * self._page_size, self._page_size)
            found, flags, end, _ = HEADER.unpack_from(page)
            if found != number or not flags & (BRANCH | LEAF) or not HEADER.size <= end <= len(page) or end % 2:
                raise self._damaged(f"page {number} is damaged")
            places = struct.unpack_from(f"<{(end - HEADER.size) // 2}H", page, HEADER.size)
            row = self._last_not_above(key, page, places, first=1 if flags & BRANCH else 0)
            if row < 0:
                return None
            low, high, kind, name, begin = self._node(page, places[row])
            if flags & LEAF:
                if name != key:
                    return None
                value = self._value(page, begin, low | high << 16, kind)
                self._unread -= len(value)
                if self._unread < 0:
                    raise self._damaged("it uses the same bytes for several values")
                return value
            number = low | high << 16 | kind << 32
        raise self._damaged("its tree is too deep")

    def _last_not_above(self, key: bytes, page: bytes, places: tuple[int, ...], *, first: int) -> int:
        """The row of the last node whose key is not above the given one; a branch's first node has no key."""
        low, high = first, len(places)
        while low < high:
            middle = (low + high) // 2
            if self._node(page, places[middle])[3] <= key:
                low = middle + 1
            else:
                high = middle
        return min(low, len(places)) - 1

    def _node(self, page: bytes, place: int) -> tuple[int, int, int, bytes, int]:
        """Numbers of a node, its key, and where its value begins."""
        if place + NODE.size > len(page):
            raise self._damaged("a page is damaged")
        low, high, kind, length = NODE.unpack_from(page, place)
        begin = place + NODE.size + length
        if begin > len(page):
            raise self._damaged("a page is damaged")
        return low, high, kind, page[place + NODE.size : begin], begin

    def _value(self, page: bytes, begin: int, size: int, kind: int) -> bytes:
        if kind == 0 and begin + size <= len(page):
            return page[begin : begin + size]
        if kind != ELSEWHERE or begin + 8 > len(page):
            raise self._damaged("a value is damaged, or of a different kind than CRIS's")
        number = int.from_bytes(page[begin : begin + 8], "little")
        header = self._read(number * self._page_size, HEADER.size)
        found, flags, _, _ = HEADER.unpack(header)
        if found != number or not flags & OVERFLOW:
            raise self._damaged(f"page {number} is damaged")
        return self._read(number * self._page_size + HEADER.size, size)

    def _meta(self, number: int) -> tuple[int, int, int, int]:
        """Transaction, page size, flags of the table and root, as one of the first two pages has them."""
        page = self._read(number * self._page_size, HEADER.size + META.size)
        flags = HEADER.unpack_from(page)[1]
        magic, version, page_size, table, _, root, transaction = META.unpack_from(page, HEADER.size)
        if not flags & FIRST or magic != MAGIC or version != VERSION:
            raise self._damaged("it lacks an LMDB's first pages")
        if page_size not in (1 << power for power in range(9, 17)) or (number and page_size != self._page_size):
            raise self._damaged(f"its pages have {page_size} bytes")
        return transaction, page_size, table, root

    def _read(self, begin: int, size: int) -> bytes:
        if begin + size > self._size:
            raise self._damaged("it is truncated")
        content = os.pread(self._file, size, begin)
        if len(content) < size:
            raise self._damaged("it is truncated")
        return content

    def _damaged(self, what: str) -> AnnotationError:
        return AnnotationError(f"{self._path} cannot be read as an LMDB: {what}. Check the path, or get it again.")
