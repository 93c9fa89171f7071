"""Loader: sources, plan, pipeline and text as one iterator of batches."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy.typing as npt

from nemo_dali._checks import PathLike
from nemo_dali._choices import DType, MaskDType, Placement, Resample
from nemo_dali.distributed.ranks import Ranks
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.loader._arguments import refuse_others
from nemo_dali.loader._assembly import Assembler
from nemo_dali.loader._cells import CellLayout
from nemo_dali.loader._epochs import EpochIterator
from nemo_dali.loader._faults import PhotoFaults
from nemo_dali.loader._frames import Frames
from nemo_dali.loader._prefetch import Prefetcher
from nemo_dali.loader._sentences import SentenceTokens
from nemo_dali.loader._steps import StepPlanner
from nemo_dali.loader.format import Fit, MaskedWords, Style, TextField
from nemo_dali.loader.options import LoaderOptions, OnError, SplitMode
from nemo_dali.loader.sources import Corpus
from nemo_dali.plan.part import Samples
from nemo_dali.plan.planner import Planner
from nemo_dali.plan.policy import MosaicPolicy, warn_if_tuned_elsewhere, warn_if_unbounded
from nemo_dali.text.tokens import Tokenizer
from nemo_dali.tiles.placement import ResidentTiles

if TYPE_CHECKING:
    import torch


class Loader(EpochIterator):
    """Iterates over mosaics made inside a DALI pipeline.

        loader = Loader(dataset="refcoco.ris.h5", negatives="refcoco.neg.h5", batch_size=8)
        for epoch in range(epochs):
            for image, mask, tokens, attention_mask, plan in loader:
                ...

    Sample s of step t on rank r is position ``t * world_size * batch_size + r * batch_size + s`` of the epoch, on any
    rank and any machine. Once an epoch's last batch has been delivered, the next pass shows the next epoch; after an
    earlier ``break`` it restarts the same epoch. Only one thread may iterate at a time; another one that tries gets a
    NemoError.

    Args:
        dataset: a .ris.h5 file, or several to be mixed.
        negatives: its .neg.h5 file, or one per data set; None if the policy mines nothing.
        batch_size: samples per step of this rank.
        policy: the mosaic policy, which may change with the epoch, or a policy file, such as ``nemo-dali tune`` writes.
        seed: integer in [0, 2**64); the same on every rank.
        device: "cpu", or "cuda" or "cuda:1": where photos are decoded and batches made. On a GPU the tensors are
            torch's own, ready for its current stream and safe to keep; the host does not wait for them.
        preset: the name of a function of ``nemo_dali.presets``, or the options that one returned: those from ``size``
            to ``style`` below, as a training repository wants them. An option given explicitly overrides it.
        size: height and width of a frame in pixels, 480.
        dtype: of the images, "float32". "uint8" is not normalised; the others are ``(value / 255 - mean) / std``.
        mean, std: per channel RGB, in units of the full range 0 to 1; ImageNet's by default.
        resample: "cv2-linear" (OpenCV's INTER_LINEAR, the default) or "pillow-bilinear" (Pillow's antialiased
            BILINEAR), each with that library's nearest neighbour for masks.
        fit: "stretch", or "letterbox" as in CRIS: a single photo keeps its proportions, on a border of the mean colour,
            resampled by OpenCV 4's warpAffine, cubic, its mask linear. Cells of a mosaic are stretched either way.
            Only without tiles. On a GPU it gives the CPU's pixels, apart from the decoder's differences.
        mask_dtype: "uint8" (the default), "int64" or "float32". The mask of a letterboxed photo has steps of 1/255 in
            float32; in the others it is 1 from 128/255 on.
        tokenizer, context_length, keep_end: see ``text.tokenize``.
        text: which of a sentence's texts is tokenised: REFER's "sent", which the publisher cleaned (the default), or
            "raw".
        masked_words: what ``batch.masked_tokens`` is: "tokens", MaskRIS's masked tokens; "nouns", DMMI's masked nouns,
            found by TextBlob; or a callable that finds them, see ``text.noun_runs``. None: nothing.
        samples: "refs": a sample is a ref with one of its sentences, drawn (the default for training); "first",
            "last": with its first or last sentence; "sentences": every sentence is a sample (the default for
            evaluation).
        erase: share of the samples, 0 to 1, whose photo gets 20 to 60 black squares of 32 x 32 pixels before it is
            resized, as in RMSIN: the target's, not its negatives'. ``plan/erasing.py`` says which and where. Only
            without tiles and in training. 0 by default.
        infinite: a pass never ends, but continues with the next epoch; ``len`` is still that of one epoch.
        style: "batch" yields ``Batch``; "dali" a list of one dict, as DALI's PyTorch iterators do; the others the
            structure of that repository's own loader, see ``nemo_dali.loader``.
        split_mode: "train", or "eval": no mosaics, the order of the file, and no padding, so that every sample is seen
            once; the last step may be smaller, and ranks may have different ``len``.
        images: image root in place of the recorded one, or one per data set (None: as recorded).
        tiles: a .tiles.h5 file, or one per data set: photos are then read from there instead of decoded. The pixels
            are the same; ``resample``, ``size`` and the policy's grids must be those of the file, ``jitter`` 0.
        placement: where tiles are kept: "host", mapped, one copy per node, for device="cpu"; or, for a GPU, "pinned",
            in page-locked memory, one copy per node if torch.distributed gives the ranks; or "device", in GPU memory.
        device_budget: bytes of GPU memory for placement "device": the tiles that are read most often are kept there,
            the others in page-locked memory. None: all tiles are kept there.
        rank, world_size: this process among all; None: from torch.distributed if initialised, else 0 of 1.
        drop_last: True: an incomplete last global batch is left out (different samples each epoch). False: the last
            step is filled up with the epoch's first refs, drawn again.
        on_error: what to do with a photo that is missing, damaged or of a different size than annotated. "raise": a
            PhotoError names it in the step that it belongs to. "substitute": a negative is replaced by the sentence's
            next candidate, a target by the next ref, as described in ``nemo_dali.plan``; a warning names every such
            photo. The samples depend only on which photos are bad, so they are the same for any number of ranks and
            after any resume. The decoder decides which are bad: a GPU's may show a damaged JPEG that the CPU's
            refuses, so devices agree only if the data set was indexed with ``--verify``. With tiles no photo is read.
            In both cases, a batch that failed through no photo's fault, such as a hiccup of disk or network, is
            retried up to three times.
        num_threads: DALI's threads; None or 0: the cores this process may use, shared by the ranks on the node.
        prefetch: batches in flight while the training loop works on one.
        hw_decoder_load: share of the JPEGs, 0 to 1, for a GPU's hardware decoder; None: chosen by ``num_threads``.
            Where a GPU has one, which decoder takes a photo depends on its batch and on the first batch of the
            process, and their pixels may differ slightly: use 0 for runs that must be repeated, or resumed, bit for
            bit.

    Attributes:
        corpus: the data behind it.
        short_pools: how many mined samples so far had too few candidates.
        substituted: bad photos known so far, and how many samples and cells show others in their place.
        format: the ``BatchFormat`` that results from the preset and the options.
        policy, seed, batch_size, rank, world_size: as given or chosen.
        size, dtype, mean, std, resample, num_threads, prefetch, hw_decoder_load: likewise.
        device_id: CUDA device number; None: the CPU.

    Raises:
        TypeError: an unknown argument; for those of torch's DataLoader the message says what to use instead.
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
        # Before any other name is set: these are the arguments.
        given = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        refuse_others(others, Loader)
        options = LoaderOptions.of(**given)
        format, ranks = options.format, options.ranks
        self.format, self.policy, self.seed, self.batch_size = format, options.policy, options.seed, options.batch_size
        self.rank, self.world_size, self.size = ranks.rank, ranks.world_size, format.size
        self.dtype, self.mean, self.std, self.resample = format.dtype, format.mean, format.std, format.resample
        self.device_id, self.num_threads, self.prefetch, self.hw_decoder_load = options.resources

        self.corpus = corpus = Corpus(options.dataset, options.negatives, options.images)
        prints = corpus.fingerprints()
        warn_if_tuned_elsewhere(options.policy_file, options.tuned_for, prints["negatives"])

        parts = [part.under(options.policy, samples=format.samples) for part in corpus.parts()]
        shuffle = not options.evaluates
        self._planner = Planner(parts, options.policy, seed=options.seed, size=format.size, shuffle=shuffle)
        schedule = options.schedule(self._planner.length)
        if ranks.together:
            files = {f"{kind} files": of_kind for kind, of_kind in prints.items()}
            facts = options.facts() | files | {"epoch length": schedule.length}
            Ranks.through_store().agree(facts, "made a Loader")
        schedule.check_filled()

        self._sentences = SentenceTokens(corpus, format, seed=options.seed, device_id=self.device_id)
        self._resident = None
        if options.tiles is not None:
            self._resident = ResidentTiles(
                options.tiles,
                corpus.datasets,
                size=format.size,
                resample=format.resample,
                policy=options.policy,
                grids=self._planner.grids,
                placement=options.placement,
                device_id=self.device_id,
                device_budget=options.device_budget,
                together=ranks.together,
            )
        self._frames = Frames(options)
        assembler = Assembler(corpus, options, self._frames, self._sentences, resident=self._resident)
        layout = CellLayout(corpus, options, self._frames, resident=self._resident)
        steps = StepPlanner(self._planner, schedule, layout, check_files=corpus.check_files)
        faults = PhotoFaults(corpus, options, self._planner)
        prefetcher = Prefetcher(corpus, options, schedule, steps, assembler, faults, resident=self._resident)
        warn_if_unbounded(options.policy)
        super().__init__(options, prints, schedule, prefetcher, faults)

    @property
    def mode(self) -> str:
        """How samples are made: "stream", or where resident tiles are kept."""
        return "stream" if self._resident is None else self._resident.placement

    @property
    def sample_bytes(self) -> int:
        """Size of a sample's image and mask together."""
        return self._frames.image_bytes + self._frames.mask_bytes

    @property
    def decoder(self) -> str:
        """What decodes the photos, or decoded the tiles: "cpu" or "mixed", whose pixels differ slightly."""
        if self._resident is not None:
            return self._resident.decoder
        return "cpu" if self.device_id is None else "mixed"

    def plan(self, epoch: int, positions: npt.ArrayLike) -> PlanRows:
        """What the samples at these positions of an epoch are made of: dtype ``plan.PLAN`` [n].

        This plan assumes that all photos are sound; ``batch.plan`` is the one after substitution.
        """
        return self._planner.plan(epoch, positions)

    def text_of(self, rows: PlanRows) -> "tuple[torch.Tensor, torch.Tensor]":
        """Tokens and attention mask, int64 [n, L] in host memory, of plan rows [n]."""
        return self._sentences.of(rows)

    def _repr_html_(self) -> str:
        """What a notebook shows: what is delivered, and a contact sheet of the next samples."""
        from nemo_dali.loader.contact_sheet import html_of_loader

        return html_of_loader(self)
