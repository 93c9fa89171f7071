"""Photos made to do harm, and things in a photo's place that are not photos."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path


def png(width: int, height: int, *, chunks: bytes = b"") -> bytes:
    """A black PNG of one bit per pixel, a few kilobytes however large; ``chunks`` come before its pixels."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    packed = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG, in as many parts as its length takes; if it is EXIF, each part begins as the first does."""
    start = b"Exif\0\0" if data.startswith(b"Exif\0\0") else b""
    rest = data.removeprefix(start)
    parts = [rest[i : i + 65000] for i in range(0, len(rest), 65000)]
    return b"".join(struct.pack(">BBH", 0xFF, marker, len(start + part) + 2) + start + part for part in parts)


def insert(jpeg: bytes, segments: bytes) -> bytes:
    """A JPEG with segments before all others."""
    return jpeg[:2] + segments + jpeg[2:]


def resized(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header gives a different size from that of its pixels."""
    begin = next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2)) + 5
    return jpeg[:begin] + struct.pack(">HH", height, width) + jpeg[begin + 4 :]


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _endless(path: Path) -> None:
    os.truncate(path, 2**42)


# What is put in a photo's place, and what the error says about it.
NO_PHOTOS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (_fifo, "Is not a regular file"),
    "a folder": (_folder, "Is a directory"),
    "a device": (_device, "Is not a regular file"),
    "4 TiB": (_endless, "Is larger than 1,024 MiB"),
}
