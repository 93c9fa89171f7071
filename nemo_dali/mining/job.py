"""Mining: CLIP embeddings of photos and sentences, and for each sentence the photos most similar to it.

    photos ──────┐                                  ┌──▶ rank 0: table
                 ├──▶ embedding ──▶ all ranks ──▶ ranking
    sentences ───┘     in rounds, each rank a share of it

    torchrun --nproc-per-node 8 -m nemo_dali.mining F.ris.h5 --model ... (or --no-python nemo-dali mine ...)

The same data set, weights, batch size and kind of machine give the same bytes, whatever the number of ranks. Rank 0
writes the table in place and, every few seconds of work, records how much of it is done: the next run continues there.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import LARGEST_BATCH, MOST, as_list, integer
from nemo_dali.data.columns import have_twins
from nemo_dali.data.dataset import Dataset
from nemo_dali.distributed.ranks import Ranks, joined_ranks
from nemo_dali.errors import NemoError
from nemo_dali.io.output import cannot_write, check_inputs
from nemo_dali.io.progress import progress
from nemo_dali.io.threads import thread_count
from nemo_dali.io.writer import Unfinished
from nemo_dali.mining._inputs import Crops, Inputs, Photos, Sentences
from nemo_dali.mining._task import Task, open_task
from nemo_dali.mining.approximate import ApproximateRanker, import_faiss, list_count, recall_places
from nemo_dali.mining.crops import CROPS
from nemo_dali.mining.embedding import Stage, embed
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.mining.ranking import Ranker
from nemo_dali.mining.report import NEAR_IDENTICAL, MiningReport
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.table_writer import begin_table, finish_table, write_excluded
from nemo_dali.mining.tune import mining_advice

F32 = npt.NDArray[np.float32]

COMPARED = 400_000_000  # pairs of photos compared at the end, at most, in seconds: all pairs of 20,000
SYNC_INTERVAL_S = 10.0  # of ranking between two waits for the disk


def mine(  # noqa: PLR0913  # the options of a command
    dataset_path: str | Path,
    *,
    model: str | Sequence[str] | None = None,
    pretrained: str | Sequence[str] | None = None,
    embeddings: str | Path | None = None,
    output: str | Path,
    depth: int = 1000,
    exclusions: Exclusions | None = None,
    batch_size: int = 64,
    device: str | None = None,
    images: str | Path | None = None,
    approximate: bool = False,
    probes: int | None = None,
) -> MiningReport:
    """Embed all photos and sentences of a data set, rank the photos for each sentence and write a .neg.h5 file.

    If torch.distributed is initialised, or torchrun started the process, all ranks must call it and share the work.
    Called again with the same arguments, it continues an interrupted run, on any number of ranks.

    Args:
        dataset_path: a .ris.h5 file.
        model: the name of an open_clip model ("ViT-B-32"), or the path of an open_clip model config (.json). Several:
            their similarities are averaged.
        pretrained: a tag that open_clip can fetch ("laion2b_s34b_b79k"), or a local weights file (.pt, .pth, .bin,
            .safetensors), for each model. Only tensors are read from it.
        embeddings: a table of the same data set to take the embeddings from, instead of ``model`` and ``pretrained``.
        output: the table; an existing one is replaced only when the new one is complete.
        depth: photos kept per sentence, at most all but its own.
        exclusions: photos that a sentence does not get; None: only its own, and copies of it.
        batch_size: photos or sentences that the model sees at once.
        device: "cpu", "cuda", "cuda:1", ...; None: CUDA if there is a device, else the CPU.
        images: where the photos are, if not where they were when the data set file was made.
        approximate: search candidates with FAISS, for millions of photos.
        probes: how many of its lists are searched; None: a sixteenth of them.

    Raises:
        ValueError: an argument out of range, or arguments that conflict.
        NemoError: a model or its weights cannot be used, embeddings are not finite, the data set has fewer than two
            photos, a sentence has no text, or ranks differ or stopped.
        PhotoError: a photo is missing, cannot be decoded or has changed.
        FileFormatError: the data set cannot be read, the table cannot be written, the disk has no room for it, or an
            unfinished one was begun with other options.
    """
    depth = integer("depth", depth, least=1, most=MOST)
    batch_size = integer("batch_size", batch_size, least=1, most=LARGEST_BATCH)
    probes = None if probes is None else integer("probes", probes, least=1, most=MOST)
    models, weights = as_list(model), as_list(pretrained)
    if (embeddings is None) == (not models) or len(models) != len(weights):
        raise ValueError(
            f"model ({', '.join(models) or None}) and pretrained ({', '.join(weights) or None}) must be as many of "
            "each, or none where embeddings are given"
        )
    if probes is not None and not approximate:
        raise ValueError(f"probes ({probes}) must be left out unless the search is approximate")
    with joined_ranks() as ranks, ExitStack() as files:
        inputs = [dataset_path, *models, *weights, *as_list(embeddings), *(exclusions.photos_of if exclusions else ())]
        ranks.attempt(lambda: _check_output(Path(output), inputs) if ranks.rank == 0 else None)  # not hours later
        task = ranks.attempt(
            lambda: open_task(dataset_path, images, models, weights, embeddings, device, exclusions or Exclusions())
        )
        return _mine(
            task,
            ranks,
            files,
            output=Path(output),
            depth=depth,
            batch_size=batch_size,
            probes=(probes or 0) if approximate else None,
        )


def _check_output(output: Path, inputs: Sequence[str | Path]) -> None:
    check_inputs(output, inputs)
    if not output.absolute().parent.is_dir():
        raise cannot_write(output, "its folder does not exist")


def _mine(
    task: Task,
    ranks: Ranks,
    files: ExitStack,
    *,
    output: Path,
    depth: int,
    batch_size: int,
    probes: int | None,
) -> MiningReport:
    """See ``mine``. ``files`` keeps the table open; ``probes``: None for an exact search, 0 for the default number."""
    dataset, given = task.dataset, task.given
    sentences, photos = len(dataset.sentences.ref), len(dataset.images.id)
    widths = [clip.width for clip in task.clips] or [given.image_embedding.shape[1] if given else 0]
    method = "exact"
    if probes is not None:
        import_faiss()
        lists = list_count(photos)
        probes = min(probes or max(lists // 16, 1), lists)
        method = f"FAISS IVF{lists},SQ8, {probes} probes, re-ranked exactly"
    attributes = task.attributes(depth, batch_size, method)
    with_crops = task.excluded.crops_margin is not None
    stage_count = (3 if with_crops else 2) * len(widths) + 1
    ranks.agree(attributes, "began mining")
    table = begin_table(
        output,
        sentences=sentences,
        photos=photos,
        width=sum(widths),
        attributes=attributes,
        models=len(widths),
        recalls=0 if probes is None else len(recall_places(min(depth, photos - 1))),
        crops=with_crops,
    )
    made = ranks.attempt(lambda: files.enter_context(table) if ranks.rank == 0 else None)
    ranks.attempt(lambda: None if made is None else _check_progress(made, output, stage_count))
    progress_of = np.zeros(stage_count, np.int64) if made is None else np.array(made.file.progress)
    progress_of = ranks.from_first(progress_of)

    def record(stage: int, rows: int) -> None:
        if made is not None:
            made.sync()
            made.record("progress", stage, rows.to_bytes(8, "little"))

    if made is not None:
        write_excluded(made, task.excluded.never)
    found = _embeddings(task, made, sum(widths))
    stages, cut = _embed(task, ranks, found, progress_of, record, batch_size)

    start = time.monotonic()
    ranker = Ranker(
        found.text,
        found.image,
        dataset.refs.image[dataset.sentences.ref],
        depth=depth,
        ref=dataset.sentences.ref,
        excluded=task.excluded,
        crop_embedding=found.crop,
        device=task.device,
    )
    search: Ranker | ApproximateRanker = ranker
    if probes is not None:
        search = ApproximateRanker(ranker, found.text, found.image, probes=probes, ranks=ranks)
        recall = ranks.attempt(lambda: search.recall() if ranks.rank == 0 else None)
        if made is not None:
            made.writable("recall")[:] = recall
    _rank(ranker.blocks(begin=int(progress_of[-1])), search, made, ranks, partial(record, stage_count - 1))
    seconds_ranking = time.monotonic() - start

    def report(made: Unfinished[NegativeTable]) -> MiningReport:
        table = _finished(made)
        seconds_of = {what: sum(stage.seconds for stage in its) for what, its in stages.items()}
        of_photos, seconds = stages["photos"], seconds_of["photos"]
        return MiningReport(
            output=output,
            fingerprint=table.fingerprint,
            photos=photos,
            sentences=sentences,
            neighbors=table.neighbors.shape[1],
            device=task.device,
            ranks=ranks.size,
            seconds_photos=seconds,
            seconds_sentences=seconds_of["sentences"],
            seconds_crops=seconds_of["crops"],
            seconds_ranking=seconds_ranking,
            photos_per_s=sum(stage.rows for stage in of_photos) / seconds if seconds else 0.0,
            starved=sum(stage.starved for stage in of_photos) / seconds if seconds else 0.0,
            **_own_photos(dataset, table),
            short=int((table.neighbors[:, -1] < 0).sum()),
            empty=int((table.neighbors[:, 0] < 0).sum()),
            copies=0 if task.excluded.twins is None else int(have_twins(task.excluded.twins).sum()),
            near_identical=_near_identical(ranker, photos, task.excluded.similar_above),
            left_out=tuple(text for text in table.exclusions if text.startswith("photos of ")),
            cut=tuple(dict.fromkeys(cut)),
            recall=tuple((int(n), float(share)) for n, share in table.recall),
            advice=mining_advice(dataset, table),
        )

    reports = ranks.share(ranks.attempt(lambda: None if made is None else report(made)))
    assert reports[0] is not None
    return reports[0]


class _Embeddings(NamedTuple):
    """Vectors of unit length, float32 [S, D], [M, D] and [CROPS * M, D]; no crops where none are compared."""

    text: F32
    image: F32
    crop: F32


def _embeddings(task: Task, made: Unfinished[NegativeTable] | None, width: int) -> _Embeddings:
    """Arrays to fill, on rank 0 the table's own; given embeddings are copied into them."""
    photos, crops = len(task.dataset.images.id), task.excluded.crops_margin is not None
    rows = {"text_embedding": len(task.dataset.sentences.ref), "image_embedding": photos}
    rows["crop_embedding"] = CROPS * photos if crops else 0
    found = _Embeddings(
        *(
            np.zeros((count, width), np.float32) if made is None or not count else made.writable(name)
            for name, count in rows.items()
        )
    )
    if task.given is not None:
        for name, array in zip(rows, found, strict=True):
            array[:] = getattr(task.given, name)[: len(array)]
    return found


def _embed(
    task: Task,
    ranks: Ranks,
    embeddings: _Embeddings,
    progress_of: npt.NDArray[np.int64],
    record: Callable[[int, int], None],
    batch_size: int,
) -> tuple[dict[str, list[Stage]], list[str]]:
    """Fill the rest of the embeddings; return how it went by what was embedded, and sentences that were cut.

    Args:
        progress_of: rows done in each stage; ``NegativeTable.progress``.
        record: called on rank 0 with a stage and the rows done in it.
    """
    stages: dict[str, list[Stage]] = {"photos": [], "sentences": [], "crops": []}
    cut: list[str] = []
    if task.given is not None:
        for stage, array in enumerate((embeddings.image, embeddings.text, embeddings.crop)[: len(progress_of) - 1]):
            record(stage, len(array))
    threads, begin = thread_count(), 0
    for number, clip in enumerate(task.clips):
        columns = slice(begin, begin := begin + clip.width)
        options: dict[str, Any] = {"batch_size": batch_size, "num_threads": threads}
        said = ranks.attempt(partial(Sentences, clip, task.dataset.sentences.text, batch_size=batch_size))
        cut += said.cut
        kinds: list[tuple[str, int, Inputs, F32]] = [
            ("photos", 2 * number, Photos(clip, task.dataset, **options), embeddings.image),
            ("sentences", 2 * number + 1, said, embeddings.text),
        ]
        if len(embeddings.crop):
            crops = Crops(clip, task.dataset, **options)
            kinds.append(("crops", 2 * len(task.clips) + number, crops, embeddings.crop))
        for what, stage, inputs, whole in kinds:
            embedding = whole[:, columns]
            done = int(progress_of[stage])
            if done:
                embedding[:] = ranks.from_first(np.ascontiguousarray(embedding))
            stages[what].append(
                embed(
                    inputs,
                    clip,
                    embedding,
                    done=done,
                    batch_size=batch_size,
                    # The vectors of all models side by side are of unit length.
                    scale=1 / math.sqrt(len(task.clips)),
                    ranks=ranks,
                    record=partial(record, stage),
                    workers=threads if clip.device.type == "cpu" else 2,
                )
            )
    return stages, cut


def _own_photos(dataset: Dataset, table: NegativeTable) -> dict[str, Any]:
    """How well own photos rank, as fields of ``MiningReport``, for sentences with a target."""
    targeted = dataset.refs.empty[dataset.sentences.ref] == 0
    own_rank = table.own_rank[targeted] if targeted.any() else np.zeros(1)
    return {
        "no_target": int((~targeted).sum()),
        "median_rank": float(np.median(own_rank)),
        "recall_at_1": float((own_rank <= 1).mean()),
        "recall_at_10": float((own_rank <= 10).mean()),
    }


def _near_identical(ranker: Ranker, photos: int, excluded_above: float | None) -> tuple[int, int]:
    """How many photos the model cannot tell from another, and of how many; 0 and 0 where such photos are excluded."""
    if excluded_above is not None and excluded_above < NEAR_IDENTICAL:
        return 0, 0
    return ranker.near_identical(NEAR_IDENTICAL, most=max(COMPARED // photos, 1))


def _finished(made: Unfinished[NegativeTable]) -> NegativeTable:
    """The complete table, unless it has no candidate for any sentence."""
    if (made.file.neighbors[:, 0] < 0).all():
        raise NemoError(
            f"No sentence has a candidate: all photos are left out by the exclusions. Exclude less, and remove "
            f"{made.path}, or choose another place with -o."
        )
    return finish_table(made)


def _check_progress(made: Unfinished[NegativeTable], output: Path, stages: int) -> None:
    """Refuse another number of stages: several models have more than the table that their embeddings come from."""
    if (found := len(made.file.progress)) != stages:
        why = f"it was begun {'with' if found < stages else 'without'} --embeddings"
        raise cannot_write(output, why, "Continue as it was begun, or choose another place with -o.")


def _rank(
    blocks: list[tuple[int, int]],
    search: "Ranker | ApproximateRanker",
    made: Unfinished[NegativeTable] | None,
    ranks: Ranks,
    record: Callable[[int], None],
) -> None:
    """Rank blocks of sentences, in rounds of one block on every rank, into the table on rank 0."""
    rounds: Iterable[int] = range(0, len(blocks), ranks.size)
    if made is not None:
        arrays = [made.writable(name) for name in ("neighbors", "similarity", "own_rank")]
        rounds = progress(rounds, total=len(range(0, len(blocks), ranks.size)), what="ranking photos", unit="round")
    synced = time.monotonic()
    for first in rounds:
        together = blocks[first : first + ranks.size]
        rows = max(end - begin for begin, end in together)
        # A rank without a block in the last round ranks the first one's again: all must send as much.
        mine = together[ranks.rank if ranks.rank < len(together) else 0]
        block = ranks.attempt(partial(search.rank, *mine))
        every = [ranks.to_first(_filled(array, rows)) for array in block[1:]]
        if made is None:
            continue
        for rank, (begin, end) in enumerate(together):
            for array, given in zip(arrays, every, strict=True):
                assert given is not None
                array[begin:end] = given[rank, : end - begin]
        if time.monotonic() - synced > SYNC_INTERVAL_S or together[-1] == blocks[-1]:
            record(together[-1][1])
            synced = time.monotonic()


def _filled(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """The array with this many rows; those after its own are zero."""
    filled = np.zeros((rows, *array.shape[1:]), array.dtype)
    filled[: len(array)] = array
    return filled
