"""The contact sheet: samples as a loader delivers them, the target outlined, the negatives with their similarities."""

import io
import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from nemo_dali._checks import integer
from nemo_dali.data.dataset import Dataset
from nemo_dali.io.output import check_inputs, check_place, write_bytes
from nemo_dali.io.terminal import printable
from nemo_dali.kernels.plan.pools import pools
from nemo_dali.kernels.plan.rows import KINDS, MINED, SINGLE
from nemo_dali.mining.table import NegativeTable
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.plan.policy import Difficulty, MosaicPolicy

logger = logging.getLogger("nemo_dali")

RGB = tuple[int, int, int]
U8 = npt.NDArray[np.uint8]

PANEL = 360  # pixels of a sample on the sheet, at most
GAP = 22
CAPTION = 58  # height below a panel: two lines
TITLE = 44
INK, FAINT, PAPER = (34, 36, 42), (112, 116, 126), (252, 252, 250)
TARGET: RGB = (255, 40, 150)  # a colour that photos rarely have
OUTLINE: tuple[tuple[int, RGB], ...] = ((3, (20, 20, 24)), (2, TARGET))  # outer radius in pixels and colour
TINT = 0.1
MOST_SAMPLES = 1000  # on a sheet, which is then 105,000 pixels high
SHEET = "a sheet of nemo-dali's"
SOFTWARE = "nemo-dali preview"  # a text of the PNG's, in front of its pixels
KIND_COLOURS: dict[str, RGB] = {"mined": (196, 92, 20), "random": (52, 104, 178), "single": (104, 108, 116)}
NO_TARGET: RGB = (98, 62, 160)
OUTSIDE: RGB = (190, 24, 36)


@dataclass(frozen=True, eq=False)
class Cell:
    """One photo in a sample; the box is x0, y0, x1, y1 in pixels of the frame, the last two exclusive."""

    box: tuple[int, int, int, int]
    similarity: float | None = None  # to the expression; None for the target's photo, or if the table does not have it
    outside: bool = False  # a mined negative that the policy would not draw if it had enough others


@dataclass(frozen=True, eq=False)
class Sample:
    """What one panel shows: uint8 image [3, S, S], uint8 mask [S, S] in {0, 1}, and what is written to it."""

    image: U8
    mask: U8
    sentence: str
    kind: str  # "mined", "random" or "single"
    cells: tuple[Cell, ...] = ()
    no_target: bool = False  # nothing in the photo fits the expression, so the mask is empty


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

    Samples without a target are marked, and negatives outside the policy's bound and first K, which fill short pools.

    Args:
        dataset: a .ris.h5 file.
        table: its .neg.h5 file.
        count: samples to draw, 1 to ``MOST_SAMPLES``.
        output: the .png file; an earlier sheet is replaced when the new one is complete, anything else is not.
        seed: the loader's seed: other samples.
        images: where the photos are, if not where they were when the data set file was made.
        policy: one, or the file of one; None: mostly mined mosaics, some random and single ones, 3x3 besides 2x2 where
            there are enough photos.
        size: height and width of a frame in pixels.
        epoch: counted from 0. A policy may change with it, and what is drawn is drawn anew in each.

    Returns:
        How many of the samples have negatives outside the policy.

    Raises:
        ValueError: ``count``, ``seed`` or ``epoch`` is out of range, or ``output`` is no .png.
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
    """Mosaics above all, as far as there are photos to fill them."""
    if photos < 4:
        return MosaicPolicy(p_mined=0)
    return MosaicPolicy(p_mined=0.8, p_random=0.16, grids={2: 0.7, 3: 0.3} if photos >= 9 else {2: 1.0})


def _tell_epochs_that_mine(policy: MosaicPolicy, epoch: int) -> None:
    """Say which epoch to look at, where the one drawn has no mined mosaics and others have."""
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


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_sheet(samples: Sequence[Sample], *, title: str = "") -> Image.Image:
    """Draw samples in rows of at most four, RGB; panels keep the frame's size up to ``PANEL`` pixels."""
    side = min(PANEL, samples[0].mask.shape[0])
    columns = min(len(samples), 4 if len(samples) != 6 and len(samples) != 9 else 3)
    rows = -(-len(samples) // columns)
    width, height = GAP + columns * (side + GAP), TITLE + rows * (side + CAPTION) + GAP // 2
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, TITLE / 2), _fit(title, _font(14), [width - 2 * GAP])[0], FAINT, _font(14), anchor="lm")
    for i, sample in enumerate(samples):
        x, y = GAP + i % columns * (side + GAP), TITLE + i // columns * (side + CAPTION)
        sheet.paste(draw_panel(sample, side), (x, y))
        tag_width = _tag(draw, (x, y + side + 8), sample.kind, KIND_COLOURS[sample.kind])
        if sample.no_target:
            tag_width += 4 + _tag(draw, (x + tag_width + 4, y + side + 8), "no target", NO_TARGET)
        first, *more = _fit(sample.sentence, _font(16), [side - tag_width - 8, side])
        draw.text((x + tag_width + 8, y + side + 17), first, INK, _font(16), anchor="lm")
        for line in more:
            draw.text((x, y + side + 38), line, INK, _font(16), anchor="lm")
    return sheet


def draw_panel(sample: Sample, side: int) -> Image.Image:
    """One sample, RGB ``side`` x ``side``: cells divided, the target outlined and lightly tinted, similarities told."""
    frame = sample.mask.shape[0]
    mask = Image.fromarray(sample.mask * np.uint8(255))
    panel = Image.fromarray(np.ascontiguousarray(sample.image.transpose(1, 2, 0)))
    if side != frame:
        panel = panel.resize((side, side), Image.Resampling.LANCZOS)
        mask = mask.resize((side, side), Image.Resampling.BILINEAR)
    boxes = [tuple(round(edge * side / frame) for edge in cell.box) for cell in sample.cells]
    draw = ImageDraw.Draw(panel)
    for x0, y0, x1, y1 in boxes:
        if x0 > 0:
            draw.line((x0, y0, x0, y1), PAPER, 2)
        if y0 > 0:
            draw.line((x0, y0, x1, y0), PAPER, 2)
    outline(panel, mask)
    for cell, (x0, y0, _x1, _y1) in zip(sample.cells, boxes, strict=True):
        label = "" if cell.similarity is None else f"{round(cell.similarity, 2) + 0.0:.2f}"
        if cell.outside:
            label = f"{label} outside" if label else "not ranked"
        if label:
            _tag(draw, (x0 + 7, y0 + 7), label, OUTSIDE if cell.outside else (24, 26, 30))
    return panel


def outline(photo: Image.Image, mask: Image.Image) -> None:
    """Outline what a mask (L, 0 or 255) covers on a photo (RGB, as large), and tint it lightly."""
    inside = np.asarray(mask)
    for radius, colour in OUTLINE:
        photo.paste(colour, (0, 0), Image.fromarray(np.minimum(_grown(inside, radius), 255 - inside)))
    photo.paste(TARGET, (0, 0), mask.point([round(TINT * value) for value in range(256)]))


def _grown(mask: U8, radius: int) -> U8:
    """The mask and everything as near to it as ``radius`` pixels, uint8 [H, W]."""
    padded = np.pad(mask, radius)
    height, width = mask.shape
    shifts = range(2 * radius + 1)
    near = [(y, x) for y in shifts for x in shifts if (y - radius) ** 2 + (x - radius) ** 2 <= radius**2]
    grown: U8 = np.maximum.reduce([padded[y : y + height, x : x + width] for y, x in near])
    return grown


def _tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: RGB) -> int:
    """A label in white on a rounded field whose upper left corner is ``at``; its width."""
    font = _font(12)
    width = round(font.getlength(text)) + 12
    x, y = at
    draw.rounded_rectangle((x, y, x + width - 1, y + 17), 4, colour)
    draw.text((x + width / 2, y + 9), text, (255, 255, 255), font, anchor="mm")
    return width


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fit(text: str, font: Any, widths: Sequence[int]) -> list[str]:
    """Break a text into lines of at most these widths in pixels, between words if possible; "…" where it is cut."""
    rest = printable(" ".join(text[:1000].split()))
    lines: list[str] = []
    for width in widths:
        if font.getlength(rest) <= width:
            return [*lines, rest]
        dots = "…" if len(lines) == len(widths) - 1 else ""
        lengths = range(1, len(rest) + 1)
        end = max(1, bisect_right(lengths, width, key=lambda n: font.getlength(rest[:n] + dots)))
        if (space := rest.rfind(" ", 1, end + 1)) > 0:
            end = space
        lines.append(rest[:end] + dots)
        rest = rest[end:].lstrip()
    return lines
