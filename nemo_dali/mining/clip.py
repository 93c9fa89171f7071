"""A CLIP model of open_clip, loaded without executing what its files hold."""

import difflib
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nemo_dali._lazy import extra
from nemo_dali.errors import NemoError
from nemo_dali.io.h5 import fingerprint
from nemo_dali.mining._model_config import read_config
from nemo_dali.mining._quick_gelu import warn_of_quick_gelu
from nemo_dali.mining._weights import Weights, find_weights, first_line, read_weights

if TYPE_CHECKING:
    import torch


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
        encoder: what an embedding depends on besides the weights: library, device, preprocessing.
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
            .safetensors; OpenAI's TorchScript archives too). Only tensors are read from it.
        device: "cpu", "cuda", "cuda:1", ...; None: CUDA where there is a device, else the CPU.

    Raises:
        NemoError: no such model, weights or device, weights of another model, or open_clip is not installed.
    """
    import torch

    with extra("mining", f"The model {model}"):
        import open_clip
    torch_device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, preprocess = model_name(model)
    weights = read_weights(find_weights(model, name, pretrained))
    warn_of_quick_gelu(model, name, pretrained, weights)
    try:
        if model.endswith(".json"):
            _check_size(name, model, pretrained, weights)
        network, transform = _build(name, pretrained, weights, preprocess, torch_device)
        _check_positions(weights.shapes, network, model, pretrained)
        tokenizer = open_clip.get_tokenizer(name)
        with torch.inference_mode():
            width = network.eval().encode_text(tokenizer(["a"]).to(torch_device)).shape[-1]
    except NemoError:
        raise
    except Exception as error:  # whatever open_clip, timm or transformers meet in a config, a file or on the network
        raise NemoError(
            f"{model} with the weights {pretrained} cannot be loaded ({first_line(error)}). "
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


def _build(
    name: str, pretrained: str, weights: Weights, preprocess: dict[str, Any], device: "torch.device"
) -> tuple[Any, Any]:
    """The network with its weights, and its preprocessing."""
    import open_clip

    with weights.readable() as path, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "QuickGELU mismatch")  # already reported, with a remedy
        if path != weights.path:  # open_clip does not see the tag, which may ask for different preprocessing
            preprocess = preprocess or open_clip.pretrained.get_pretrained_cfg(name, pretrained)
            pretrained = str(path)
        network, transform = open_clip.create_model_from_pretrained(
            name,
            pretrained,
            precision="fp32",
            device=device,
            weights_only=True,
            **{f"image_{key}": preprocess.get(key) for key in ("mean", "std", "interpolation", "resize_mode")},
        )
    return network, transform


def checked_device(device: str) -> "torch.device":
    """The PyTorch device to embed on.

    Raises:
        ValueError: neither cpu nor cuda.
        NemoError: a CUDA device, but there is none.
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
    """Refuse weights of another image size or context length, which open_clip would interpolate silently."""
    for key, tensor in network.state_dict().items():
        if key.endswith("positional_embedding") and stored.get(key, tuple(tensor.shape)) != tuple(tensor.shape):
            raise NemoError(
                f"{pretrained} was trained with a different image size or context length than {model} has ({key} is "
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


def _check_size(name: str, model: str, pretrained: str, weights: Weights) -> None:
    """Refuse weights too small for a model, built here without memory: a value takes at least a byte of a file."""
    import open_clip
    import torch

    with torch.device("meta"):
        network = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    values = sum(tensor.numel() for tensor in network.state_dict().values())
    if values > weights.size:
        raise NemoError(
            f"{model} describes a model of {values:,} values, but {pretrained} has {weights.size:,} bytes. "
            "Give the model that the weights were trained as."
        )
    _check_positions(weights.shapes, network, model, pretrained)
