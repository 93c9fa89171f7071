"""What is shown to a person: lines that hold nothing that a terminal would obey.

Names and sentences come from strangers' files. A terminal takes an escape sequence in them for a command, and a
character of writing direction reverses the rest of a line, also where a web page shows a log. Everything that the
commands print or log goes through here. What they write into files is escaped there, as the file's format requires.

Exceptions and log records carry names and sentences as they are: whoever prints them otherwise escapes them.
"""

import json
import logging
import os
import sys
import unicodedata
from contextlib import suppress
from typing import Any, TextIO


def printable(text: str) -> str:
    """The text with ``\\x1b``, ``\\u202e``, ``\\n``, ... for all characters that are not letters, signs or spaces.

    These are control and format characters, line separators, halves of surrogate pairs (which stand for bytes of a file
    name that are not UTF-8, and are shown as those bytes), and characters that Unicode has not assigned.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return ascii(character)[1:-1]


def say(*lines: str, error: bool = False) -> None:
    """Print lines on stdout, or on stderr; a line end inside one is escaped.

    If the reader is gone, the rest is dropped: that is no reason to stop the work.

    Raises:
        OSError: for example, the stream is a file on a full disk.
    """
    _write([printable(line) for line in lines], sys.stderr if error else sys.stdout)


def say_json(value: Any) -> None:
    """Print a value as JSON on stdout, in ASCII."""
    _write([json.dumps(value, indent=2).replace("\x7f", "\\u007f")], sys.stdout)


def _write(lines: list[str], stream: TextIO | None) -> None:
    if stream is None:
        return
    text = "".join(f"{line}\n" for line in lines)
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        _drop(stream)


def _drop(stream: TextIO) -> None:
    """Let a stream lead nowhere from now on, including what it still holds: no complaint at exit either."""
    with suppress(OSError, ValueError):  # a test's stream has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def drop_unwritten() -> None:
    """Let standard streams that cannot be written, on a full disk say, lead nowhere from now on.

    Otherwise Python tries again at exit to write what they still hold, and some versions then change the exit code.
    """
    streams: tuple[TextIO | None, ...] = (sys.stdout, sys.stderr)  # None: closed when the process started
    for stream in filter(None, streams):
        try:
            stream.flush()
        except OSError:
            _drop(stream)


def open_closed_streams() -> None:
    """Open standard streams that the process was started without, and let them lead nowhere.

    Otherwise the next file that is opened gets their number, and a library that prints writes into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # for the life of the process


class Formatter(logging.Formatter):
    """A log record's text, escaped line by line, so that a traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))
