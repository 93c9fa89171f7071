"""BatchFormat: what a batch holds and how it looks, which is what a preset fixes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from nemo_dali._checks import check_channels, integer, one_of
from nemo_dali.text.tokens import Tokenizer

DType = Literal["float32", "float16", "bfloat16", "uint8"]
Resample = Literal["cv2-linear", "pillow-bilinear"]
Fit = Literal["stretch", "letterbox"]
MaskDType = Literal["uint8", "int64", "float32"]
TextField = Literal["sent", "raw"]
MaskedWords = Literal["tokens", "nouns"] | Callable[[str], Iterable[int]]
Samples = Literal["refs", "sentences", "first", "last"]
Style = Literal["batch", "dali", "lavt", "cris", "rela", "caris", "maskris", "cgformer", "dmmi", "dmmi-zom"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class BatchFormat:
    """The options of a Loader that a preset may set, with their defaults; ``Loader`` says what they mean.

    Raises:
        ValueError: an option out of range, or two that do not go together.
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
    infinite: bool = False
    style: Style = "batch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", integer("size", self.size, least=1))
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
        if not callable(self.masked_words):
            one_of("masked_words", self.masked_words, (None, "tokens", "nouns"))
        if self.style in ("maskris", "dmmi", "dmmi-zom") and self.masked_words is None:
            raise ValueError(f"masked_words (None) must be given for style {self.style!r}")

    @property
    def border(self) -> int:
        """A letterbox's border: the mean colour, as ``kernels.tile`` packs it."""
        red, green, blue = (min(max(round(255 * value), 0), 255) for value in self.mean)
        return red | green << 8 | blue << 16
