"""Weights files: found, checked against bounds, and read without executing what they hold."""

import io
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from nemo_dali._lazy import extra
from nemo_dali.errors import NemoError
from nemo_dali.io.files import check_regular
from nemo_dali.io.torch_pickle import Storage, StoredTensor, check_structure, read_description, tensors_of

if TYPE_CHECKING:
    import torch

MAX_PICKLE = 64 << 20  # bytes of what is not a tensor in a file of PyTorch before 1.6
_EXTRAS = frozenset({"context_length", "input_resolution", "vocab_size"})  # in OpenAI's archives, besides the weights
_MASK = "attn_mask"  # a buffer that open_clip makes and leaves out of its files; TorchScript stores it anyway
_SAVE = "Save the model's state_dict() with torch.save or as .safetensors."


@dataclass(frozen=True)
class Weights:
    """A weights file that has been inspected.

    Attributes:
        size: of the file in bytes.
        shapes: those of its tensors by name.
        from_openai: whether it is one of the TorchScript archives that OpenAI published.
        reader: reads the tensors, where open_clip cannot read the file itself.
    """

    path: Path
    size: int
    shapes: dict[str, tuple[int, ...]]
    from_openai: bool = False
    reader: "Callable[[], dict[str, torch.Tensor]] | None" = None

    @contextmanager
    def readable(self) -> Iterator[Path]:
        """A file of the weights that open_clip can read: this one, or a temporary copy of its tensors.

        Raises:
            NemoError: the tensors are damaged, or there is no room for the copy.
        """
        import torch

        if self.reader is None:
            yield self.path
            return
        tensors = self.reader()
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "weights.pt"
            try:
                torch.save(tensors, copy)
            except (OSError, RuntimeError) as error:
                raise NemoError(
                    f"The tensors of {self.path} could not be copied to {folder} ({first_line(error)}). "
                    "Set the environment variable TMPDIR to a folder with room for the file."
                ) from error
            del tensors
            yield copy


def find_weights(model: str, name: str, pretrained: str) -> Path:
    """The local file of the weights, fetched if ``pretrained`` is a tag.

    Args:
        model: for messages.
        name: the name that open_clip knows the model by.

    Raises:
        NemoError: there is none, or it cannot be fetched.
    """
    import open_clip

    if tag := open_clip.pretrained.get_pretrained_cfg(name, pretrained):
        try:
            return Path(open_clip.pretrained.download_pretrained(tag))
        except (OSError, RuntimeError) as error:
            raise NemoError(
                f"The weights '{pretrained}' of {model} could not be fetched ({first_line(error)}). "
                "Check the network, or give a local weights file with --pretrained."
            ) from error
    if not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise NemoError(
            f"{pretrained} is neither a weights file nor a tag of {model}. Give the path of a file"
            + (f", or one of the tags {', '.join(tags)}." if tags else ".")
        )
    return Path(pretrained)


def read_weights(path: Path) -> Weights:
    """Inspect a weights file without reading the data of any tensor.

    Raises:
        NemoError: it is damaged, would take more memory than it has bytes, or holds more than tensors and plain values.
    """
    try:
        size = check_regular(path)
        if path.suffix == ".safetensors":
            return Weights(path, size, _safetensors_shapes(path))
        with open(path, "rb") as file:
            if file.read(4) == b"PK\3\4":  # as PyTorch tells them apart
                with zipfile.ZipFile(file) as archive:
                    scripted = any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())  # likewise
                    _check_archive(archive, size, path, scripted=scripted)
                    if scripted:
                        return _read_archive(archive, size, path, scripted=True)
            else:
                file.seek(0)
                for _ in range(5):  # what PyTorch before 1.6 wrote: three about the file, the tensors, their storages
                    check_structure(file, min(size, MAX_PICKLE), path)
        return _read_pickled(path, size)
    except OSError as error:
        raise NemoError(f"The weights {path} cannot be read: {error.strerror}. Check the path.") from error
    except (zipfile.BadZipFile, ValueError, RuntimeError) as error:  # the last: encrypted parts
        raise NemoError(f"{path} is damaged ({first_line(error)}). Get the file again.") from error


def first_line(error: BaseException) -> str:
    """The first informative line of a message, shortened: PyTorch lists every tensor of a model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:157] + "..."


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with extra("mining", f"{path}"):
        from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise NemoError(f"{path} is damaged ({first_line(error)}). Get the file again.") from error


def _check_archive(archive: zipfile.ZipFile, size: int, path: Path, *, scripted: bool) -> None:
    """Refuse pickles beyond bounds, and compressed parts other than code, which is not read."""
    parts = [part for part in archive.infolist() if not (scripted and part.filename.split("/")[1:2] == ["code"])]
    if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > size:
        raise NemoError(f"{path} is compressed, which PyTorch's files are not, and could take any memory. {_SAVE}")
    for part in parts:
        if part.filename.endswith(".pkl") and not scripted:
            with archive.open(part) as pickled:
                check_structure(io.BytesIO(pickled.read()), part.file_size, path)


def _read_pickled(path: Path, size: int) -> Weights:
    """Inspect what ``torch.save`` wrote.

    open_clip is asked to read tensors only, but where loading raises a TypeError it silently loads again without that
    limit, and PyTorch before 2.6 then executes what the file asks for. So the file is inspected here first.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kinds of files that are refused right here
        try:
            content = torch.load(path, map_location="meta", weights_only=True)
        except pickle.UnpicklingError:  # a NumPy scalar or an object of PyTorch's, or what would run code
            return _read_described(path, size)
        except Exception as error:  # a damaged file raises almost anything
            raise NemoError(
                f"{path} is damaged or holds objects other than tensors, which could run code and are refused. {_SAVE}"
            ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    shapes = {
        str(name).removeprefix("module."): tuple(tensor.shape)
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }
    return Weights(path, size, shapes)


def _read_described(path: Path, size: int) -> Weights:
    """Inspect a file that also holds NumPy's and PyTorch's objects, which become records."""
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            with zipfile.ZipFile(file) as archive:
                return _read_archive(archive, size, path, scripted=False)
        file.seek(0)
        return _read_old(file, size, path)


def _read_archive(archive: zipfile.ZipFile, size: int, path: Path, *, scripted: bool) -> Weights:
    """Inspect a zip file: ``data.pkl`` describes the tensors, and their storages are beside it."""
    names = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
    if len(names) != 1:
        raise NemoError(f"{path} is damaged (it has {len(names)} parts that describe tensors). Get the file again.")
    pickled, root = archive.read(names[0]), names[0].removesuffix("data.pkl")
    content, _ = read_description(io.BytesIO(pickled), len(pickled), path)
    tensors = tensors_of(content, len(pickled), path)
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise NemoError(f"{path} was written by a machine with a different byte order. {_SAVE}")
    for storage in {tensor.storage for tensor in tensors.values()}:
        try:
            stored = archive.getinfo(f"{root}data/{storage.key}").file_size
        except KeyError:
            raise NemoError(f"{path} is damaged (it lacks {storage.key[:40]!a}). Get the file again.") from None
        if stored != _bytes(storage, path):
            raise NemoError(f"{path} is damaged ({storage.key[:40]!a} has a different size). Get the file again.")
    from_openai = scripted and tensors.keys() >= _EXTRAS
    if scripted:
        tensors = {
            name: tensor for name, tensor in tensors.items() if name not in _EXTRAS and name.rpartition(".")[2] != _MASK
        }

    def read(storages: Iterable[Storage]) -> Iterator[bytes]:
        with zipfile.ZipFile(path) as archive:
            for storage in storages:
                yield archive.read(f"{root}data/{storage.key}")

    return _weights(path, size, tensors, read, from_openai=from_openai)


def _read_old(file: BinaryIO, size: int, path: Path) -> Weights:
    """A file of PyTorch before 1.6: five pickles, then the storages in the fifth's order, each after its length."""
    most = min(size, MAX_PICKLE)
    for _ in range(3):  # a number, a version, the machine
        read_description(file, most, path)
    begin = file.tell()
    content, storages = read_description(file, most, path)
    tensors = tensors_of(content, file.tell() - begin, path)
    keys, _ = read_description(file, most, path)
    places: dict[Storage, int] = {}
    place = file.tell()
    for key in keys if type(keys) is list else ():
        storage = storages.get(key) if type(key) is str else None
        file.seek(place)
        if storage is None or file.read(8) != storage.values.to_bytes(8, "little"):
            raise NemoError(f"{path} is damaged (its storages are not those of its tensors). Get the file again.")
        places[storage] = place + 8
        place += 8 + _bytes(storage, path)
    if place > size or not {tensor.storage for tensor in tensors.values()} <= places.keys():
        raise NemoError(f"{path} is damaged (it lacks storages of its tensors). Get the file again.")

    def read(storages: Iterable[Storage]) -> Iterator[bytes]:
        with open(path, "rb") as file:
            for storage in storages:
                file.seek(places[storage])
                yield file.read(_bytes(storage, path))

    return _weights(path, size, tensors, read)


def _weights(
    path: Path,
    size: int,
    tensors: dict[str, StoredTensor],
    read: Callable[[Iterable[Storage]], Iterator[bytes]],
    *,
    from_openai: bool = False,
) -> Weights:
    """Weights that open_clip gets a copy of."""

    def reader() -> "dict[str, torch.Tensor]":
        import torch

        wanted = list(dict.fromkeys(tensor.storage for tensor in tensors.values()))
        try:
            storages = {
                storage: torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)
                for storage, data in zip(wanted, read(wanted), strict=True)
                for kind in [_kinds()[storage.kind]]
            }
            return {
                name: storages[tensor.storage].as_strided(tensor.shape, tensor.stride, tensor.offset)
                for name, tensor in tensors.items()
            }
        except (OSError, zipfile.BadZipFile, LookupError, ValueError, RuntimeError) as error:
            raise NemoError(f"{path} is damaged ({first_line(error)}). Get the file again.") from error

    shapes = {name.removeprefix("module."): tensor.shape for name, tensor in tensors.items()}
    return Weights(path, size, shapes, from_openai, reader)


def _bytes(storage: Storage, path: Path) -> int:
    kind = _kinds().get(storage.kind)
    if kind is None:
        raise NemoError(f"{path} holds tensors of the kind {storage.kind[:40]!a}, which no CLIP model has. {_SAVE}")
    return storage.values * kind.itemsize


def _kinds() -> "dict[str, torch.dtype]":
    """Data types by storage class."""
    import torch

    return {
        "BFloat16Storage": torch.bfloat16,
        "BoolStorage": torch.bool,
        "ByteStorage": torch.uint8,
        "CharStorage": torch.int8,
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "IntStorage": torch.int32,
        "LongStorage": torch.int64,
        "ShortStorage": torch.int16,
    }
