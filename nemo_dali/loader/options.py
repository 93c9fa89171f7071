"""BatchFormat: what a batch holds and how it looks, which is what a preset fixes."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from nemo_dali._checks import LARGEST_FRAME, check_channels, integer, one_of
from nemo_dali.io.threads import most_threads, thread_count
from nemo_dali.kernels.choices import DType as DType
from nemo_dali.kernels.choices import MaskDType as MaskDType
from nemo_dali.kernels.choices import Resample
from nemo_dali.pipeline import gpu
from nemo_dali.presets import IMAGENET_MEAN, IMAGENET_STD, PRESETS
from nemo_dali.text.tokens import Tokenizer
from nemo_dali.tiles.placement import Placement

MOST_AHEAD = 1000  # batches
Fit = Literal["stretch", "letterbox"]
TextField = Literal["sent", "raw"]
MaskedWords = Literal["tokens", "nouns"] | Callable[[str], Iterable[int]]
Samples = Literal["refs", "sentences", "first", "last"]
OnError = Literal["raise", "substitute"]
SplitMode = Literal["train", "eval"]
Style = Literal["batch", "dali", "lavt", "cris", "rela", "caris", "maskris", "cgformer", "dmmi", "dmmi-zom"]


# What takes the place of the arguments of torch's DataLoader that a Loader does not have; docs/drop-in.md shows it too.
INSTEAD = {
    "num_workers": "Give num_threads; 0 there, too, is left to the machine: this process's share of the cores",
    "shuffle": "Leave it out: every epoch is shuffled by seed and epoch; split_mode='eval' keeps the file's order",
    "sampler": "Leave it out: ranks share each epoch by torch.distributed's rank and world_size, or those given",
    "batch_sampler": "Give batch_size, which is per rank",
    "collate_fn": "Give preset, or style, which says how a batch looks",
    "pin_memory": "Give device='cuda', with which batches are made on the GPU",
    "pin_memory_device": "Give device='cuda', with which batches are made on the GPU",
    "worker_init_fn": "Give seed: nothing is drawn but by seed, epoch and position",
    "generator": "Give seed: nothing is drawn but by seed, epoch and position",
    "prefetch_factor": "Give prefetch, the batches that are made ahead in all",
    "persistent_workers": "Leave it out: threads stay until close()",
    "multiprocessing_context": "Leave it out: there are threads in place of worker processes",
    "timeout": "Leave it out: object storage has limits of its own, and local reads have none",
    "in_order": "Leave it out: batches come in the order of the plan",
}


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

    def facts(self) -> dict[str, Any]:
        """Every option by its name, a callable by its type's: what ranks compare."""
        return {name: type(value).__name__ if callable(value) else value for name, value in vars(self).items()}

    @property
    def border(self) -> int:
        """A letterbox's border: the mean colour, as ``kernels.tile`` packs it."""
        red, green, blue = (min(max(round(255 * value), 0), 255) for value in self.mean)
        return red | green << 8 | blue << 16


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What of its machine a rank uses; ``Loader`` says what they mean.

    Attributes:
        device_id: CUDA device number; None: the CPU.

    Raises:
        ValueError: an option out of range.
    """

    device_id: int | None
    num_threads: int
    prefetch: int
    hw_decoder_load: float

    @classmethod
    def of(cls, *, device: str, num_threads: int | None, prefetch: int, hw_decoder_load: float | None) -> "Resources":
        """Options as a Loader takes them, with what is chosen where None is given."""
        device_id = gpu.cuda_device(device)
        threads = (
            integer("num_threads", 0 if num_threads is None else num_threads, least=0, most=most_threads())
            or thread_count()
        )
        share = gpu.hardware_share(threads) if hw_decoder_load is None else hw_decoder_load
        if not 0 <= share <= 1:
            raise ValueError(f"hw_decoder_load ({share}) must be from 0 to 1")
        prefetch = integer("prefetch", prefetch, least=1, most=MOST_AHEAD)
        return cls(device_id=device_id, num_threads=threads, prefetch=prefetch, hw_decoder_load=share)


def refuse_others(given: Mapping[str, Any], loader: type) -> None:
    """Refuse arguments, by name, that a Loader does not have.

    Raises:
        TypeError: there is one; the sentence says what takes its place.
    """
    parameters = inspect.signature(loader).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    for name in given:
        meant = [name] if name in INSTEAD else get_close_matches(name, [*known, *INSTEAD], n=1)
        if meant == [name]:
            raise TypeError(f"Loader takes no {name}, an argument of torch's DataLoader. {INSTEAD[name]}.")
        hint = f"did you mean {meant[0]!r}?" if meant else "help(Loader) lists its arguments."
        raise TypeError(f"Loader takes no argument {name!r}; {hint}")


def format_of(preset: str | Mapping[str, Any] | None, *, evaluate: bool, **given: Any) -> BatchFormat:
    """The format that comes of a preset and the options beside it, of which None counts as not given.

    Raises:
        ValueError: no such preset, an option that is none of a format's, or one out of range.
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
    options |= {name: value for name, value in given.items() if value is not None}
    if evaluate and options["infinite"]:
        raise ValueError("infinite (True) must be False with split_mode='eval'")
    if evaluate and options["erase"]:
        raise ValueError(f"erase ({options['erase']}) must be left out with split_mode='eval'")
    return BatchFormat(**options)


def check_choices(*, split_mode: str, on_error: str, placement: str, policy_given: bool) -> None:
    """Refuse values that are none of an option's, and what does not go with an evaluation.

    Raises:
        ValueError: there is one.
    """
    for name, choice, choices in (
        ("split_mode", split_mode, SplitMode),
        ("placement", placement, Placement),
        ("on_error", on_error, OnError),
    ):
        one_of(name, choice, get_args(choices))
    if split_mode == "eval" and (policy_given or on_error != "raise"):
        raise ValueError("policy and on_error must be left out with split_mode='eval'")


def check_tiles(
    *, tiles: bool, format: BatchFormat, placement: Placement, device_id: int | None, device_budget: int | None
) -> int | None:
    """Refuse options that do not go together where tiles are given, or are not.

    Returns:
        device_budget, as an int.

    Raises:
        ValueError: there are some.
    """
    if format.fit == "letterbox" and tiles:
        raise ValueError("fit ('letterbox') must be 'stretch' with tiles")
    if format.erase and tiles:  # squares come before the photo is resized, and tiles are
        raise ValueError(f"erase ({format.erase}) must be 0 with tiles")
    if tiles and (placement == "host") != (device_id is None):
        raise ValueError(
            f"placement ({placement!r}) must be 'host' for device='cpu', and 'pinned' or 'device' for a GPU"
        )
    if placement != "host" and not tiles:
        raise ValueError(f"placement ({placement!r}) must be left out without tiles")
    if device_budget is not None:
        if placement != "device":
            raise ValueError(f"device_budget ({device_budget}) must be left out unless placement is 'device'")
        return integer("device_budget", device_budget, least=0)
    return None
