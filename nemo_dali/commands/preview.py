"""``nemo-dali preview``: a contact sheet that shows the negatives' similarities to the expressions."""

import io
import logging
import math
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nemo_dali._checks import integer
from nemo_dali.data.dataset import Dataset
from nemo_dali.io.output import check_inputs, check_place, write_bytes
from nemo_dali.kernels.plan.pools import pools
from nemo_dali.kernels.plan.rows import KINDS, MINED, SINGLE
from nemo_dali.loader.contact_sheet import Cell, Sample, draw_sheet
from nemo_dali.mining.table import NegativeTable
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.plan.policy import Difficulty, MosaicPolicy

logger = logging.getLogger("nemo_dali")

MOST_SAMPLES = 1000  # on a sheet, which is then 105,000 pixels high
SHEET = "a sheet of nemo-dali's"
SOFTWARE = "nemo-dali preview"  # a text chunk of the PNG, before its pixels


def preview(
    dataset: str | Path,
    table: str | Path,
    *,
    output: str | Path,
    count: int = 12,
    seed: int = 0,
    images: str | Path | None = None,
    policy: MosaicPolicy | str | Path | None = None,
    size: int = 480,
    epoch: int = 0,
) -> int:
    """Draw the first ``count`` samples of an epoch of a Loader as a PNG.

    Samples without a target are marked, as are negatives outside the policy's bound and first K, which fill up short
    pools.

    Args:
        dataset: a .ris.h5 file.
        table: its .neg.h5 file.
        count: samples to draw, 1 to ``MOST_SAMPLES``.
        output: the .png file; an earlier sheet is replaced when the new one is complete, anything else is not.
        seed: the loader's seed; a different one gives other samples.
        images: where the photos are, if not where they were when the data set file was made.
        policy: a policy or a policy file; None: mostly mined mosaics, some random mosaics and single photos, 3x3 as
            well as 2x2 if there are enough photos.
        size: height and width of a frame in pixels.
        epoch: counted from 0. A policy may change with it, and each epoch draws anew.

    Returns:
        How many of the samples have negatives outside the policy.

    Raises:
        ValueError: ``count``, ``seed`` or ``epoch`` is out of range, or ``output`` is not a .png.
        NemoError: a file cannot be read or written.
    """
    from nemo_dali.loader.loader import Loader

    output = Path(output)
    count = integer("count", count, least=1, most=MOST_SAMPLES)
    if output.suffix.lower() != ".png":
        raise ValueError(f"output ({output}) must end in .png")
    check_inputs(output, (dataset, table))
    check_place(output, is_ours=_is_sheet, kind=SHEET)
    opened, negatives = Dataset.open(dataset, images=images), NegativeTable.open(table)
    loader = Loader(
        dataset,
        table,
        batch_size=min(count, 4),
        policy=policy or _telling_policy(len(opened.images.id)),
        seed=seed,
        size=size,
        dtype="uint8",
        images=images,
        drop_last=False,
    )
    policy = loader.policy
    samples: list[Sample] = []
    try:
        loader.set_epoch(epoch)
        while len(samples) < count:
            difficulty = policy.difficulty(loader.epoch)
            for batch in loader:
                samples += _samples(batch, negatives, difficulty, size)
                if len(samples) >= count:
                    break
    finally:
        loader.close()
    _tell_epochs_that_mine(policy, epoch)
    difficulty = policy.difficulty(epoch)
    tau = "no bound" if difficulty.max_similarity is None else f"similarity at most {difficulty.max_similarity:g}"
    samples = samples[:count]
    outside = sum(any(cell.outside for cell in sample.cells) for sample in samples)
    title = (
        f"{opened.name} · {len(opened.images.id):,} photos · negatives: the first {difficulty.top_k} of "
        f"{Path(negatives.model).name}, {tau}; the numbers are their similarities to the expression"
    )
    if epoch or policy.breakpoints != [0]:
        title = f"epoch {epoch} · {title}"
    if outside:
        title = f"red: outside the policy, which leaves too few · {title}"
    _write(draw_sheet(samples, title=title), output)
    return outside


def _telling_policy(photos: int) -> MosaicPolicy:
    """Mostly mosaics, if there are enough photos to fill them."""
    if photos < 4:
        return MosaicPolicy(p_mined=0)
    return MosaicPolicy(p_mined=0.8, p_random=0.16, grids={2: 0.7, 3: 0.3} if photos >= 9 else {2: 1.0})


def _tell_epochs_that_mine(policy: MosaicPolicy, epoch: int) -> None:
    """Say which epoch to look at, if the one drawn has no mined mosaics and others do."""
    most = max(policy.turns, key=lambda other: policy.difficulty(other).p_mined)
    if policy.mines and not policy.difficulty(epoch).p_mined:
        logger.warning(
            "This policy has no mined mosaics in epoch %d. Choose another with --epoch: epoch %d has the most.",
            epoch,
            most,
        )


def _samples(batch: Any, negatives: NegativeTable, difficulty: Difficulty, size: int) -> list[Sample]:
    tiles, owner, photos = lay_out(batch.plan, size)
    samples = []
    for i, (row, sentence, empty) in enumerate(zip(batch.plan, batch.sentences, batch.empty.tolist(), strict=True)):
        target = row["images"][row["cell"]]
        negatives.check_rows(row["sentence"][None])
        neighbors, similarity = negatives.neighbors[row["sentence"]], negatives.similarity[row["sentence"]]
        ranked = dict(zip(neighbors.tolist(), similarity.tolist(), strict=True))
        inside = None
        if row["kind"] == MINED:
            (begin,), (end,) = pools(similarity[None], _tau(difficulty, no_target=empty), difficulty.top_k)
            inside = set(neighbors[begin:end].tolist())
        cells = tuple(
            Cell(
                box=(int(tile["x0"]), int(tile["y0"]), int(tile["x1"]), int(tile["y1"])),
                similarity=None if photo == target else ranked.get(int(photo)),
                outside=inside is not None and photo != target and int(photo) not in inside,
            )
            for tile, photo in zip(tiles[owner == i], photos[owner == i], strict=True)
        )
        kind = KINDS[row["kind"]]
        cells = () if row["kind"] == SINGLE else cells
        samples.append(Sample(batch.image[i].numpy(), batch.mask[i].numpy(), sentence, kind, cells, empty))
    return samples


def _tau(difficulty: Difficulty, *, no_target: bool) -> float:
    """The bound for an expression."""
    tau = difficulty.max_similarity
    if no_target and difficulty.max_similarity_no_target is not None:
        tau = difficulty.max_similarity_no_target
    return math.inf if tau is None else tau


def _write(sheet: Image.Image, output: Path) -> None:
    encoded, made_by = io.BytesIO(), PngInfo()
    made_by.add_text("Software", SOFTWARE)
    sheet.save(encoded, "PNG", optimize=True, pnginfo=made_by)
    write_bytes(output, encoded.getvalue(), is_ours=_is_sheet, kind=SHEET)


def _is_sheet(head: bytes) -> bool:
    return head.startswith(b"\x89PNG\r\n\x1a\n") and f"tEXtSoftware\0{SOFTWARE}".encode() in head
