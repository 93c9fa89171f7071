"""Pickles of PyTorch's files: checked within bounds, or read as descriptions of tensors and inert records.

Nothing that a file names is imported or called, and no tensor's data is touched.
"""

import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nemo_dali.errors import NemoError
from nemo_dali.io.unpickle import (
    BYTES_PER_BYTE,
    FREE_BYTES,
    MALFORMED,
    MAX_DEPTH,
    MAX_KEY,
    PLAIN,
    BuiltinsUnpickler,
    Refused,
    refuse,
    steps_of,
)

MAX_DIMENSIONS = 64  # PyTorch's own bound
# Libraries whose classes and functions a record may stand for; of Python's own, only plain values. Training has no use
# for anything else that a file names.
_LIBRARIES = frozenset({"__torch__", "_codecs", "collections", "numpy", "torch"})
_BUILTINS = frozenset({"bytearray", "bytes", "complex", "frozenset", "set", "slice"})


class Storage(NamedTuple):
    """Where values of tensors are in a file."""

    key: str
    kind: str  # a class of PyTorch's, such as HalfStorage
    values: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a pickle describes it. Its elements are within the storage, and no more than the storage has."""

    storage: Storage
    offset: int  # in values, like the strides
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Record:
    """Stands for an object of any class: it has the attributes that the file gives it, and does nothing."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}


def check_structure(file: BinaryIO, size: int, path: Path | str) -> None:
    """Check a pickle of weights that PyTorch's unpickler, which runs no code, is to read, within the same bounds.

    Args:
        file: positioned at the pickle, and afterwards at its end.
        size: of the pickle in bytes, or more.

    Raises:
        NemoError: it is malformed, or made to take time or memory.
    """
    _load(_StructureUnpickler(file, size), path)


def read_description(file: BinaryIO, size: int, path: Path | str) -> tuple[Any, dict[str, Storage]]:
    """What a pickle of PyTorch's describes: plain containers and values, ``StoredTensor`` and ``Record``.

    Also returns every storage that it names, by its key.

    Args:
        file: positioned at the pickle, and afterwards at its end.
        size: of the pickle in bytes, or more.

    Raises:
        NemoError: it is malformed, made to take time or memory, or names what neither PyTorch nor NumPy has.
    """
    unpickler = _DescriptionUnpickler(file, size)
    return _load(unpickler, path), unpickler.storages


def _load(unpickler: BuiltinsUnpickler, path: Path | str) -> Any:
    try:
        return unpickler.load()
    except Refused as error:
        raise NemoError(f"{path} {error}, and was not opened. Get the file again from its publisher.") from None
    except MALFORMED as error:
        raise NemoError(
            f"{path} is damaged or holds objects other than tensors, which could run code and are refused. "
            "Save the model's state_dict() with torch.save or as .safetensors."
        ) from error


def tensors_of(content: Any, size: int, path: Path | str) -> dict[str, StoredTensor]:
    """A state dict's tensors, or those of a module and of the modules in it, by their names.

    Args:
        content: as ``read_description`` gives it; in a checkpoint, the state dict is the item ``state_dict``.
        size: of its pickle in bytes, which bounds how large repeated modules may become.

    Raises:
        NemoError: there are none, or modules contain themselves or are repeated beyond measure.
    """
    if type(content) is dict and type(content.get("state_dict")) is dict:
        content = content["state_dict"]
    try:
        items = content.items() if type(content) is dict else _attributes(content, size)
        found = {name: value for name, value in items if type(name) is str and type(value) is StoredTensor}
    except Refused as error:
        raise NemoError(f"{path} {error}, and was not opened. Get the file again from its publisher.") from None
    if not found:
        raise NemoError(f"{path} holds no tensors by name. Save the model's state_dict() with torch.save.")
    return found


def _attributes(module: Any, size: int) -> Iterator[tuple[str, Any]]:
    """What a module holds, and the modules in it, with names as PyTorch gives them: "layer.0.weight"."""
    room = size * BYTES_PER_BYTE + FREE_BYTES
    level = [("", module)] if type(module) is Record else []
    for _ in range(MAX_DEPTH):
        deeper = []
        for prefix, record in level:
            for name, value in record.attributes.items():
                room -= 8
                if type(name) is not str or type(value) not in (Record, StoredTensor):
                    continue
                room -= len(prefix) + len(name)
                if room < 0 or len(prefix) > MAX_KEY:
                    refuse("repeats its modules until they are far larger than the file")
                if type(value) is Record:
                    deeper.append((f"{prefix}{name}.", value))
                else:
                    yield prefix + name, value
        if not deeper:
            return
        level = deeper
    refuse(f"nests modules more than {MAX_DEPTH} deep")


class _StructureUnpickler(BuiltinsUnpickler):
    """Goes through a pickle of objects: a dict stands for each, as most are filled like one."""

    def find_class(self, module: str, name: str) -> Any:
        return None

    def load_reduce(self) -> None:
        self.charge(1)
        self.stack.pop()
        self.stack[-1] = {}

    load_newobj = load_reduce

    def load_build(self) -> None:
        self.stack.pop()

    def load_binpersid(self) -> None:
        self.stack[-1] = None


class _DescriptionUnpickler(BuiltinsUnpickler):
    """Gives descriptions of tensors, dicts for ordered dicts, and a record for any other object."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, size)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole == "torch._utils._rebuild_tensor_v2":
            return _describe
        if whole == "torch._utils._rebuild_parameter":
            return _first
        if whole == "collections.OrderedDict":
            return dict
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            return _Kind(name)
        if (module in ("builtins", "__builtin__") and name in _BUILTINS) or module.partition(".")[0] in _LIBRARIES:
            return Record
        refuse(f"wants to use {whole[:100]!a}")

    def load_reduce(self) -> None:
        self.charge(1)
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError("arguments that are not a tuple")
        if function is _describe or function is _first:
            self.stack[-1] = function(*arguments)
        else:
            self.stack[-1] = {} if function is dict and not arguments else Record()

    def load_newobj(self) -> None:
        self.charge(1)
        self.stack.pop()
        self.stack[-1] = Record()

    def load_build(self) -> None:
        """Set the attributes of a record; any extra state of a tensor, a dict or a data type is ignored."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record and type(state) is dict:
            target.attributes = state

    def load_binpersid(self) -> None:
        """A tensor's storage: ("storage", class, key, device, values), before PyTorch 1.6 followed by a view.

        There, ("module", class, ...) stands for the class of a module.
        """
        if self.stack[-1][0] == "module":
            self.stack[-1] = Record
            return
        word, kind, key, _, values, *view = self.stack[-1]
        if word != "storage" or type(kind) is not _Kind or type(key) is not str or view not in ([], [None]):
            raise pickle.UnpicklingError("no storage")
        storage = Storage(key, kind.name, _count(values))
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError("two storages by one name")
        self.stack[-1] = storage


class _Kind(NamedTuple):
    name: str


def _first(value: Any, *_: Any) -> Any:
    return value


def _describe(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise pickle.UnpicklingError("a tensor without a storage")
    tensor = StoredTensor(storage, _count(offset), tuple(map(_count, shape)), tuple(map(_count, stride)))
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor without strides")
    last = offset + sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride, strict=True))
    if (values := math.prod(tensor.shape)) and (values > storage.values or last >= storage.values):
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return tensor


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise pickle.UnpicklingError("no count")
    return value


_StructureUnpickler.steps = steps_of(_StructureUnpickler, *PLAIN, "NEWOBJ", "BUILD", "BINPERSID")
_DescriptionUnpickler.steps = steps_of(_DescriptionUnpickler, *PLAIN, "NEWOBJ", "BUILD", "BINPERSID")
