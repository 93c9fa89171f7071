"""Loader: plan, pipeline and text as one iterator of batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy.typing as npt

from nemo_dali._checks import LARGEST_BATCH, PathLike, as_paths, integer
from nemo_dali._version import __version__
from nemo_dali.distributed.ranks import agree, check_still_alone, rank_and_world_size
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.kernels.tile import Resample
from nemo_dali.loader._faults import PhotoFaults, Substituted
from nemo_dali.loader._frames import FrameAllocator
from nemo_dali.loader._prefetch import Prefetcher, Step
from nemo_dali.loader._sentences import SentenceTokens
from nemo_dali.loader._state import JOIN, LAST_EPOCH, SAMPLING, Pass, Position, make_state, read_state, sampling_facts
from nemo_dali.loader.batch import Batch
from nemo_dali.loader.options import (
    DType,
    Fit,
    MaskDType,
    MaskedWords,
    OnError,
    Resources,
    Samples,
    SplitMode,
    Style,
    TextField,
    check_choices,
    check_tiles,
    format_of,
    refuse_others,
)
from nemo_dali.loader.sources import Corpus
from nemo_dali.loader.styles import arrange, masks_of
from nemo_dali.pipeline import gpu
from nemo_dali.plan.planner import Planner, Replaced, ShortPools
from nemo_dali.plan.policy import MosaicPolicy, policy_of, warn_if_tuned_elsewhere, warn_if_unbounded
from nemo_dali.plan.schedule import Schedule
from nemo_dali.text.tokens import Tokenizer
from nemo_dali.tiles.placement import Placement, ResidentTiles

if TYPE_CHECKING:
    import torch


class Loader:
    """Iterates over mosaics made inside a DALI pipeline.

        loader = Loader(dataset="refcoco.ris.h5", negatives="refcoco.neg.h5", batch_size=8)
        for epoch in range(epochs):
            for image, mask, tokens, attention_mask, plan in loader:
                ...

    Sample s of step t on rank r is position ``t * world_size * batch_size + r * batch_size + s`` of the epoch, whatever
    the rank or the machine. Once an epoch's last batch was delivered, the next pass shows the next epoch; after a
    ``break`` before that it starts the same epoch anew. One thread iterates at a time; another one that does so
    meanwhile gets a NemoError.

    Args:
        dataset: a .ris.h5 file, or several that are mixed.
        negatives: its .neg.h5 file, or one per data set; None where the policy mines nothing.
        batch_size: samples per step of this rank.
        policy: the mosaic policy, or the file of one, as ``nemo-dali tune`` writes it.
        seed: integer in [0, 2**64); the same on every rank.
        device: "cpu", or "cuda" or "cuda:1": where photos are decoded and batches made. On a GPU the tensors are
            torch's own, ready for its current stream and safe to keep; the host does not wait for them. No GPU has
            run this yet.
        preset: the name of a function of ``nemo_dali.presets``, or the options that one returned: those from ``size``
            to ``style`` below, as a training repository wants them. An option given beside it beats it.
        size: height and width of a frame in pixels, 480.
        dtype: of the images, "float32". "uint8" is not normalised; the others are ``(value / 255 - mean) / std``.
        mean, std: per channel RGB, in units of the full range 0 to 1; ImageNet's by default.
        resample: "cv2-linear" (OpenCV's INTER_LINEAR, the default) or "pillow-bilinear" (Pillow's antialiased
            BILINEAR), each with that library's nearest neighbour for masks.
        fit: "stretch", or "letterbox" as in CRIS: a single photo keeps its proportions, on a border of the mean colour,
            resampled by OpenCV 4's warpAffine, cubic, its mask linear. Cells of a mosaic are stretched either way.
            Without tiles only. On a GPU it gives the CPU's pixels but for the decoder's; no GPU has run it yet.
        mask_dtype: "uint8" (the default), "int64" or "float32". The mask of a letterboxed photo has steps of 1/255 in
            float32; in the others it is 1 from 128/255 on.
        tokenizer, context_length, keep_end: see ``text.tokenize``.
        text: which of a sentence's texts is tokenised: REFER's "sent", which the publisher cleaned (the default), or
            "raw".
        masked_words: what ``batch.masked_tokens`` is: "tokens", MaskRIS's masked tokens; "nouns", DMMI's masked nouns,
            found by TextBlob; or a callable that finds them, see ``text.noun_runs``. None: nothing.
        samples: "refs": a sample is a ref with one of its sentences, drawn (the default for training); "first",
            "last": with that one; "sentences": every sentence is a sample (the default for evaluation).
        erase: share of the samples, 0 to 1, whose photo gets 20 to 60 black squares of 32 x 32 pixels before it is
            resized, as in RMSIN: the target's, not its negatives'. ``plan/erasing.py`` tells which and where. Without
            tiles and in training only. 0 by default.
        infinite: a pass goes on with the next epoch for ever; ``len`` is still that of one epoch.
        style: "batch" yields ``Batch``; "dali" a list of one dict, as DALI's PyTorch iterators do; the others the
            structure of that repository's own loader, see ``nemo_dali.loader``.
        split_mode: "train", or "eval": no mosaics, the order of the file, and no padding, so that every sample is seen
            once: the last step is smaller, and ranks may have different ``len``.
        images: image root in place of the recorded one, or one per data set (None: as recorded).
        tiles: a .tiles.h5 file, or one per data set: photos are then shown from there instead of decoded. The pixels
            are the same; ``resample``, ``size`` and the policy's grids must be those of the file, ``jitter`` 0.
        placement: where tiles lie: "host", mapped, one copy per node, for device="cpu"; or, for a GPU, "pinned", in
            page-locked memory, one copy per node where torch.distributed gives the ranks; or "device", in GPU memory.
        device_budget: bytes of GPU memory for placement "device": the tiles that are read most often lie there, the
            others in page-locked memory. None: all of them.
        rank, world_size: this process among all; None: from torch.distributed if initialised, else 0 of 1.
        drop_last: True: samples that fill no global batch are left out (others each epoch). False: the last step is
            filled up with the epoch's first refs, drawn anew.
        on_error: what to do with a photo that is missing, damaged or of another size than annotated. "raise": a
            PhotoError names it in the step that it belongs to. "substitute": a negative gives way to the sentence's
            next candidate, a target to the next ref, as told in ``nemo_dali.plan``; a warning names every such photo.
            The samples depend on which photos are bad and on nothing else, so they are the same for any number of
            ranks and after any resume. With tiles no photo is read. In both cases a batch that failed without a
            photo's fault, by a hiccup of disk or network, is made again up to three times.
        num_threads: DALI's threads; None or 0: the cores this process may use, shared by the ranks on the node.
        prefetch: batches in flight while the training loop works on one.
        hw_decoder_load: share of the JPEGs, 0 to 1, for a GPU's hardware decoder; None: chosen by ``num_threads``.

    Attributes:
        corpus: the data behind it. short_pools: how many mined samples met too few candidates, so far.
        substituted: bad photos known so far, and how many samples and cells show others in their place.
        format: the ``BatchFormat`` that came of the preset and the options.
        policy, seed, batch_size, rank, world_size, size, dtype, mean, std, resample, num_threads, prefetch,
            hw_decoder_load: as given or chosen.
        device_id: CUDA device number; None: the CPU.

    Raises:
        TypeError: an argument that there is not; of those of torch's DataLoader it says what takes their place.
        ValueError: an argument out of range.
        NemoError: a file that is missing, damaged, or does not fit the others; while iterating, PhotoError for a photo.
    """

    def __init__(  # noqa: PLR0913  # every option by its name
        self,
        dataset: PathLike | Sequence[PathLike],
        negatives: PathLike | Sequence[PathLike] | None = None,
        *,
        batch_size: int,
        policy: MosaicPolicy | PathLike | None = None,
        seed: int = 0,
        device: str = "cpu",
        preset: str | Mapping[str, Any] | None = None,
        size: int | None = None,
        dtype: DType | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        resample: Resample | None = None,
        fit: Fit | None = None,
        mask_dtype: MaskDType | None = None,
        tokenizer: str | Tokenizer | None = None,
        context_length: int | None = None,
        keep_end: bool | None = None,
        text: TextField | None = None,
        masked_words: MaskedWords | None = None,
        samples: Samples | None = None,
        erase: float | None = None,
        infinite: bool | None = None,
        style: Style | None = None,
        split_mode: SplitMode = "train",
        images: PathLike | Sequence[PathLike | None] | None = None,
        tiles: PathLike | Sequence[PathLike] | None = None,
        placement: Placement = "host",
        device_budget: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = True,
        on_error: OnError = "raise",
        num_threads: int | None = None,
        prefetch: int = 2,
        hw_decoder_load: float | None = None,
        **others: NoReturn,
    ) -> None:
        refuse_others(others, Loader)
        check_choices(split_mode=split_mode, on_error=on_error, placement=placement, policy_given=policy is not None)
        evaluate = split_mode == "eval"
        self.format = format = format_of(
            preset,
            evaluate=evaluate,
            size=size,
            dtype=dtype,
            mean=mean,
            std=std,
            resample=resample,
            fit=fit,
            mask_dtype=mask_dtype,
            tokenizer=tokenizer,
            context_length=context_length,
            keep_end=keep_end,
            text=text,
            masked_words=masked_words,
            samples=samples,
            erase=erase,
            infinite=infinite,
            style=style,
        )
        policy, policy_file, tuned_for = policy_of(policy, evaluate=evaluate)
        resources = Resources.of(
            device=device, num_threads=num_threads, prefetch=prefetch, hw_decoder_load=hw_decoder_load
        )
        batch_size = integer("batch_size", batch_size, least=1, most=LARGEST_BATCH)
        seed = integer("seed", seed, least=0)
        device_budget = check_tiles(
            tiles=tiles is not None,
            format=format,
            placement=placement,
            device_id=resources.device_id,
            device_budget=device_budget,
        )
        given_rank = rank is not None or world_size is not None
        rank, world_size = rank_and_world_size(rank, world_size)
        together = not given_rank and world_size > 1  # all ranks make their loaders now
        self._alone = not given_rank and not together
        self.corpus = Corpus(
            as_paths("dataset", dataset), as_paths("negatives", negatives), as_paths("images", images, gaps=True)
        )
        parts = self.corpus.parts(policy, samples=format.samples)
        self._planner = Planner(parts, policy, seed=seed, size=format.size, shuffle=not evaluate)
        warn_if_tuned_elsewhere(policy_file, tuned_for, self.corpus.fingerprints()["negatives"])
        if together:
            agree(
                {"version": __version__, "seed": seed, "batch_size": batch_size, "policy": policy.to_json()}
                | {"split_mode": split_mode, **format.facts(), "on_error": on_error, "drop_last": drop_last}
                | {f"{kind} files": prints for kind, prints in self.corpus.fingerprints().items()}
                | {"epoch length": self._planner.length, "tiles": (tiles is not None, placement, device_budget)}
            )
        steps = {"drop_last": drop_last and not evaluate, "pad": not evaluate}
        self._schedule = Schedule(self._planner.length, batch_size, rank, world_size, **steps)
        self._schedule.check_filled()
        self.policy, self.seed, self.batch_size = policy, seed, batch_size
        self.rank, self.world_size, self.size = rank, world_size, format.size
        self.device_id, self.num_threads = resources.device_id, resources.num_threads
        self.prefetch, self.hw_decoder_load = resources.prefetch, resources.hw_decoder_load
        self.short_pools = ShortPools()  # of all batches delivered so far
        self._sentences = SentenceTokens(self.corpus, format, seed=seed)
        self.dtype, self.mean, self.std, self.resample = format.dtype, format.mean, format.std, format.resample
        self._placement = placement
        self._resident: ResidentTiles | None = None
        if tiles is not None:
            self._resident = ResidentTiles(
                as_paths("tiles", tiles),
                self.corpus.datasets,
                size=format.size,
                resample=format.resample,
                policy=policy,
                grids=self._planner.grids,
                placement=placement,
                device_id=self.device_id,
                device_budget=device_budget,
                together=together,
            )
        self._faults = PhotoFaults(
            self.corpus,
            self._planner,
            substitute=on_error == "substitute",
            photos=tiles is None,
            num_threads=self.num_threads,
        )
        self._frames = FrameAllocator(
            self.corpus, format, policy, resources, batch_size=batch_size, resident=self._resident, seed=seed
        )
        self._prefetcher = Prefetcher(
            self._schedule, self._planner, self.corpus, self._frames, self._faults, resources, resident=self._resident
        )
        warn_if_unbounded(policy)
        self._position = Position()
        sampling = sampling_facts(policy, format, split_mode=split_mode)
        self._fingerprints = {**self.corpus.fingerprints(), SAMPLING: sampling}

    batch_sampler = None  # Lightning asks for it wherever there is a sampler

    def __reduce__(self) -> Any:
        raise TypeError("A Loader cannot be pickled or copied. Make one in each process.")

    def __len__(self) -> int:
        """Steps in a full epoch, the same on every rank; in evaluation those that have samples for this rank."""
        return self._schedule.steps_after(0)

    @property
    def dataset(self) -> Sequence[Any]:
        """The samples of an epoch, as far as ``len(loader.dataset)`` asks: how many there are, over all ranks."""
        return range(self._planner.length)

    @property
    def mode(self) -> str:
        """How samples are made: "stream", or where resident tiles lie."""
        return "stream" if self._resident is None else self._placement

    @property
    def sample_bytes(self) -> int:
        """Of a sample's image and mask."""
        return self._frames.nbytes // self.batch_size

    @property
    def decoder(self) -> str:
        """What decodes the photos, or decoded the tiles: "cpu" or "mixed", whose pixels differ slightly."""
        if self._resident is not None:
            return self._resident.decoder
        return "cpu" if self.device_id is None else "mixed"

    @property
    def substituted(self) -> Substituted:
        """What ``on_error="substitute"`` has replaced so far, on this rank."""
        return self._faults.substituted

    @property
    def epoch(self) -> int:
        """The epoch that the current or the next pass shows."""
        return self._position.epoch

    @property
    def sampler(self) -> "Loader":
        """Itself: ``loader.sampler.set_epoch(e)`` works as with a DistributedSampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. The epoch of a loaded state keeps the loaded position.

        Named after its last batch was delivered, an epoch is shown again.
        """
        self._position.choose(integer("epoch", epoch, least=0, most=LAST_EPOCH), self._schedule)

    def plan(self, epoch: int, positions: npt.ArrayLike) -> PlanRows:
        """What the samples at these positions of an epoch are made of: dtype ``plan.PLAN`` [n].

        This is the plan for photos that are all sound; what substitution made of it is in ``batch.plan``.
        """
        return self._planner.plan(epoch, positions)

    def text_of(self, rows: PlanRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """Tokens and attention mask, int64 [n, L] in host memory, of plan rows [n]."""
        return self._sentences.of(rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the pass stands: JSON-able, the same on every rank, loadable by any rank of any number of ranks."""
        position = self._position
        return make_state(
            seed=self.seed, epoch=position.epoch, samples_seen=position.seen, fingerprints=self._fingerprints
        )

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Let the next pass go on behind the samples that the saved one delivered.

        Args:
            state: what ``state_dict`` gave. One that is older than ``sampling`` among its fingerprints is accepted with
                a warning.
            strict: refuse a state that was saved with another policy, ``samples``, ``split_mode`` or ``size``, under
                which the rest of the epoch is not what was left of it. False: accept it, with a warning.

        Raises:
            StateError: the state is of another version, seed, data set or table, or of other samples; nothing is
                changed then.
        """
        epoch, seen = read_state(state, seed=self.seed, fingerprints=self._fingerprints, strict=strict)
        self._position.load(epoch, seen)

    def close(self) -> None:
        """End the pipeline: its threads, and the batches made ahead. The next step makes a new one.

        Raises:
            NemoError: another thread takes a step, and does not come to its end within a minute.
        """
        with self._position.turns.between(JOIN):
            self._prefetcher.close()

    def __iter__(self) -> Iterator[Any]:
        if self._alone:
            check_still_alone()
        return Pass(self._position.turns, self._passes(*self._position.begin(self._schedule)))

    def _passes(self, number: int, epoch: int, seen: int) -> Iterator[Any]:
        yield from self._pass(number, epoch, seen)
        while self.format.infinite and number == self._position.passes:
            yield from self._pass(number, self._position.epoch, 0)

    def _pass(self, number: int, epoch: int, seen: int) -> Iterator[Any]:
        replaced = Replaced()
        for _ in range(self._schedule.steps_after(seen)):
            self._position.turns.check(number)
            step = self._prefetcher.step(epoch, seen)
            seen += self._schedule.global_batch
            self._position.advance(number, epoch, seen)
            self.short_pools += step.short
            self._faults.count(step.replaced)
            replaced += step.replaced
            batch = self._batch(step)
            if not self._schedule.steps_after(seen):  # now: whoever counts steps does not ask for one more
                self._faults.report(epoch, replaced, self.short_pools)
            yield batch
        self._position.advance(number, epoch + 1, 0)

    def _batch(self, step: Step) -> Any:
        tokens, attention = self._sentences.of(step.plan)
        masked = self._sentences.masked(step.epoch, step.plan)
        image, mask, stream = step.drawing.image, step.drawing.mask, step.drawing.stream
        if self.device_id is not None:
            tokens, attention = gpu.send(tokens, self.device_id), gpu.send(attention, self.device_id)
            masked = None if masked is None else gpu.send(masked, self.device_id)
            current = gpu.current_stream(self.device_id)
            if current != stream:  # torch must not give the memory away before this stream is done with it
                image.record_stream(current)
        mask = masks_of(mask, step.plan, self.format)
        return arrange(Batch(image, mask, tokens, attention, step.plan, self.corpus, masked), self.format.style)
