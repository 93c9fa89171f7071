"""Safe unpickling of untrusted files: builtin types only, and no more memory than the file's size explains."""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_dali.errors import AnnotationError


def unpickle_builtins(data: bytes, path: Path | str) -> Any:
    """Unpickle containers, str, int, float, bytes, bool and None of any protocol; nothing is imported or called.

    Raises:
        AnnotationError: the pickle wants anything else, which is named, or is malformed or cut short.
    """
    try:
        return _BuiltinsUnpickler(io.BytesIO(data), path).load()
    except _MALFORMED as error:
        raise AnnotationError(f"{path} is not a pickle, damaged, or cut short. Get the file again.") from error


_MALFORMED = (
    *(pickle.UnpicklingError, EOFError, struct.error, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, ArithmeticError),
)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as '{encoding}'")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


# What Python itself writes for sets and bytes below protocols 4 and 3; stand-ins, as bytes(n) would take n bytes.
_HARMLESS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _latin1,
    "builtins.bytes": _no_bytes,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
}


class _BuiltinsUnpickler(pickle._Unpickler):
    """The interpreter's unpickler in Python, because the one in C takes memory as a hostile file says.

    There, a memo index or a length of a few bytes makes gigabytes; here the memo is a dict and reads end with the data.
    It takes 3 s for the 50,000 refs of RefCOCO.
    """

    # BUILD changes objects, a bytearray takes memory ahead of its data, buffers live outside the file.
    dispatch = {  # noqa: RUF012  # not ours to annotate: the parent class has it so
        code: step
        for code, step in pickle._Unpickler.dispatch.items()
        if code not in b"".join((pickle.BUILD, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER))
    }

    def __init__(self, file: io.BytesIO, path: Path | str) -> None:
        super().__init__(file, fix_imports=False, encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        harmless = _HARMLESS.get(f"{module.replace('__builtin__', 'builtins')}.{name}")
        if harmless is None:
            raise AnnotationError(
                f"{self._path} wants to use '{module}.{name}', which no annotation file needs, so it was not opened. "
                "Get the file again from its publisher."
            )
        return harmless

    def _decode_string(self, value: bytes) -> str:
        """Strings of Python 2 are bytes: UTF-8 if they can be, else Latin-1."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")
