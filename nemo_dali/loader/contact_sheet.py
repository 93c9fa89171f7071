"""The contact sheet: samples as a loader delivers them, the target outlined, mosaics divided into their cells."""

import base64
import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from nemo_dali.errors import NemoError
from nemo_dali.io.terminal import printable

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
SHOWN_NEXT = 4  # samples, of a loader in a notebook
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
    """What one panel shows: uint8 image [3, S, S], uint8 mask [S, S] in {0, 1}, and what is written on it."""

    image: U8
    mask: U8
    sentence: str
    kind: str  # "mined", "random" or "single"
    cells: tuple[Cell, ...] = ()
    no_target: bool = False  # nothing in the photo fits the expression, so the mask is empty


class Previewed(Protocol):
    """A Loader."""

    def next_samples(self, count: int) -> list[Sample]: ...


def preview(loader: Previewed, count: int = 12) -> Image.Image:
    """Draw the samples that a Loader's next steps deliver; ``nemo-dali preview`` draws those of files, to a file.

    Nothing is taken from a pass that is under way: it delivers what it would have delivered.

    Args:
        loader: a ``Loader``.
        count: samples to draw, >= 1; their panels have 360 x 360 pixels, or the frame's size if that is smaller.

    Returns:
        A PIL image, RGB.

    Raises:
        ValueError: ``count`` < 1.
        NemoError: a batch cannot be made, or another thread is taking one.
    """
    return draw_sheet(loader.next_samples(count))


def html_of(title: str, facts: Mapping[str, str], samples: Sequence[Sample], *, more: str = "") -> str:
    """What a notebook shows of a batch or a loader: facts, and a sheet of samples if there are any."""
    lines = "".join(f"<br>{escape(name)}: {escape(value)}" for name, value in facts.items())
    if more:
        lines += f"<br>{escape(more)}"
    sheet = ""
    if samples:
        encoded = io.BytesIO()
        draw_sheet(samples).save(encoded, "JPEG", quality=88)
        said = escape("; ".join(printable(sample.sentence) for sample in samples), quote=True)
        sheet = (
            f'<br><img style="max-width: 100%" alt="{said}" '
            f'src="data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}">'
        )
    return f"<div><b>{escape(title)}</b>{lines}{sheet}</div>"


def html_of_loader(loader: Any) -> str:
    """What a notebook shows of a Loader: what it delivers, and its next samples or why it cannot make them."""
    difficulty = loader.policy.difficulty(loader.epoch)._asdict()
    facts = {
        "data": ", ".join(dataset.name for dataset in loader.corpus.datasets),
        "an epoch": f"{len(loader.dataset):,} samples, {len(loader):,} steps of {loader.batch_size} on this rank",
        "frames": f"{loader.size} x {loader.size}, {loader.dtype}",
        "made": f"{loader.mode}, on {'the CPU' if loader.device_id is None else f'GPU {loader.device_id}'}",
        f"policy in epoch {loader.epoch}": ", ".join(f"{name} {value}" for name, value in difficulty.items()),
    }
    try:
        return html_of("Loader", facts, loader.next_samples(SHOWN_NEXT))
    except NemoError as error:
        return html_of("Loader", facts, (), more=str(error))


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
    """One sample, RGB ``side`` x ``side``: cells divided, the target outlined and lightly tinted, with similarities."""
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
    """Outline what a mask (L, 255 inside) covers on a photo (RGB, of the same size), and tint it lightly."""
    inside = np.asarray(mask)
    for radius, colour in OUTLINE:
        photo.paste(colour, (0, 0), Image.fromarray(np.minimum(_grown(inside, radius), 255 - inside)))
    photo.paste(TARGET, (0, 0), mask.point([round(TINT * value) for value in range(256)]))


def _grown(mask: U8, radius: int) -> U8:
    """The mask and everything within ``radius`` pixels of it, uint8 [H, W]."""
    padded = np.pad(mask, radius)
    height, width = mask.shape
    shifts = range(2 * radius + 1)
    near = [(y, x) for y in shifts for x in shifts if (y - radius) ** 2 + (x - radius) ** 2 <= radius**2]
    grown: U8 = np.maximum.reduce([padded[y : y + height, x : x + width] for y, x in near])
    return grown


def _tag(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: RGB) -> int:
    """Draw a label in white on a rounded field whose upper left corner is ``at``; returns its width."""
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
