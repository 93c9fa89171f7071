"""One photo's file, whatever it is: opened only if it is a regular file, its pixels decoded only when asked for.

path ──▶ open_file ──▶ open_photo ──▶ .size, .mode, orientation_of ──▶ .load()
"""

import errno
import io
import os
import stat
import struct
from typing import Any, BinaryIO

from PIL import JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from nemo_dali.data.s3 import is_remote, read_object

TOO_MANY_FILES = "Too many files are open at once. Raise the limit (ulimit -n)."
MOST_BYTES = 2**30  # of a photo's file
MOST_PIXELS = 2**28 // 3 * 2  # of a photo, half a gigabyte of RGB: where Pillow's Image.open stops too
MOST_HEADER = 2**24  # bytes before the first pixels: profiles and thumbnails have a few MB at most
READ_COSTS = 64  # bytes of header that a read counts for on top of what it reads: Pillow skips rubbish byte by byte
NOT_REGULAR = "Is not a regular file"
TOO_LONG = f"Is larger than {MOST_BYTES // 2**20:,} MiB"


def open_file(path: str) -> BinaryIO:
    """Open a photo's file, or fetch its object.

    Raises:
        OSError: it cannot be opened, is not a regular file, or has more than MOST_BYTES.
        NemoError: nothing can be read at its address.
    """
    if is_remote(path):
        return io.BytesIO(read_object(path))
    # Without blocking: opening a FIFO that nobody writes to would wait, and a device might do anything.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if (why := _unfit(os.fstat(descriptor))) is not None:
            raise OSError(errno.EINVAL, why, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def is_unfit(path: str) -> bool:
    """Whether a local path has something that must not be read as a photo; False if it has nothing. One ``stat``."""
    try:
        return _unfit(os.stat(path)) is not None
    except (OSError, ValueError):  # whoever opens it finds out
        return False


def _unfit(status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else NOT_REGULAR
    return TOO_LONG if status.st_size > MOST_BYTES else None


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Do nothing: it is unused, and a directory of 65,535 entries, each as long as all, would fill any memory."""


class _Header:
    """A file of which only MOST_HEADER bytes may be read until the header is known."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left: int | None = MOST_HEADER
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1, /) -> bytes:
        if self._left is None:
            return self._file.read(size)
        data = self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data) + READ_COSTS
        if self._left < 0:
            raise ValueError(f"its header is larger than {MOST_HEADER // 2**20} MiB")
        return data

    def lift(self) -> None:
        """Allow the rest to be read too."""
        self._left = None


def open_photo(file: BinaryIO) -> ImageFile:
    """Read the header of a JPEG or PNG; pixels are decoded when they are asked for.

    Unlike ``Image.open``, this gives the size of a photo of any size, and lets the caller decide whether to continue.

    Args:
        file: at its beginning; it stays open, and is read again when pixels are asked for.

    Raises:
        UnidentifiedImageError: neither JPEG nor PNG, or one that Pillow rejects, with its reason.
        Exception: whatever else Pillow raises on damaged bytes.
    """
    start = file.read(8)
    file.seek(0)
    header = _Header(file)
    kinds: dict[bytes, Any] = {b"\xff\xd8\xff": _Jpeg, b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile}
    for magic, kind in kinds.items():
        if start.startswith(magic):
            try:
                photo: ImageFile = kind(header)
            except (SyntaxError, IndexError, TypeError, struct.error) as error:  # as in Image.open
                raise UnidentifiedImageError(f"its header cannot be used: {error}") from error
            header.lift()
            return photo
    raise UnidentifiedImageError("neither JPEG nor PNG")


def too_many_pixels(width: int, height: int) -> str | None:
    """How many pixels a photo of this size has, for a message; None if they are not too many to be read."""
    if width * height <= MOST_PIXELS:
        return None
    return f"{width}x{height} pixels, more than the limit of {MOST_PIXELS:,}"


def is_deep(photo: ImageFile) -> bool:
    """Whether an opened photo has more than 8 bits a channel; Pillow's mode does not always tell."""
    return photo.mode.startswith("I") or any("16" in str(tile[3]) for tile in photo.tile)


def orientation_of(photo: ImageFile) -> int:
    """EXIF's orientation of an opened photo, 1 to 8; 0: it has none that can be read. Nothing is decoded.

    Only the block's first directory is looked at. A PNG's block counts if it comes before the pixels.
    """
    block = photo.info.get("exif")
    try:
        return _orientation(bytes(block).removeprefix(b"Exif\0\0")) if block else 0
    except (struct.error, TypeError, ValueError):
        return 0


def _orientation(block: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 0
    (begin,) = struct.unpack_from(f"{order}I", block, 4)
    (count,) = struct.unpack_from(f"{order}H", block, begin)
    found = 0
    for entry in range(begin + 2, begin + 2 + 12 * count, 12):
        tag, kind, values, value = struct.unpack_from(f"{order}HHIH2x", block, entry)
        if tag == 0x112:  # if there are several, the last one, as in Pillow
            found = value if (kind, values) == (3, 1) and value <= 8 else 0  # one SHORT
    return found
