"""Weights trained with QuickGELU in a model without it, which load anyway and embed worse."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from nemo_dali.mining._weights import Weights

logger = logging.getLogger(__name__)

_SUFFIX = "-quickgelu"  # of open_clip's names


def warn_of_quick_gelu(model: str, name: str, pretrained: str, weights: Weights) -> None:
    """Warn if weights are known to have been trained with QuickGELU and the model is without it.

    Args:
        model, pretrained: as given.
        name: the name that open_clip knows the model by.
    """
    import open_clip

    if open_clip.get_model_config(name).get("quick_gelu", False):
        return
    if not (reason := _trained_with(name, pretrained, weights)):
        return
    other = name + _SUFFIX
    exists = other in open_clip.list_models()
    logger.warning(
        "%s was trained with QuickGELU (%s), but %s is a model without it, which makes its embeddings worse. %s",
        pretrained,
        reason,
        model,
        f"Give the model {other}." if exists else "Set 'quick_gelu' to true in a model config.",
    )


def _trained_with(name: str, pretrained: str, weights: Weights) -> str:
    """How it is known that weights were trained with QuickGELU; empty if it is not."""
    import open_clip

    if tag := open_clip.pretrained.get_pretrained_cfg(name, pretrained):
        return "as open_clip says of that tag" if tag.get("quick_gelu", False) else ""
    if weights.from_openai:
        return "like everything that OpenAI published"
    path = Path(pretrained).absolute()
    if re.search("quick_?gelu", path.stem.lower()):
        return "by its name"
    folders = {part.lower() for part in path.parts[-4:-1]}
    published = {(tag, quick) for _, tag, quick, file, folder in _published() if file == path.stem or folder in folders}
    tag = next((tag for tag, _ in published), "") or _tag_in(name, path.stem)
    if not tag or (published and not all(quick for _, quick in published)):
        return ""
    return f"as open_clip says of its tag {tag}"


def _tag_in(name: str, stem: str) -> str:
    """The longest of open_clip's tags in a file's name, if all of its weights were trained with QuickGELU.

    Only the model's own tags count; if open_clip does not know the model, only tags of several models do.
    """
    import open_clip

    known = name in open_clip.list_models() and bool(open_clip.list_pretrained_tags_by_model(name))
    words = f"_{_words(stem)}_"
    found: dict[str, dict[str, bool]] = {}
    for model, tag, quick, *_ in _published():
        if f"_{_words(tag)}_" in words and (model == name or not known):
            found.setdefault(tag, {})[model] = quick
    tag = max(found, key=len, default="")
    models = found.get(tag, {})
    return tag if all(models.values()) and (known or len(models) > 1) else ""


def _words(text: str) -> str:
    return re.sub("[^a-z0-9]+", "_", text.lower())


def _published() -> Iterator[tuple[str, str, bool, str, str]]:
    """open_clip's weights: model, tag, whether trained with QuickGELU, the file's name, the folder's name in a cache.

    OpenAI's files are recognised by what is in them, not by their names, which are models' names.
    """
    import open_clip

    for model, tag in open_clip.list_pretrained():
        if model.endswith(_SUFFIX):
            continue  # the same weights again
        entry = open_clip.pretrained.get_pretrained_cfg(model, tag)
        file = "" if tag == "openai" else Path(entry.get("url", "")).stem
        folder = "--".join(["models", *entry.get("hf_hub", "").split("/")[:2]]).lower()
        yield model, tag, bool(entry.get("quick_gelu", False)), file, folder
