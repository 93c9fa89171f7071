"""Boxes of JSON lines: what their four numbers mean, and whether they can mean that.

A box read in the wrong format still gives a mask, of other pixels. One box does not show that; a file's boxes do.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import BoxFormat
from nemo_dali.data.annotations._untrusted import field
from nemo_dali.errors import AnnotationError

logger = logging.getLogger("nemo_dali")

FORMATS: tuple[str, ...] = get_args(BoxFormat)
NUMBERS = {"xywh": "[x, y, width, height]", "xyxy": "[x1, y1, x2, y2]"}
BORDER = 2  # pixels by which a box may extend beyond the photo without being doubted: rounding, padding
REL_BORDER = 0.01  # the same as a share of the photo
MOST_REL = 2  # values of a normalised box beyond this are pixels
DOUBTED = 0.05  # share of the boxes: more than that are not just slips in a few lines
SLIPS = 0.01  # share of the boxes: up to that many can misfit because of mistakes of their own


class Box(NamedTuple):
    """A line's box, as written there, and its photo's size in pixels."""

    where: str
    box: Any
    width: int
    height: int


def stated_format(lines: Iterable[tuple[str, dict[str, Any]]], option: str | None) -> str | None:
    """The format that the lines or the option state; None if neither does.

    Args:
        lines: all lines of the file, each with the words for where it is.
        option: one of FORMATS.

    Raises:
        AnnotationError: the format does not exist, or one line states another than the rest, or none.
    """
    said, first, silent = option, "the option --box-format", None
    for where, record in lines:
        if "box_format" in record:
            if (value := field(record, "box_format", str, where)) not in FORMATS:
                raise AnnotationError(f"'box_format' of {where} is none of {', '.join(FORMATS)}. Fix the line.")
            if said is None:
                said, first = value, where
            if value != said:
                raise AnnotationError(
                    f"{where} has the 'box_format' {value}, but {first} says {said}. All boxes of a file have the same."
                )
        elif "box" in record and silent is None:
            silent = where
    if option is None and said is not None and silent is not None:
        raise AnnotationError(f"{silent} has no 'box_format', but {first} has. Give it on every line with a box.")
    return said


def check_format(boxes: Sequence[Box], *, stated: str | None) -> None:
    """Doubt boxes that are taken for ``xywh`` or ``rel_xywh`` but, as a whole, look like another format.

    Boxes that fit more than one format prove nothing. A stated format is used, with a warning.

    Raises:
        AnnotationError: they look like another format, and nothing states theirs.
    """
    if stated not in (None, "xywh", "rel_xywh"):  # corners in the wrong order are reported with their line
        return
    sound = []
    for box in boxes:
        try:
            sound.append((box, _numbers(box.box, "xywh")))
        except ValueError:  # reported with its line, later
            continue
    if not sound:
        return
    rel = stated == "rel_xywh"
    if (doubt := _doubt([box for box, _ in sound], np.array([numbers for _, numbers in sound]), rel=rel)) is None:
        return
    count, first, what, formats = doubt
    sentence = f"{count:,} of {len(boxes):,} boxes {what}, the first in {first}."
    if stated is not None:
        logger.warning("%s They are read as %s, as stated.", sentence, stated)
        return
    raise AnnotationError(
        f"{sentence} State their format with --box-format {' or '.join(formats)} (or xywh, if they are right), or with "
        "'box_format' on every line with a box."
    )


def _doubt(
    boxes: Sequence[Box], numbers: npt.NDArray[np.float64], *, rel: bool
) -> tuple[int, str, str, list[str]] | None:
    """How many boxes look wrong, where the first is, how they look, and which formats they may have instead.

    Args:
        rel: they are said to be shares of the photo, not pixels.
    """
    few, ones = DOUBTED * len(boxes), np.ones((len(boxes), 2))
    small = (np.abs(numbers) <= 1 + REL_BORDER).all(axis=1)
    if not rel and small.sum() > few:
        outside, misfit = _readings(numbers[small], ones[small], REL_BORDER)
        corners = misfit.mean() <= SLIPS
        formats = ["rel_xyxy"] if corners and outside.any() else ["rel_xywh", "rel_xyxy"] if corners else ["rel_xywh"]
        what = "have no value above 1, as if they were shares of the photo's width and height"
        return int(small.sum()), boxes[int(small.argmax())].where, what, formats
    sizes = ones if rel else np.array([(box.width, box.height) for box in boxes], np.float64)
    outside, misfit = _readings(numbers, sizes, REL_BORDER if rel else BORDER)
    if outside.sum() > few and misfit.mean() <= SLIPS:
        what = f"extend beyond their photo as {NUMBERS['xywh']}, but fit as {NUMBERS['xyxy']}"
        return int(outside.sum()), boxes[int(outside.argmax())].where, what, ["xyxy"]
    return None


def _readings(
    numbers: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], border: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which boxes extend beyond their photo as xywh, and which do not fit it as xyxy; bool [boxes] each."""
    x, y, far_x, far_y = numbers.T
    width, height = (sizes + border).T
    before = (x < -border) | (y < -border)
    with np.errstate(over="ignore", invalid="ignore"):  # of infinite numbers, which are reported with their line
        outside = before | (x + far_x > width) | (y + far_y > height)
    return outside, before | ~((x < far_x) & (y < far_y) & (far_x <= width) & (far_y <= height))


def outline(box: Any, box_format: str, *, width: int, height: int) -> list[float]:
    """The polygon of a box in a photo of this size, in pixels, as COCO has it.

    Raises:
        ValueError: it is not a box of that format.
    """
    kind = box_format.removeprefix("rel_")
    left, top, right, bottom = _numbers(box, kind)
    if box_format != kind:
        if not max(map(abs, (left, top, right, bottom))) <= MOST_REL:
            raise ValueError(f"the box has values far above 1, but is said to be {box_format}")
        left, top, right, bottom = left * width, top * height, right * width, bottom * height
    if kind == "xyxy":
        if not (right > left and bottom > top):  # false for NaN too
            raise ValueError(
                f"the box's second corner is not to the right of the first and below it, as {box_format} requires"
            )
    else:
        if not (right > 0 and bottom > 0):
            raise ValueError("the box has no width or height")
        right, bottom = left + right, top + bottom
    return [left, top, left, bottom, right, bottom, right, top]


def _numbers(box: Any, kind: str) -> list[float]:
    try:
        if type(box) is list and len(box) == 4 and all(type(value) in (int, float) for value in box):
            return [float(value) for value in box]
    except OverflowError:
        pass
    raise ValueError(f"the box is not {NUMBERS[kind]}")
