"""BatchFormat: what a batch holds and how it looks, which is what a preset fixes."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from nemo_dali._checks import LARGEST_FRAME, check_channels, integer, one_of
from nemo_dali._choices import DType, MaskDType, Resample
from nemo_dali.plan.part import Samples
from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD, PRESETS
from nemo_dali.text.tokens import Tokenizer
from nemo_dali.text.wordpiece import PREFIX

Fit = Literal["stretch", "letterbox"]
TextField = Literal["sent", "raw"]
MaskedWords = Literal["tokens", "nouns"] | Callable[[str], Iterable[int]]
Style = Literal["batch", "dali", "lavt", "cris", "rela", "caris", "maskris", "cgformer", "dmmi", "dmmi-zom"]


@dataclass(frozen=True, kw_only=True)
class BatchFormat:
    """The options of a Loader that a preset may set, with their defaults; ``Loader`` says what they mean.

    Raises:
        ValueError: an option out of range, or two that conflict.
    """

    size: int = 480
    dtype: DType = "float32"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    resample: Resample = "cv2-linear"
    fit: Fit = "stretch"
    mask_dtype: MaskDType = "uint8"
    tokenizer: str | Tokenizer = "clip"
    context_length: int | None = None
    keep_end: bool = True
    text: TextField = "sent"
    masked_words: MaskedWords | None = None
    samples: Samples = "refs"
    erase: float = 0.0
    infinite: bool = False
    style: Style = "batch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", integer("size", self.size, least=1, most=LARGEST_FRAME))
        check_channels(self.mean, self.std)
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        for name, choices in (
            ("dtype", DType),
            ("resample", Resample),
            ("fit", Fit),
            ("mask_dtype", MaskDType),
            ("text", TextField),
            ("samples", Samples),
            ("style", Style),
        ):
            one_of(name, getattr(self, name), get_args(choices))
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase ({self.erase}) must be from 0 to 1")
        object.__setattr__(self, "erase", float(self.erase))  # a state holds it
        if not callable(self.masked_words):
            one_of("masked_words", self.masked_words, (None, "tokens", "nouns"))
        if self.style in ("maskris", "dmmi", "dmmi-zom") and self.masked_words is None:
            raise ValueError(f"masked_words (None) must be given for style {self.style!r}")
        of_bert = isinstance(self.tokenizer, str) and self.tokenizer.startswith(PREFIX)
        if self.masked_words == "tokens" and not of_bert:
            raise ValueError("masked_words ('tokens') must be used with a tokenizer 'bert:...'")

    def facts(self) -> dict[str, Any]:
        """Every option by name, a callable as its type's name: what ranks compare."""
        return {name: type(value).__name__ if callable(value) else value for name, value in vars(self).items()}

    @property
    def border(self) -> int:
        """A letterbox's border: the mean colour, as ``kernels.tile`` packs it."""
        red, green, blue = (min(max(round(255 * value), 0), 255) for value in self.mean)
        return red | green << 8 | blue << 16


def format_of(preset: str | Mapping[str, Any] | None, *, evaluate: bool, **given: Any) -> BatchFormat:
    """The format that results from a preset and the options given with it; None counts as not given.

    Raises:
        ValueError: no such preset, an option that a format does not have, or one out of range.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            close = get_close_matches(preset, PRESETS, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"preset ({preset!r}) must be one of {', '.join(PRESETS)}{meant}")
        preset = PRESETS[preset]()
    options = dict(preset or {})
    if unknown := options.keys() - inspect.signature(BatchFormat).parameters:
        raise ValueError(f"preset ({', '.join(sorted(unknown))}) must hold options of a batch's format only")
    if evaluate:
        options |= {"samples": "sentences", "style": "batch", "infinite": False, "masked_words": None, "erase": 0.0}
    return BatchFormat(**options | {name: value for name, value in given.items() if value is not None})
