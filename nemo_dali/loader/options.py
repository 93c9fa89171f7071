"""LoaderOptions: the arguments of a Loader, checked, with values chosen for those left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from nemo_dali._checks import LARGEST_BATCH, PathLike, as_paths, integer, one_of
from nemo_dali._choices import Placement
from nemo_dali._version import __version__
from nemo_dali.distributed.ranks import rank_and_world_size
from nemo_dali.io.threads import most_threads, thread_count
from nemo_dali.loader.format import BatchFormat, format_of
from nemo_dali.pipeline import gpu
from nemo_dali.plan.policy import MosaicPolicy, policy_of
from nemo_dali.plan.schedule import Schedule

MOST_AHEAD = 1000  # batches
OnError = Literal["raise", "substitute"]
SplitMode = Literal["train", "eval"]


class Resources(NamedTuple):
    """What a rank uses of its machine; ``Loader`` says what the options mean.

    Attributes:
        device_id: CUDA device number; None: the CPU.
    """

    device_id: int | None
    num_threads: int
    prefetch: int
    hw_decoder_load: float

    @classmethod
    def of(cls, *, device: str, num_threads: int | None, prefetch: int, hw_decoder_load: float | None) -> "Resources":
        """Options as a Loader takes them, with values chosen where None is given.

        Raises:
            ValueError: an option out of range.
        """
        device_id = gpu.cuda_device(device)
        threads = (
            integer("num_threads", 0 if num_threads is None else num_threads, least=0, most=most_threads())
            or thread_count()
        )
        share = gpu.hardware_share(threads) if hw_decoder_load is None else hw_decoder_load
        if not 0 <= share <= 1:
            raise ValueError(f"hw_decoder_load ({share}) must be from 0 to 1")
        return cls(device_id, threads, integer("prefetch", prefetch, least=1, most=MOST_AHEAD), share)


class OwnRank(NamedTuple):
    """This process among all; ``given``: by arguments, not by torch.distributed."""

    rank: int
    world_size: int
    given: bool

    @property
    def together(self) -> bool:
        """Whether all ranks of torch.distributed make their Loaders now."""
        return not self.given and self.world_size > 1

    @property
    def alone(self) -> bool:
        """Whether torch.distributed knows of no other rank."""
        return not self.given and self.world_size == 1


@dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """What a Loader was given; ``Loader`` says what it means.

    Attributes:
        policy_file, tuned_for: the file that the policy was read from, and the fingerprint of the table that it was
            tuned for; None where there is none.

    Raises:
        ValueError: an option out of range, or two that do not go together.
    """

    dataset: Sequence[PathLike]
    negatives: Sequence[PathLike]
    images: Sequence[PathLike | None]
    tiles: Sequence[PathLike] | None
    batch_size: int
    policy: MosaicPolicy
    policy_file: PathLike | None
    tuned_for: str | None
    seed: int
    format: BatchFormat
    split_mode: SplitMode
    placement: Placement
    device_budget: int | None
    drop_last: bool
    on_error: OnError
    resources: Resources
    ranks: OwnRank

    def __post_init__(self) -> None:
        format, placement, budget = self.format, self.placement, self.device_budget
        tiles, training = self.tiles is not None, not self.evaluates
        moving = self.policy.jitter > 0 and 2 in self.policy.shown_grids
        for fits, name, value, rule in (
            (training or self.on_error == "raise", "on_error", self.on_error, "be left out with split_mode='eval'"),
            (training or not format.infinite, "infinite", True, "be False with split_mode='eval'"),
            (training or not format.erase, "erase", format.erase, "be left out with split_mode='eval'"),
            (not tiles or format.fit != "letterbox", "fit", format.fit, "be 'stretch' with tiles"),
            # Squares are put on before the photo is resized, and tiles are resized already.
            (not tiles or not format.erase, "erase", format.erase, "be 0 with tiles"),
            (
                not tiles or not moving,
                "jitter",
                self.policy.jitter,
                "be 0 with tiles, whose sizes are fixed. Leave tiles out to decode each photo as it is needed.",
            ),
            (
                not tiles or (placement == "host") == (self.resources.device_id is None),
                "placement",
                placement,
                "be 'host' for device='cpu', and 'pinned' or 'device' for a GPU",
            ),
            (tiles or placement == "host", "placement", placement, "be left out without tiles"),
            (
                budget is None or placement == "device",
                "device_budget",
                budget,
                "be left out unless placement is 'device'",
            ),
        ):
            if not fits:
                raise ValueError(f"{name} ({value!r}) must {rule}")

    @classmethod
    def of(  # noqa: PLR0913  # every option by its name
        cls,
        *,
        dataset: PathLike | Sequence[PathLike],
        negatives: PathLike | Sequence[PathLike] | None,
        batch_size: int,
        policy: MosaicPolicy | PathLike | None,
        seed: int,
        device: str,
        preset: str | Mapping[str, Any] | None,
        split_mode: SplitMode,
        images: PathLike | Sequence[PathLike | None] | None,
        tiles: PathLike | Sequence[PathLike] | None,
        placement: Placement,
        device_budget: int | None,
        rank: int | None,
        world_size: int | None,
        drop_last: bool,
        on_error: OnError,
        num_threads: int | None,
        prefetch: int,
        hw_decoder_load: float | None,
        **look: Any,
    ) -> "LoaderOptions":
        """Arguments as ``Loader`` takes them; ``look``: those of a batch's format."""
        for name, choice, choices in (
            ("split_mode", split_mode, SplitMode),
            ("placement", placement, Placement),
            ("on_error", on_error, OnError),
        ):
            one_of(name, choice, get_args(choices))
        evaluate = split_mode == "eval"
        if evaluate and policy is not None:
            raise ValueError(f"policy ({policy!r}) must be left out with split_mode='eval'")
        format = format_of(preset, evaluate=evaluate, **look)
        policy, policy_file, tuned_for = policy_of(policy, evaluate=evaluate)
        return cls(
            dataset=as_paths("dataset", dataset),
            negatives=as_paths("negatives", negatives),
            images=as_paths("images", images, gaps=True),
            tiles=None if tiles is None else as_paths("tiles", tiles),
            batch_size=integer("batch_size", batch_size, least=1, most=LARGEST_BATCH),
            policy=policy,
            policy_file=policy_file,
            tuned_for=tuned_for,
            seed=integer("seed", seed, least=0),
            format=format,
            split_mode=split_mode,
            placement=placement,
            device_budget=None if device_budget is None else integer("device_budget", device_budget, least=0),
            drop_last=drop_last,
            on_error=on_error,
            resources=Resources.of(
                device=device, num_threads=num_threads, prefetch=prefetch, hw_decoder_load=hw_decoder_load
            ),
            ranks=OwnRank(*rank_and_world_size(rank, world_size), rank is not None or world_size is not None),
        )

    @property
    def evaluates(self) -> bool:
        """Whether every sample is shown once, in the order of the file."""
        return self.split_mode == "eval"

    def schedule(self, length: int) -> Schedule:
        """Which of an epoch's samples this rank shows in each step."""
        return Schedule(
            length,
            self.batch_size,
            self.ranks.rank,
            self.ranks.world_size,
            drop_last=self.drop_last and not self.evaluates,
            pad=not self.evaluates,
        )

    def facts(self) -> dict[str, Any]:
        """What ranks must have in common, the most telling first."""
        return {
            "version": __version__,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "policy": self.policy.to_json(),
            "split_mode": self.split_mode,
            **self.format.facts(),
            "on_error": self.on_error,
            "drop_last": self.drop_last,
            "tiles": (self.tiles is not None, self.placement, self.device_budget),
        }
