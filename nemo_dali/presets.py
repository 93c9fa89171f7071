"""Presets: the options that make a Loader a drop-in for a training repository's own loader.

    Loader("refcoco.ris.h5", "refcoco.neg.h5", preset="lavt", batch_size=8)
    Loader("refcocog.ris.h5", "refcocog.neg.h5", preset=presets.cris(context_length=22), batch_size=8)

Each function returns options of ``Loader``, which ``docs/drop-in/`` explains repository by repository; an option
given to the Loader explicitly overrides the preset. In evaluation a batch is a ``Batch``, and every sentence is a
sample, unless ``style`` and ``samples`` are given.

Where BERT is used, ``vocabulary`` is a vocab.txt, a tokenizer.json, a folder with one of them, or a name on the Hugging
Face Hub.
"""

from collections.abc import Callable, Iterable
from typing import Any

from nemo_dali.text.wordpiece import PREFIX

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "caris",
    "cgformer",
    "cris",
    "detris",
    "dmmi",
    "etris",
    "lavt",
    "maskris",
    "nemo",
    "rela",
    "rmsin",
]

Options = dict[str, Any]
VOCABULARY = "bert-base-uncased"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def lavt(*, size: int = 480, vocabulary: str = VOCABULARY) -> Options:
    """LAVT (yz93/LAVT-RIS): a ref with a random sentence, its raw text."""
    return _bert(size, vocabulary) | {"text": "raw", "style": "lavt"}


def rmsin(*, size: int = 480, vocabulary: str = VOCABULARY) -> Options:
    """RMSIN (Lsan2401/RMSIN): as LAVT, with black squares on the photos of a fifth of the samples."""
    return lavt(size=size, vocabulary=vocabulary) | {"erase": 0.2}


def caris(*, size: int = 448, vocabulary: str = VOCABULARY) -> Options:
    """CARIS (lsa1997/CARIS)."""
    return _bert(size, vocabulary) | {"style": "caris"}


def maskris(*, size: int = 448, vocabulary: str = VOCABULARY) -> Options:
    """MaskRIS (naver-ai/maskris): as CARIS, with masked tokens; its training loop masks patches of the image."""
    return _bert(size, vocabulary) | {"masked_words": "tokens", "style": "maskris"}


def cgformer(*, size: int = 480, vocabulary: str = VOCABULARY) -> Options:
    """CGFormer (SooLab/CGFormer)."""
    return _bert(size, vocabulary) | {"style": "cgformer"}


def rela(*, size: int = 480, vocabulary: str = VOCABULARY) -> Options:
    """ReLA (henghuiding/ReLA): raw images, every sentence a sample, infinite. The model normalises."""
    return _bert(size, vocabulary) | {
        "dtype": "uint8",
        "text": "raw",
        "samples": "sentences",
        "infinite": True,
        "style": "rela",
    }


def dmmi(
    *,
    size: int = 480,
    vocabulary: str = VOCABULARY,
    nouns: str | Callable[[str], Iterable[int]] = "nouns",
    zom: bool = False,
) -> Options:
    """DMMI (toggle1995/RIS-DMMI).

    Args:
        nouns: "nouns", found by TextBlob as DMMI does, or a callable: see ``text.noun_runs``.
        zom: as ``data/dataset_zom.py``, for Ref-ZOM: every sentence a sample, text without the middle dimension.
    """
    options = _bert(size, vocabulary) | {"text": "raw", "masked_words": nouns, "style": "dmmi"}
    return options | {"samples": "sentences", "style": "dmmi-zom"} if zom else options


def cris(*, size: int = 416, context_length: int = 17) -> Options:
    """CRIS (DerrickWang005/CRIS.pytorch); for RefCOCOg its ``context_length`` is 22."""
    return {
        "size": size,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "fit": "letterbox",
        "mask_dtype": "float32",
        "tokenizer": "clip",
        "context_length": context_length,
        "style": "cris",
    }


def etris(*, size: int = 416, context_length: int = 17) -> Options:
    """ETRIS (kkakkkka/ETRIS): CRIS's loader; for RefCOCOg its ``context_length`` is 22."""
    return cris(size=size, context_length=context_length)


def detris(*, size: int = 448, context_length: int = 17) -> Options:
    """DETRIS (jiaqihuang01/DETRIS): CRIS's loader with larger frames; for RefCOCOg its ``context_length`` is 22, and 17
    for the google split."""
    return cris(size=size, context_length=context_length)


def nemo(*, size: int = 416, context_length: int = 17) -> Options:
    """NeMo's own release (snuviplab/NeMo): CRIS's loader with every photo stretched, single ones too, OpenCV's bilinear
    without antialiasing, and hard masks; for RefCOCOg its ``context_length`` is 22."""
    return cris(size=size, context_length=context_length) | {"fit": "stretch", "resample": "cv2-linear"}


def _bert(size: int, vocabulary: str) -> Options:
    """What the loaders with BERT have in common."""
    return {
        "size": size,
        "resample": "pillow-bilinear",
        "mask_dtype": "int64",
        "tokenizer": PREFIX + vocabulary,
        "context_length": 20,
        "keep_end": False,
    }


PRESETS: dict[str, Callable[..., Options]] = {
    function.__name__: function
    for function in (lavt, rmsin, cris, etris, detris, rela, caris, maskris, cgformer, dmmi, nemo)
}
