"""A CLIP model of open_clip, loaded without executing what its files hold."""

import difflib
import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO

from nemo_dali.errors import NemoError
from nemo_dali.io.files import check_regular
from nemo_dali.io.h5 import fingerprint
from nemo_dali.io.unpickle import check_structure
from nemo_dali.mining._model_config import read_config

if TYPE_CHECKING:
    import torch

MAX_PICKLE = 64 << 20  # bytes of what is no tensor in a file of PyTorch before 1.6


@dataclass(frozen=True, eq=False)
class Clip:
    """A model ready to embed; make it with ``load_clip``.

    Attributes:
        network: an open_clip model in evaluation mode, float32.
        width: D, of its embeddings.
        transform: its own preprocessing of a Pillow photo, giving float32 [3, size, size].
        tokenizer: sentences to int64 [n, context length].
        weights_hash: sha256 over the tensors in the order of their names, whatever file they came from.
        model, pretrained: as given.
        encoder: what besides the weights an embedding depends on: library, device, preprocessing.
    """

    network: Any
    width: int
    transform: "Callable[[Any], torch.Tensor]"
    tokenizer: "Callable[[list[str]], torch.Tensor]"
    device: "torch.device"
    weights_hash: str
    model: str
    pretrained: str
    encoder: str

    @property
    def name(self) -> str:
        """Model and weights, for messages."""
        return f"{self.model} with {self.pretrained}"


def load_clip(model: str, pretrained: str, *, device: str | None = None) -> Clip:
    """Build an open_clip model and load its weights.

    Args:
        model: the name of an open_clip model ("ViT-B-32"), or the path of a model config (.json).
        pretrained: a tag that open_clip can fetch ("laion2b_s34b_b79k"), or a local weights file (.pt, .pth, .bin,
            .safetensors). Tensors are all that is read from it.
        device: "cpu", "cuda", "cuda:1", ...; None: CUDA where there is a device, else the CPU.

    Raises:
        NemoError: no such model, weights or device, or weights of another model.
    """
    import open_clip
    import torch

    torch_device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, preprocess = model_name(model)
    weights = _find_weights(model, name, pretrained)
    size = _check_file(weights)
    stored = _check_weights(weights)
    try:
        if model.endswith(".json"):
            _check_size(name, size, model, pretrained, stored)
        network, transform = open_clip.create_model_from_pretrained(
            name,
            pretrained,
            precision="fp32",
            device=torch_device,
            weights_only=True,
            **{f"image_{key}": preprocess.get(key) for key in ("mean", "std", "interpolation", "resize_mode")},
        )
        _check_positions(stored, network, model, pretrained)
        tokenizer = open_clip.get_tokenizer(name)
        with torch.inference_mode():
            width = network.eval().encode_text(tokenizer(["a"]).to(torch_device)).shape[-1]
    except NemoError:
        raise
    except Exception as error:  # whatever open_clip, timm or transformers meet in a config, a file or on the network
        raise NemoError(
            f"{model} with the weights {pretrained} cannot be loaded ({_first_line(error)}). "
            "Give the model that the weights were trained as."
        ) from error
    return Clip(
        network=network,
        width=width,
        transform=transform,
        tokenizer=tokenizer,
        device=torch_device,
        weights_hash=fingerprint({key: tensor.cpu().numpy() for key, tensor in network.state_dict().items()}),
        model=model,
        pretrained=pretrained,
        encoder=f"torch {torch.__version__} on {_processor(torch_device)}, "
        f"preprocessing {hashlib.sha256(repr(transform).encode()).hexdigest()[:8]}",
    )


def checked_device(device: str) -> "torch.device":
    """A device of PyTorch's to embed on.

    Raises:
        ValueError: neither cpu nor cuda.
        NemoError: a CUDA device, and there is none.
    """
    import torch

    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device ({device!r}) must be one of PyTorch's, such as cpu or cuda") from error
    if torch_device.type not in ("cpu", "cuda"):
        raise ValueError(f"device ({device!r}) must be cpu or cuda")
    if torch_device.type == "cuda" and not torch.cuda.is_available():
        raise NemoError(f"The device {device} was asked for, but PyTorch finds no CUDA device. Use the device cpu.")
    return torch_device


def _check_positions(stored: dict[str, tuple[int, ...]], network: Any, model: str, pretrained: str) -> None:
    """Refuse weights of another image size or context length, which open_clip would interpolate without a word."""
    for key, tensor in network.state_dict().items():
        if key.endswith("positional_embedding") and stored.get(key, tuple(tensor.shape)) != tuple(tensor.shape):
            raise NemoError(
                f"{pretrained} was trained with another image size or context length than {model} has ({key} is "
                f"{list(stored[key])}, not {list(tensor.shape)}). Give the model that the weights were trained as."
            )


def _processor(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def model_name(model: str) -> tuple[str, dict[str, Any]]:
    """The name that open_clip knows a model by, and the preprocessing that its config file asks for.

    A config file is registered under a name of its own, so that it never replaces one of open_clip's models.
    """
    import open_clip

    if not model.endswith(".json"):
        name = model.replace("/", "-")
        if name not in open_clip.list_models():
            close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
            hint = f"Did you mean {' or '.join(close)}?" if close else "open_clip.list_models() lists all."
            raise NemoError(f"open_clip has no model '{model}'. {hint}")
        return name, {}
    content, config, preprocess = read_config(model)
    name = f"{Path(model).stem}-{hashlib.sha256(content).hexdigest()[:12]}"
    if name not in open_clip.list_models():
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            open_clip.add_model_config(path)
    return name, preprocess


def _find_weights(model: str, name: str, pretrained: str) -> Path:
    """The local file of the weights, fetched if ``pretrained`` is a tag."""
    import open_clip

    if tag := open_clip.pretrained.get_pretrained_cfg(name, pretrained):
        try:
            return Path(open_clip.pretrained.download_pretrained(tag))
        except (OSError, RuntimeError) as error:
            raise NemoError(
                f"The weights '{pretrained}' of {model} could not be fetched ({_first_line(error)}). "
                "Check the network, or give a local weights file with --pretrained."
            ) from error
    if not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise NemoError(
            f"{pretrained} is neither a weights file nor a tag of {model}. Give the path of a file"
            + (f", or one of the tags {', '.join(tags)}." if tags else ".")
        )
    return Path(pretrained)


def _check_file(path: Path) -> int:
    """The size of a weights file; one that would take more memory than that is refused."""
    try:
        size = check_regular(path)
        if path.suffix != ".safetensors":
            with open(path, "rb") as file:
                if file.read(4) == b"PK\3\4":  # as PyTorch tells them apart
                    _check_archive(file, size, path)
                else:
                    file.seek(0)
                    for _ in range(
                        5
                    ):  # what PyTorch before 1.6 wrote: three about the file, the tensors, their storages
                        check_structure(file, min(size, MAX_PICKLE), path)
    except OSError as error:
        raise NemoError(f"The weights {path} cannot be read: {error.strerror}. Check the path.") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise NemoError(f"{path} is damaged ({_first_line(error)}). Get the file again.") from error
    return size


def _check_archive(file: BinaryIO, size: int, path: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type for part in parts) or sum(part.file_size for part in parts) > size:
            raise NemoError(
                f"{path} is packed, which PyTorch's files are not, and could take any memory. "
                "Save the model's state_dict() with torch.save or as .safetensors."
            )
        for part in parts:
            if part.filename.endswith(".pkl"):
                with archive.open(part) as pickled:
                    check_structure(io.BytesIO(pickled.read()), part.file_size, path)


def _check_size(name: str, size: int, model: str, pretrained: str, stored: dict[str, tuple[int, ...]]) -> None:
    """Refuse weights that cannot fill a model, built here without memory: a value takes a byte of a file or more."""
    import open_clip
    import torch

    with torch.device("meta"):
        network = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    values = sum(tensor.numel() for tensor in network.state_dict().values())
    if values > size:
        raise NemoError(
            f"{model} describes a model of {values:,} values, but {pretrained} has {size:,} bytes. "
            "Give the model that the weights were trained as."
        )
    _check_positions(stored, network, model, pretrained)


def _check_weights(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors by name; a file that holds more than tensors and plain containers is refused.

    open_clip is told the same, but where loading raises a TypeError it loads again without saying so, and PyTorch
    before 2.6 then executes what the file asks for.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise NemoError(f"{path} is damaged ({_first_line(error)}). Get the file again.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about kinds of files that are refused right here
        try:
            content = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # a damaged file raises almost anything
            raise NemoError(
                f"{path} is damaged or holds objects other than tensors, which could run code and are refused. "
                "Save the model's state_dict() with torch.save or as .safetensors."
            ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {
        str(name).removeprefix("module."): tuple(tensor.shape)
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def _first_line(error: BaseException) -> str:
    """The first line of a message that says something, shortened: PyTorch lists every tensor of a model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:157] + "..."
