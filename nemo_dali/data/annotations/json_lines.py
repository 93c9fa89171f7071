"""Your own data as JSON lines ▸ columns in memory.

A line is a ref: a photo, what is said about it, and the mask. ``docs/datasets.md`` describes the keys,
``nemo_dali/json_lines.schema.json`` is their JSON Schema.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import PathLike, one_of
from nemo_dali._choices import Exif
from nemo_dali.data.annotations._boxes import FORMATS, Box, check_format, outline, stated_format
from nemo_dali.data.annotations._untrusted import (
    EmptyTexts,
    RunBudget,
    checked,
    field,
    named,
    no_split,
    photo_name,
    photo_size,
    read_bytes,
)
from nemo_dali.data.columns import Annotations, PhotoRecord, RefRecord, in_columns
from nemo_dali.data.orientation import turned_size
from nemo_dali.data.photo_folders import locate
from nemo_dali.data.photos import Header, read_header, refused_orientations
from nemo_dali.data.rle import area, run_lengths
from nemo_dali.errors import AnnotationError
from nemo_dali.io.progress import progress

KEYS = frozenset(
    {
        *("photo", "width", "height", "expressions", "mask", "box", "box_format", "no_target", "split"),
        *("category", "photo_categories", "source", "distractors", "ref_id", "ann_id", "image_id"),
    }
)
TYPES = {"ref_id": int, "ann_id": int, "image_id": int, "source": str, "distractors": int, "no_target": bool}
DEFAULT_SPLIT = "train"


class _Line(NamedTuple):
    """A line of the file, whose types have been checked; its masks and sizes have not."""

    where: str
    record: dict[str, Any]
    photo: str
    expressions: list[str]
    split: str
    categories: set[str]  # of objects in the photo


def read_json_lines(
    path: str | Path,
    *,
    images: PathLike | Sequence[PathLike],
    split: str = DEFAULT_SPLIT,
    skip_empty: bool = False,
    box_format: str | None = None,
    exif: Exif = "refuse",
) -> Annotations:
    """Read one split of a file of JSON lines.

    Every line is checked, whatever its split, so that ids do not depend on the split.

    Args:
        path: UTF-8; blank lines are skipped.
        images: the folder, folders or address s3://bucket/prefix that photos are relative to; see ``locate``. The sizes
            of those without ``width`` and ``height`` are read from there.
        split: lines with this ``split`` are read; a line without one belongs to ``train``.
        skip_empty: skip expressions without text, and lines without any, instead of refusing them.
        box_format: what the boxes are: ``xywh`` or ``xyxy`` in pixels, ``rel_xywh`` or ``rel_xyxy`` in shares of the
            photo's width and height; None: as the lines say, else ``xywh``.
        exif: what is done about EXIF's orientations, as in ``read_annotations``.

    Raises:
        ValueError: there is no such ``box_format``.
        AnnotationError: a line cannot be used; the message gives its number.
        PhotoError: a photo whose size is needed cannot be read, or is turned by EXIF though none may be.
    """
    path = Path(path)
    if box_format is not None:
        one_of("box_format", box_format, FORMATS)
    empty = EmptyTexts(skip=skip_empty, remedy="Fix the line.")
    lines = _read_lines(path, empty)
    empty.report(path)
    stated = stated_format(((line.where, line.record) for line in lines), box_format)
    ref_ids = _ids(lines, "ref_id", [f"line {number}" for number in range(len(lines))])
    image_ids = _ids(lines, "image_id", [line.photo for line in lines])
    names = sorted(set[str]().union(*(line.categories for line in lines)))
    category_row = {name: row for row, name in enumerate(names)}
    first_sentence = np.cumsum([1] + [len(line.expressions) for line in lines]).tolist()
    chosen = [number for number, line in enumerate(lines) if line.split == split and line.expressions]
    if not chosen:
        raise no_split(path, split, [line.split for line in lines], "lines")
    sizes = _sizes([lines[number] for number in chosen], images, exif)
    boxes = [
        Box(line.where, line.record["box"], *sizes[line.photo])
        for line in (lines[number] for number in chosen)
        if "box" in line.record
    ]
    check_format(boxes, stated=stated)
    box_format = stated or FORMATS[0]
    refs, budget = [], RunBudget(path.stat().st_size)
    for number in progress(chosen, total=len(chosen), what="reading refs", unit="ref"):
        line = lines[number]
        category = line.record.get("category")
        refs.append(
            RefRecord(
                ref_id=ref_ids[number],
                image_id=image_ids[number],
                runs=_mask(line, *sizes[line.photo], budget, box_format),
                sentences=[(first_sentence[number] + i, text, text) for i, text in enumerate(line.expressions)],
                ann_id=line.record.get("ann_id", -1),
                category=-1 if category is None else category_row[category],
                source=line.record.get("source", ""),
                distractors=line.record.get("distractors", -1),
                no_target=int(line.record.get("no_target", -1)),
            )
        )
    columns = in_columns(
        f"{path.stem}-{split}",
        refs,
        {image_ids[number]: PhotoRecord(*sizes[lines[number].photo], lines[number].photo) for number in chosen},
        {(image_ids[number], category_row[name]) for number in chosen for name in lines[number].categories},
        {row + 1: name for row, name in enumerate(names)},
    )
    return replace(columns, box_format=box_format if boxes else "", exif=exif)


def _read_lines(path: Path, empty: EmptyTexts) -> list[_Line]:
    lines = []
    for number, text in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if text.strip():
            where = f"line {number} of {path}"
            try:
                record = json.loads(text.decode())
            except (ValueError, RecursionError) as error:
                raise AnnotationError(f"{where} is not valid JSON ({error}). Fix the line.") from error
            lines.append(_line(record, where, empty))
    if not lines:
        raise AnnotationError(f"{path} has no lines. Write one JSON object per ref.")
    return lines


def _line(record: Any, where: str, empty: EmptyTexts) -> _Line:
    photo = photo_name(record, "photo", where)
    unknown = sorted(set(record) - KEYS)
    if unknown:
        raise AnnotationError(f"{where} has the unknown key {unknown[0][:40]!r}. Known keys are {named(sorted(KEYS))}.")
    expressions = field(record, "expressions", list, where)
    for text in expressions:
        checked(text, str, f"an expression of {where}")
    expressions = [text for text in expressions if empty.has_text(text, f"an expression of {where}")]
    if not expressions:
        empty.skip_ref(where)
    if ("width" in record) != ("height" in record):
        raise AnnotationError(f"{where} has only one of 'width' and 'height'. Give both or neither.")
    for key, kind in TYPES.items():
        if key in record:
            field(record, key, kind, where)
    if not 0 <= record.get("distractors", 0) < 2**31:
        raise AnnotationError(
            f"'distractors' of {where} is not a number of objects. Fix the line, or leave it out where it is unknown."
        )
    given = [key for key in ("mask", "box") if key in record]
    if record.get("no_target", False):
        given.append("no_target")
    if len(given) != 1:
        raise AnnotationError(
            f"{where} has {' and '.join(map(repr, given)) or 'no mask'}. Give one of 'mask', 'box' and "
            "'\"no_target\": true'."
        )
    split = field(record, "split", str, where) if "split" in record else DEFAULT_SPLIT
    shown = field(record, "photo_categories", list, where) if "photo_categories" in record else []
    categories = {checked(name, str, f"a value in 'photo_categories' of {where}") for name in shown}
    if "category" in record:
        categories.add(field(record, "category", str, where))
    return _Line(where, record, photo, expressions, split, categories)


def _ids(lines: list[_Line], key: str, owners: list[str]) -> list[int]:
    """The id of each line: as given, or else numbered from 1; each owner has one id of its own."""
    given = [key in line.record for line in lines]
    if not any(given):
        number = {owner: i for i, owner in enumerate(dict.fromkeys(owners), 1)}
        return [number[owner] for owner in owners]
    if not all(given):
        where = lines[given.index(False)].where
        raise AnnotationError(f"{where} has no '{key}', but other lines have. Give all or none.")
    owner_of: dict[int, str] = {}
    id_of: dict[str, int] = {}
    for line, owner in zip(lines, owners, strict=True):
        value: int = line.record[key]
        if (first := id_of.setdefault(owner, value)) != value:
            raise AnnotationError(
                f"{line.where} has the '{key}' {value}, but an earlier line of the photo {first}. Fix one line."
            )
        if owner_of.setdefault(value, owner) != owner:
            other = "ref" if key == "ref_id" else "photo"
            raise AnnotationError(
                f"{line.where} gives '{key}' {value} to a different {other} than before. Fix one line."
            )
    return [line.record[key] for line in lines]


def _sizes(lines: list[_Line], images: PathLike | Sequence[PathLike], exif: Exif) -> dict[str, tuple[int, int]]:
    """Width and height of every photo, from the lines or else from its header.

    Raises:
        PhotoError: a header says that its photo is turned, though none may be. Its masks might not fit it.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for line in lines:
        if "width" in line.record:
            size = photo_size(line.record, line.where)
            if sizes.setdefault(line.photo, size) != size:
                raise AnnotationError(f"{line.where} gives its photo a different size than an earlier line. Fix one.")
    unknown = list(dict.fromkeys(line.photo for line in lines if line.photo not in sizes))
    headers = _headers(unknown, images)
    if exif == "refuse" and any(header.orientation > 1 for header in headers.values()):
        headers |= _headers(list(sizes), images)  # so that all are counted
        names = list(dict.fromkeys(line.photo for line in lines))
        if (refusal := refused_orientations(names, [headers[name].orientation for name in names])) is not None:
            raise refusal
    for name, (width, height, orientation) in headers.items():
        sizes[name] = turned_size(width, height, orientation if exif == "apply" else 1)
    return sizes


def _headers(photos: list[str], images: PathLike | Sequence[PathLike]) -> dict[str, Header]:
    if not photos:
        return {}
    root, names, _ = locate(images, photos)
    with ThreadPoolExecutor() as pool:  # reading waits for the disk
        found = pool.map(partial(read_header, root), names)
        headers = progress(found, total=len(names), what="reading photo headers", unit="photo")
        return dict(zip(photos, headers, strict=True))


def _mask(line: _Line, width: int, height: int, budget: RunBudget, box_format: str) -> npt.NDArray[np.uint32] | None:
    if line.record.get("no_target", False):
        return None
    try:
        segmentation = (
            line.record["mask"]
            if "mask" in line.record
            else [outline(line.record["box"], box_format, width=width, height=height)]
        )
        runs = run_lengths(segmentation, width=width, height=height)
    except ValueError as error:
        raise AnnotationError(f"The mask of {line.where} cannot be used: {error}. Fix the line.") from error
    budget.take(len(runs), line.where)
    if area(runs) == 0:
        raise AnnotationError(
            f"The mask of {line.where} has no pixel. If nothing fits the expressions, say '\"no_target\": true'."
        )
    return runs
