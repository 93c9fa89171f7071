"""Safe unpickling of untrusted files: builtin types only, and no more time and memory than the file's size explains.

What comes out is a tree that any reader can walk: nothing in it is deep, endless, or repeated beyond measure.
"""

import io
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

from nemo_dali.errors import AnnotationError

MAX_DEPTH = 32  # of values in values; a token of RefCOCO is 6 deep
MAX_KEY = 1000  # characters; equal keys are compared whole
MAX_NUMBERS = 100  # dict keys or set items, unless their numbers are small integers: others can be made to collide
MAX_LINE = 1000  # bytes of a number written out, or of a name
# Containers per byte of a file (RefCOCO has one in 40 to 60 bytes), and how many even a small file may have.
CONTAINERS_PER_BYTE = 1 / 8
FREE_CONTAINERS = 100_000
# Steps of the pickle per byte (RefCOCO takes one in 4 to 6 bytes), and how many even a small file may have.
STEPS_PER_BYTE = 1 / 2
FREE_STEPS = 1_000_000
# Bytes that values take at least (eight each, and the length of a text) per byte of a file: the memo can repeat values.
BYTES_PER_BYTE = 8
FREE_BYTES = 1_000_000


def unpickle_builtins(data: bytes, path: Path | str) -> Any:
    """Unpickle containers, str, int, float, bytes, bool and None of any protocol; nothing is imported or called.

    It takes at most 50 bytes of memory per byte of data.

    Raises:
        AnnotationError: the pickle wants anything else, which the message names, is malformed or cut short, or is made
            to take time or memory.
    """
    try:
        value = BuiltinsUnpickler(io.BytesIO(data), len(data)).load()
        _check_tree(value, len(data))
    except Refused as error:
        raise AnnotationError(
            f"{path} {error}, which no annotation file needs, so it was not opened. Get the file again from its "
            "publisher."
        ) from None
    except MALFORMED as error:
        raise AnnotationError(f"{path} is not a pickle, or is damaged or truncated. Get the file again.") from error
    return value


class Refused(Exception):
    """A pickle is made to take time or memory, or wants what it must not; says so, without its path."""


MALFORMED = (
    *(pickle.UnpicklingError, EOFError, struct.error, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, ArithmeticError),
)


def refuse(what: str) -> NoReturn:
    raise Refused(what)


def _check_tree(value: Any, size: int) -> None:
    """Refuse values that are deep, or far larger than the file because parts of them are repeated."""
    room = size * BYTES_PER_BYTE + FREE_BYTES
    level = [value] if type(value) in _NESTED else []
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for container in level:
            room -= 8 * len(container)
            for child in container.values() if type(container) is dict else container:
                kind = type(child)
                if kind is str or kind is bytes:
                    room -= len(child)
                elif kind in _NESTED:
                    deeper.append(child)
            if room < 0:
                refuse("repeats its values until they are far larger than the file")
        if not deeper:
            return
        level = deeper
    refuse(f"nests values more than {MAX_DEPTH} deep")


def _to_bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in a form other than Python's own")
    return text.encode("latin1")


_NESTED = frozenset({dict, list, tuple})  # sets hold no containers
_TEXT = frozenset({str, bytes})
_KEYS = _TEXT | {int, float, bool, type(None)}
_GAP = object()  # in the memo, where nothing was put
# What Python writes for sets and bytes below protocols 4 and 3; bytes only without arguments: bytes(n) takes n bytes.
_HARMLESS: dict[str, Any] = {
    "_codecs.encode": _to_bytes,
    "builtins.bytes": bytes,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
}


class BuiltinsUnpickler(pickle._Unpickler):
    """The interpreter's unpickler in Python, because the one in C takes whatever time and memory a hostile file wants.

    There, a memo index or a length of a few bytes makes gigabytes, and a tuple as a key is hashed through whatever it
    holds; here, reads end with the data and keys are plain. It takes 3 s for the 50,000 refs of RefCOCO.
    """

    steps: ClassVar[dict[bytes, Any]]

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, fix_imports=False, encoding="utf-8")
        self.read, self.readline = file.read, file.readline
        self._size = size
        self._containers_left = int(size * CONTAINERS_PER_BYTE) + FREE_CONTAINERS
        self._memo: list[Any] = []  # a list, as a dict takes ten times as much per entry
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.append = self.stack.append

    def load(self) -> Any:
        """Return the value; frames are skipped, as all the data is there."""
        read, steps = self.read, self.steps
        try:
            for _ in range(int(self._size * STEPS_PER_BYTE) + FREE_STEPS):
                steps[read(1)](self)  # at the end of the data there is no step
        except pickle._Stop as stop:  # type: ignore[attr-defined]  # typeshed has no private names
            return stop.value
        refuse("has more steps than its size explains")

    def find_class(self, module: str, name: str) -> Any:
        harmless = _HARMLESS.get(f"{module.replace('__builtin__', 'builtins')}.{name}")
        if harmless is None:
            refuse(f"wants to use {f'{module}.{name}'[:100]!a}")
        return harmless

    def _decode_string(self, value: bytes) -> str:
        """Strings of Python 2 are bytes: UTF-8 if they can be, else Latin-1."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")

    def pop_mark(self) -> list[Any]:
        """Pop the last mark, and return what was above it."""
        items = self.stack
        self.stack = self.metastack.pop()
        self.append = self.stack.append
        return items

    def charge(self, containers: int) -> None:
        """Count containers by the memory that they take, in units of 80 bytes."""
        self._containers_left -= containers
        if self._containers_left < 0:
            refuse("has more containers than its size explains")

    def _check_keys(self, keys: Sequence[Any], already: int) -> None:
        """Refuse keys of a dict, or items of a set, that are slow to hash or compare; ``already`` items are in it."""
        kinds = set(map(type, keys))
        if not kinds <= _TEXT:
            if not kinds <= _KEYS:
                kind = min(kind.__name__ for kind in kinds - _KEYS)
                refuse(f"has a {kind} as the key of a dict or in a set")
            count = len(keys) + already
            numbers = [key for key in keys if type(key) not in _TEXT]
            if count > MAX_NUMBERS and not all(type(key) is int and 0 <= key < 2 * count for key in numbers):
                refuse(f"has numbers among more than {MAX_NUMBERS} keys of a dict or items of a set")
            keys = [key for key in keys if type(key) in _TEXT]
        if keys and max(map(len, keys)) > MAX_KEY:
            refuse(f"has a key or an item of a set of more than {MAX_KEY} characters")

    def _line(self) -> bytes:
        """The rest of the line, a number or a name, without its end."""
        line = self.readline(MAX_LINE)
        if line[-1:] != b"\n":
            raise pickle.UnpicklingError("a line that has no end, or is far too long")
        return line[:-1]

    # --- steps -------------------------------------------------------------------------------------------------------

    def load_frame(self) -> None:
        self.read(8)

    def load_int(self) -> None:
        line = self._line()
        self.append(line == b"01" if line in (b"00", b"01") else int(line, 0))

    def load_long(self) -> None:
        self.append(int(self._line().removesuffix(b"L"), 0))

    def load_float(self) -> None:
        self.append(float(self._line()))

    def load_mark(self) -> None:
        if len(self.metastack) > 2 * MAX_DEPTH:  # a dict in a list is two
            refuse(f"nests values more than {MAX_DEPTH} deep")
        self.metastack.append(self.stack)
        self.stack = []
        self.append = self.stack.append

    def load_empty_list(self) -> None:
        self.charge(1)
        self.append([])

    def load_empty_dictionary(self) -> None:
        self.charge(1)
        self.append({})

    def load_empty_set(self) -> None:
        self.charge(3)
        self.append(set())

    def load_list(self) -> None:
        self.charge(1)
        items = self.pop_mark()
        self.append(items)

    def load_tuple(self) -> None:
        self.charge(1)
        items = self.pop_mark()
        self.append(tuple(items))

    def load_tuple1(self) -> None:
        self.charge(1)
        self.stack[-1:] = [(self.stack[-1],)]

    def load_tuple2(self) -> None:
        self.charge(1)
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def load_tuple3(self) -> None:
        self.charge(1)
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def load_dict(self) -> None:
        self.charge(1)
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_frozenset(self) -> None:
        self.charge(3)
        items = self.pop_mark()
        self._check_keys(items, 0)
        self.append(frozenset(items))

    def load_setitem(self) -> None:
        stack = self.stack
        value, key, target = stack.pop(), stack.pop(), stack[-1]
        if type(target) is not dict:
            raise pickle.UnpicklingError("an item of what is not a dict")
        if type(key) is not str or len(key) > MAX_KEY:
            self._check_keys([key], len(target))
        target[key] = value

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError("items of what is not a dict, or a key without a value")
        self._check_keys(keys, len(target))
        target.update(zip(keys, items[1::2], strict=True))

    def load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise pickle.UnpicklingError("items of what is not a set")
        self._check_keys(items, len(target))
        target.update(items)

    def load_inst(self) -> None:
        self.find_class(self._line().decode("ascii"), self._line().decode("ascii"))
        raise pickle.UnpicklingError("an instance of what Python itself writes differently")

    def load_global(self) -> None:
        self.append(self.find_class(self._line().decode(), self._line().decode()))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError("arguments that are not a tuple")
        if function is set or function is frozenset:
            (items,) = arguments or ((),)
            if type(items) not in (list, tuple):
                raise pickle.UnpicklingError("a set of what is not a list")
            self.charge(3 + len(items))
            self._check_keys(items, 0)
        elif function is _to_bytes:
            self.charge(sum(len(text) // 64 for text in arguments if type(text) is str))
        elif function is not bytes or arguments:
            raise pickle.UnpicklingError("a call of what is not a function")
        self.stack[-1] = function(*arguments)

    def load_get(self) -> None:
        self._recall(int(self._line()))

    def load_binget(self) -> None:
        self._recall(self.read(1)[0])

    def load_long_binget(self) -> None:
        self._recall(int.from_bytes(self.read(4), "little"))

    def _recall(self, index: int) -> None:
        value = self._memo[index]
        if value is _GAP or index < 0:
            raise pickle.UnpicklingError("nothing was put there")
        self.append(value)

    def load_put(self) -> None:
        self._put(int(self._line()))

    def load_binput(self) -> None:
        self._put(self.read(1)[0])

    def load_long_binput(self) -> None:
        self._put(int.from_bytes(self.read(4), "little"))

    def _put(self, index: int) -> None:
        memo = self._memo
        if index == len(memo):
            memo.append(self.stack[-1])
            return
        if not 0 <= index <= self._size:
            raise pickle.UnpicklingError("a place in the memo that the file is too short for")
        memo.extend([_GAP] * (index + 1 - len(memo)))
        memo[index] = self.stack[-1]

    def load_memoize(self) -> None:
        self._memo.append(self.stack[-1])


# Not among them: BUILD, OBJ, NEWOBJ and EXT make objects, PERSID asks the reader for them, a bytearray takes memory
# ahead of its data, and buffers live outside the file.
PLAIN = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8
    SHORT_BINBYTES EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM
    SETITEMS EMPTY_SET ADDITEMS FROZENSET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL
    STACK_GLOBAL INST REDUCE
""".split()


def steps_of(unpickler: type[BuiltinsUnpickler], *names: str) -> dict[bytes, Any]:
    """The unpickler's methods, named as its parent's, by the opcodes of these names."""
    codes = [getattr(pickle, name) for name in names]
    return {code: getattr(unpickler, pickle._Unpickler.dispatch[code[0]].__name__) for code in codes}


BuiltinsUnpickler.steps = steps_of(BuiltinsUnpickler, *PLAIN)
