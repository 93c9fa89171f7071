"""Safe unpickling of untrusted files: builtin types only, and no more time and memory than the file's size explains.

What comes out is a tree that any reader can walk: nothing in it is deep, endless, or repeated beyond measure.
"""

import io
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from nemo_dali.errors import AnnotationError

MAX_DEPTH = 32  # of values in values; a token of RefCOCO is 6 deep
MAX_KEY = 1000  # characters; equal keys are compared whole
MAX_NUMBERS = 100  # keys of a dict or items of a set where one is a number: others can be made to collide
MAX_LINE = 1000  # bytes of a number written out, or of a name
# Containers per byte of a file (RefCOCO has one in 40 to 60 bytes), and those that a small file may have at least.
CONTAINERS_PER_BYTE = 1 / 8
FREE_CONTAINERS = 100_000
# Steps of the pickle per byte (RefCOCO takes one in 4 to 6 bytes), and those that a small file may have at least.
STEPS_PER_BYTE = 1 / 2
FREE_STEPS = 1_000_000
# Bytes that values take at least, eight and the length of each text, per byte of a file: the memo repeats values.
BYTES_PER_BYTE = 8
FREE_BYTES = 1_000_000


def unpickle_builtins(data: bytes, path: Path | str) -> Any:
    """Unpickle containers, str, int, float, bytes, bool and None of any protocol; nothing is imported or called.

    It takes at most 50 bytes of memory for a byte of data.

    Raises:
        AnnotationError: the pickle wants anything else, which is named, is malformed or cut short, or is made to take
            time or memory.
    """
    try:
        value = _BuiltinsUnpickler(data, path).load()
    except _MALFORMED as error:
        raise AnnotationError(f"{path} is not a pickle, damaged, or cut short. Get the file again.") from error
    _check_tree(value, len(data), path)
    return value


_MALFORMED = (
    *(pickle.UnpicklingError, EOFError, struct.error, LookupError, TypeError, ValueError),
    *(AttributeError, AssertionError, ArithmeticError),
)


def _refuse(path: Path | str, what: str) -> NoReturn:
    raise AnnotationError(
        f"{path} {what}, which no annotation file needs, so it was not opened. Get the file again from its publisher."
    )


def _check_tree(value: Any, size: int, path: Path | str) -> None:
    """Refuse values that are deep, or far larger than the file because parts of them come again and again."""
    room = size * BYTES_PER_BYTE + FREE_BYTES
    level = [value] if type(value) in _NESTED else []
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for container in level:
            room -= 8 * len(container)
            if room < 0:
                break
            for child in container.values() if type(container) is dict else container:
                kind = type(child)
                if kind is str or kind is bytes:
                    room -= len(child)
                elif kind in _NESTED:
                    deeper.append(child)
        if room < 0:
            _refuse(path, "repeats its values until they are far larger than the file")
        if not deeper:
            return
        level = deeper
    _refuse(path, f"nests values more than {MAX_DEPTH} deep")


def _to_bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in another form than Python's own")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_NESTED = frozenset({dict, list, tuple})  # sets hold no containers
_TEXT = frozenset({str, bytes})
_KEYS = _TEXT | {int, float, bool, type(None)}
_GAP = object()  # in the memo, where nothing was put
# What Python itself writes for sets and bytes below protocols 4 and 3; a stand-in, as bytes(n) would take n bytes.
_HARMLESS: dict[str, Any] = {
    "_codecs.encode": _to_bytes,
    "builtins.bytes": _no_bytes,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
}


class _BuiltinsUnpickler(pickle._Unpickler):
    """The interpreter's unpickler in Python, because the one in C takes time and memory as a hostile file says.

    There, a memo index or a length of a few bytes makes gigabytes, and a tuple as a key is hashed through whatever it
    holds; here reads end with the data and keys are plain. It takes 3 s for the 50,000 refs of RefCOCO.
    """

    def __init__(self, data: bytes, path: Path | str) -> None:
        file = io.BytesIO(data)
        super().__init__(file, fix_imports=False, encoding="utf-8")
        self.read, self.readline = file.read, file.readline
        self._path = path
        self._size = len(data)
        self._containers_left = int(len(data) * CONTAINERS_PER_BYTE) + FREE_CONTAINERS
        self._memo: list[Any] = []  # a list, as a dict takes ten times as much for an entry
        self.stack: list[Any] = []
        self.metastack: list[list[Any]] = []
        self.append = self.stack.append

    def load(self) -> Any:
        """The value; frames are passed over, as all the data is there."""
        read, steps = self.read, _STEPS
        try:
            for _ in range(int(self._size * STEPS_PER_BYTE) + FREE_STEPS):
                steps[read(1)](self)  # at the end of the data there is no step
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        _refuse(self._path, "has more steps than its size explains")

    def find_class(self, module: str, name: str) -> Any:
        harmless = _HARMLESS.get(f"{module.replace('__builtin__', 'builtins')}.{name}")
        if harmless is None:
            raise AnnotationError(
                f"{self._path} wants to use {f'{module}.{name}'[:100]!a}, which no annotation file needs, so it "
                "was not opened. Get the file again from its publisher."
            )
        return harmless

    def _decode_string(self, value: bytes) -> str:
        """Strings of Python 2 are bytes: UTF-8 if they can be, else Latin-1."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")

    def pop_mark(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        items = self.stack
        self.stack = self.metastack.pop()
        self.append = self.stack.append
        return items

    def _charge(self, containers: int) -> None:
        """Count containers, by what they take: one is 80 bytes."""
        self._containers_left -= containers
        if self._containers_left < 0:
            _refuse(self._path, "has more containers than its size explains")

    def _check_keys(self, keys: Sequence[Any], already: int) -> None:
        """Refuse keys of a dict, or items of a set, that take long to hash or to compare; ``already`` are in it."""
        kinds = set(map(type, keys))
        if not kinds <= _TEXT:
            if not kinds <= _KEYS:
                kind = min(kind.__name__ for kind in kinds - _KEYS)
                _refuse(self._path, f"has a {kind} as the key of a dict or in a set")
            if len(keys) + already > MAX_NUMBERS:
                _refuse(self._path, f"has numbers among more than {MAX_NUMBERS} keys of a dict or items of a set")
            keys = [key for key in keys if type(key) in _TEXT]
        if keys and max(map(len, keys)) > MAX_KEY:
            _refuse(self._path, f"has a key or an item of a set of more than {MAX_KEY} characters")

    def _line(self) -> bytes:
        """The rest of the line, a number or a name, without its end."""
        line = self.readline(MAX_LINE)
        if line[-1:] != b"\n":
            raise pickle.UnpicklingError("a line that has no end, or is far too long")
        return line[:-1]

    # --- steps -------------------------------------------------------------------------------------------------------

    def frame(self) -> None:
        self.read(8)

    def int_(self) -> None:
        line = self._line()
        self.append(line == b"01" if line in (b"00", b"01") else int(line, 0))

    def long(self) -> None:
        self.append(int(self._line().removesuffix(b"L"), 0))

    def float_(self) -> None:
        self.append(float(self._line()))

    def mark(self) -> None:
        if len(self.metastack) > 2 * MAX_DEPTH:  # a dict in a list is two
            _refuse(self._path, f"nests values more than {MAX_DEPTH} deep")
        self.metastack.append(self.stack)
        self.stack = []
        self.append = self.stack.append

    def empty_list(self) -> None:
        self._charge(1)
        self.append([])

    def empty_dict(self) -> None:
        self._charge(1)
        self.append({})

    def empty_set(self) -> None:
        self._charge(3)
        self.append(set())

    def list_(self) -> None:
        self._charge(1)
        items = self.pop_mark()
        self.append(items)

    def tuple_(self) -> None:
        self._charge(1)
        items = self.pop_mark()
        self.append(tuple(items))

    def tuple1(self) -> None:
        self._charge(1)
        self.stack[-1:] = [(self.stack[-1],)]

    def tuple2(self) -> None:
        self._charge(1)
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def tuple3(self) -> None:
        self._charge(1)
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def dict_(self) -> None:
        self._charge(1)
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def frozenset_(self) -> None:
        self._charge(3)
        items = self.pop_mark()
        self._check_keys(items, 0)
        self.append(frozenset(items))

    def setitem(self) -> None:
        stack = self.stack
        value, key, target = stack.pop(), stack.pop(), stack[-1]
        if type(target) is not dict:
            raise pickle.UnpicklingError("an item of what is no dict")
        if type(key) is not str or len(key) > MAX_KEY:
            self._check_keys([key], len(target))
        target[key] = value

    def setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if type(target) is not dict or len(items) % 2:
            raise pickle.UnpicklingError("items of what is no dict, or a key without a value")
        self._check_keys(keys, len(target))
        target.update(zip(keys, items[1::2], strict=True))

    def additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise pickle.UnpicklingError("items of what is no set")
        self._check_keys(items, len(target))
        target.update(items)

    def inst(self) -> None:
        self.find_class(self._line().decode("ascii"), self._line().decode("ascii"))
        raise pickle.UnpicklingError("an instance of what Python itself writes in another way")

    def global_(self) -> None:
        self.append(self.find_class(self._line().decode(), self._line().decode()))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError("arguments that are no tuple")
        if function is set or function is frozenset:
            (items,) = arguments or ((),)
            if type(items) not in (list, tuple):
                raise pickle.UnpicklingError("a set of what is no list")
            self._charge(3 + len(items))
            self._check_keys(items, 0)
        elif function is _to_bytes:
            self._charge(sum(len(text) // 64 for text in arguments if type(text) is str))
        elif function is not _no_bytes:
            raise pickle.UnpicklingError("a call of what is no function")
        self.stack[-1] = function(*arguments)

    def get(self) -> None:
        self._recall(int(self._line()))

    def binget(self) -> None:
        self._recall(self.read(1)[0])

    def long_binget(self) -> None:
        self._recall(int.from_bytes(self.read(4), "little"))

    def _recall(self, index: int) -> None:
        value = self._memo[index]
        if value is _GAP or index < 0:
            raise pickle.UnpicklingError("nothing was put there")
        self.append(value)

    def put(self) -> None:
        self._put(int(self._line()))

    def binput(self) -> None:
        self._put(self.read(1)[0])

    def long_binput(self) -> None:
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

    def memoize(self) -> None:
        self._memo.append(self.stack[-1])


# Not among them: BUILD, OBJ, NEWOBJ and EXT make objects, PERSID asks the reader for them, a bytearray takes memory
# ahead of its data, and buffers live outside the file.
_OWN = {
    pickle.FRAME: _BuiltinsUnpickler.frame,
    pickle.INT: _BuiltinsUnpickler.int_,
    pickle.LONG: _BuiltinsUnpickler.long,
    pickle.FLOAT: _BuiltinsUnpickler.float_,
    pickle.MARK: _BuiltinsUnpickler.mark,
    pickle.EMPTY_LIST: _BuiltinsUnpickler.empty_list,
    pickle.EMPTY_DICT: _BuiltinsUnpickler.empty_dict,
    pickle.EMPTY_SET: _BuiltinsUnpickler.empty_set,
    pickle.LIST: _BuiltinsUnpickler.list_,
    pickle.TUPLE: _BuiltinsUnpickler.tuple_,
    pickle.TUPLE1: _BuiltinsUnpickler.tuple1,
    pickle.TUPLE2: _BuiltinsUnpickler.tuple2,
    pickle.TUPLE3: _BuiltinsUnpickler.tuple3,
    pickle.DICT: _BuiltinsUnpickler.dict_,
    pickle.FROZENSET: _BuiltinsUnpickler.frozenset_,
    pickle.SETITEM: _BuiltinsUnpickler.setitem,
    pickle.SETITEMS: _BuiltinsUnpickler.setitems,
    pickle.ADDITEMS: _BuiltinsUnpickler.additems,
    pickle.INST: _BuiltinsUnpickler.inst,
    pickle.GLOBAL: _BuiltinsUnpickler.global_,
    pickle.REDUCE: _BuiltinsUnpickler.reduce,
    pickle.GET: _BuiltinsUnpickler.get,
    pickle.BINGET: _BuiltinsUnpickler.binget,
    pickle.LONG_BINGET: _BuiltinsUnpickler.long_binget,
    pickle.PUT: _BuiltinsUnpickler.put,
    pickle.BINPUT: _BuiltinsUnpickler.binput,
    pickle.LONG_BINPUT: _BuiltinsUnpickler.long_binput,
    pickle.MEMOIZE: _BuiltinsUnpickler.memoize,
}
_INHERITED = (
    *(pickle.PROTO, pickle.STOP, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.EMPTY_TUPLE),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
    *(pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.BINBYTES8, pickle.SHORT_BINBYTES, pickle.APPEND, pickle.APPENDS),
    pickle.STACK_GLOBAL,
)
_STEPS: dict[bytes, Any] = {code: pickle._Unpickler.dispatch[code[0]] for code in _INHERITED} | _OWN
