"""CLIP model configs from any source: read within bounds, and refused if they ask for more than local files."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_dali._checks import short_repr
from nemo_dali.errors import NemoError
from nemo_dali.io.files import read_regular

MAX_FILE_BYTES = 1 << 20
MAX_NUMBER = 2_000_000  # any number in a config; the largest of open_clip's is a vocabulary of 901,629 words
MAX_OF = {  # of numbers with these names; a comment gives the largest in open_clip's own configs
    "layers": 200,  # 56
    "width": 16_384,  # 1,792
    "embed_dim": 16_384,  # 1,536
    "heads": 512,  # 20
    "attn_pooler_heads": 512,  # 12
    "attn_pooler_queries": 4096,  # 256
    "n_queries": 4096,  # 256
    "context_length": 4096,  # 77; the attention's mask has its square
    "image_size": 4096,  # 512
    "mlp_ratio": 64,  # 8.6
}
MAX_POSITION_VALUES = 1 << 25  # of an image tower: patches times width; open_clip's own have 2 million
TOKENIZER_OPTIONS = frozenset({"clean", "strip_sep_token", "language", "reduction_mask"})


def read_config(path: str) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """A config file's content, and the configs of the model and of its preprocessing in it.

    The file is a model config, or the open_clip_config.json of a model on the Hugging Face Hub.

    Raises:
        NemoError: it is not one, is out of bounds, or would run code or access the network.
    """
    try:
        content = read_regular(path, MAX_FILE_BYTES)
        whole = json.loads(content.decode())
    except OSError as error:
        raise NemoError(f"The model config {path} cannot be read ({error.strerror}). Give another.") from error
    except (ValueError, RecursionError) as error:
        raise NemoError(f"The model config {path} cannot be read ({error}). Give another.") from error
    whole = whole if isinstance(whole, dict) else {}
    config = whole.get("model_cfg", whole)
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise NemoError(f"The model config {path} has no '{key}'. Give a config in the layout of open_clip's.")
    preprocess = whole.get("preprocess_cfg", {})
    if not isinstance(preprocess, dict):
        raise NemoError(f"The model config {path} has a 'preprocess_cfg' that is not an object. Give another.")
    for key, value in _leaves({"model_cfg": config, "preprocess_cfg": preprocess}):
        _check_value(path, key, value)
    _check_positions(path, config["vision_cfg"])
    _check_local(path, config)
    return content, config, preprocess


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values that hold no others, with the nearest key above them, and the keys themselves."""
    todo = [(key, value)]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            yield from ((name, name) for name in value)
            todo += value.items()
        elif isinstance(value, list):
            todo += [(key, part) for part in value]
        else:
            yield key, value


def _check_value(path: str, key: str, value: Any) -> None:
    if isinstance(value, str) and "trust_remote_code" in value:
        raise NemoError(
            f"The model config {path} asks for code to be run (trust_remote_code), which is refused. Remove that."
        )
    if isinstance(value, str) and "://" in value:
        raise NemoError(
            f"The model config {path} has the address {short_repr(value)}, but only local files are read. Remove it."
        )
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    most = MAX_OF.get(key, MAX_NUMBER)
    if not (abs(value) <= most and math.isfinite(value)):
        raise NemoError(
            f"The model config {path} has the number {short_repr(value)} as {short_repr(key)}; at most {most:,} is "
            "taken. Give the config of a CLIP model."
        )


def _check_positions(path: str, vision: dict[str, Any]) -> None:
    """Refuse an image tower with more positions than any real one: some are computed before there is a model."""
    sides = vision.get("image_size", 224)
    sides = sides if isinstance(sides, list) else [sides, sides]
    patch, width = vision.get("patch_size", 16), vision.get("width", 768)
    numbers = [*sides, *(patch if isinstance(patch, list) else [patch]), width]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise NemoError(
            f"The model config {path} has an 'image_size', 'patch_size' or 'width' that is not a whole number > 0. "
            "Give the config of a CLIP model."
        )
    patch = min(numbers[len(sides) : -1])
    if math.prod(side // patch + 1 for side in sides) * width > MAX_POSITION_VALUES:
        raise NemoError(f"The model config {path} has images of far too many patches. Give the config of a CLIP model.")


def _check_local(path: str, config: dict[str, Any]) -> None:
    """Refuse what open_clip, timm or transformers would fetch from the network."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if (name := text.get(key)) and not (isinstance(name, str) and os.path.isdir(name)):
            raise NemoError(
                f"The model config {path} names {short_repr(name)} as '{key}', which would be fetched from the Hugging "
                "Face Hub. Download it, and name its folder."
            )
    name = vision.get("timm_model_name")
    if name and not (isinstance(name, str) and name.replace(".", "_").replace("_", "a").isalnum()):
        raise NemoError(
            f"The model config {path} names {short_repr(name)} as 'timm_model_name', which is not one of timm's own "
            "models and would be fetched. Name one of timm's."
        )
    if "siglip" in Path(path).stem.lower() and not text.get("hf_tokenizer_name"):
        raise NemoError(
            f"open_clip would fetch a vocabulary for {path}, as 'siglip' is in its name. Name the folder of a "
            "tokenizer as 'hf_tokenizer_name' in it, or rename it."
        )
    options = text.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or not set(options) <= TOKENIZER_OPTIONS:
        raise NemoError(
            f"The model config {path} has 'tokenizer_kwargs' other than {', '.join(sorted(TOKENIZER_OPTIONS))}. "
            "Remove them."
        )
