"""Annotation files of referring image segmentation ▸ columns in memory.

RefCOCO, RefCOCO+ and RefCOCOg share the layout of REFER: ``<root>/<dataset>/refs(<split_by>).p``, a pickled list of
refs, beside ``<root>/<dataset>/instances.json``, COCO's photos, annotations and categories. Neither file is trusted.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import AnnotationError
from nemo_dali.progress import progress
from nemo_dali.runlength import run_lengths
from nemo_dali.unpickle import unpickle_builtins

MAX_FILE_BYTES = 4 << 30  # the largest published annotation file has under 0.5 GB
MAX_SIDE = 65535  # of a photo, in pixels: the most a JPEG can have; an area then fits a uint32


@dataclass(frozen=True, eq=False)
class Images:
    """Photos, one row each; ``category_begin`` and ``category_count`` give a photo's range in ``image_categories``."""

    id: npt.NDArray[np.int64]
    width: npt.NDArray[np.int32]  # pixels as stored, EXIF rotation ignored
    height: npt.NDArray[np.int32]
    file_name: Sequence[str]  # relative to the image root, with forward slashes
    category_begin: npt.NDArray[np.int64]
    category_count: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Refs:
    """Refs (an object of a photo that expressions refer to), one row each; -1 where something is unknown."""

    ref_id: npt.NDArray[np.int64]
    ann_id: npt.NDArray[np.int64]
    image: npt.NDArray[np.int32]  # row in Images
    category: npt.NDArray[np.int32]  # row in the categories
    sentence_begin: npt.NDArray[np.int64]  # rows in Sentences
    sentence_count: npt.NDArray[np.int32]
    rle_begin: npt.NDArray[np.int64]  # range in rle_counts
    rle_count: npt.NDArray[np.int32]
    empty: npt.NDArray[np.uint8]  # 1: nothing in the photo fits the expressions
    source: Sequence[str]  # where the ref came from, "" if the files do not say
    distractors: npt.NDArray[np.int32]  # similar objects in the photo, where that was recorded


@dataclass(frozen=True, eq=False)
class Sentences:
    """Referring expressions, one row each, those of a ref side by side."""

    sent_id: npt.NDArray[np.int64]
    ref: npt.NDArray[np.int32]  # row in Refs
    text: Sequence[str]  # cleaned by the publisher: REFER's 'sent'
    raw: Sequence[str]  # as the annotator typed it


@dataclass(frozen=True, eq=False)
class Annotations:
    """One split of one data set. Photos are those with at least one ref in the split, by ascending id.

    Masks are COCO's run lengths: down the columns, beginning with a (possibly empty) run of background.
    """

    name: str
    images: Images
    refs: Refs
    sentences: Sentences
    image_categories: npt.NDArray[np.int32]  # distinct rows in the categories, photo after photo
    category_id: npt.NDArray[np.int64]
    category_name: Sequence[str]
    rle_counts: npt.NDArray[np.uint32]


def read_refer(root: str | Path, *, dataset: str, split_by: str, split: str) -> Annotations:
    """Read one split of RefCOCO, RefCOCO+ or RefCOCOg from files in REFER's layout.

    Splits are matched as REFER does: ``testA``, ``testB`` and ``testC`` by the last letter, so that a ref of ``testAB``
    is in both; ``test`` takes every split with that in its name; any other name must be equal.

    Args:
        root: the folder that holds ``<dataset>/refs(<split_by>).p`` and ``<dataset>/instances.json``.
        dataset: ``refcoco``, ``refcoco+`` or ``refcocog``, or another folder in that layout.
        split_by: ``unc``, ``umd`` or ``google``.
        split: ``train``, ``val``, ``test``, ``testA`` or ``testB``.

    Raises:
        AnnotationError: a file is missing, malformed or hostile, the split does not exist, or refs, annotations and
            photos do not fit together.
    """
    folder = Path(root) / dataset
    refs_path, instances_path = folder / f"refs({split_by}).p", folder / "instances.json"
    if not folder.is_dir():
        found = sorted(path.parent.name for path in Path(root).glob("*/instances.json"))
        raise AnnotationError(f"{folder} does not exist; data sets in {root}: {_listed(found)}. Choose with --dataset.")
    if not refs_path.is_file():
        found = sorted(path.name for path in folder.glob("refs(*).p"))
        raise AnnotationError(
            f"{refs_path} does not exist; files of refs in {folder}: {_listed(found)}. Choose with --split-by."
        )
    refs = _select_split(_read_refs(refs_path), split, refs_path)
    return _columns(refs, refs_path, _read_instances(instances_path), name=f"{dataset}-{split_by}-{split}")


def begins(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Where each range begins when ranges of these lengths lie side by side."""
    return np.cumsum(counts, dtype=np.int64) - counts


def is_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative path: no root, no drive, no step up, no backslash, no control character."""
    return (
        re.match(r"[A-Za-z]:|.*[\x00-\x1f\\]", name, re.DOTALL) is None
        and not {"", ".", ".."} & set(name.split("/"))
        and _storable(name)
    )


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instances:
    """The records of instances.json by their ids."""

    path: Path
    photos: dict[int, Any]
    annotations: dict[int, Any]
    categories: dict[int, Any]


def _read_instances(path: Path) -> _Instances:
    try:
        content = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not valid JSON ({error}). Get the file again.") from error
    tables = []
    for key, what in (("images", "photo"), ("annotations", "annotation"), ("categories", "category")):
        table: dict[int, Any] = {}
        for number, record in enumerate(_field(content, key, list, str(path))):
            record_id = _field(record, "id", int, f"{what} number {number} of {path}")
            if record_id in table:
                raise AnnotationError(f"{path} describes {what} {record_id} twice. Get the file again.")
            table[record_id] = record
        tables.append(table)
    return _Instances(path, *tables)


def _read_refs(path: Path) -> list[Any]:
    refs = unpickle_builtins(_read_bytes(path), path)
    if not isinstance(refs, list):
        raise AnnotationError(f"{path} holds a {type(refs).__name__}, not a list of refs. Get the file again.")
    return refs


def _read_bytes(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise AnnotationError(f"{path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read. Check the file.")
        return path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror}. Check the folder given.") from error


def _select_split(refs: list[Any], split: str, path: Path) -> list[Any]:
    names = [_field(ref, "split", str, f"ref number {number} of {path}") for number, ref in enumerate(refs)]
    if split in ("testA", "testB", "testC"):
        chosen = [ref for ref, name in zip(refs, names, strict=True) if split[-1] in name]
    elif split == "test":
        chosen = [ref for ref, name in zip(refs, names, strict=True) if split in name]
    else:
        chosen = [ref for ref, name in zip(refs, names, strict=True) if split == name]
    if not chosen:
        found = [f"{name} ({count} refs)" for name, count in sorted(Counter(names).items())]
        raise AnnotationError(f"{path} has no split '{split}'; it has {_listed(found)}. Choose with --split.")
    return chosen


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


# --- records ---------------------------------------------------------------------------------------------------------


def _field(record: Any, key: str, kind: type, where: str) -> Any:
    """Return ``record[key]``, which must be exactly of ``kind``; an int must fit 64 bits, a str must be storable.

    Values are never printed: the ``repr`` of a hostile one may be endless.
    """
    if type(record) is not dict:
        raise AnnotationError(f"{where} is a {type(record).__name__}, not a record of named values. Check the file.")
    if key not in record:
        raise AnnotationError(f"{where} has no '{key}'. Check the file.")
    value: Any = record[key]
    if type(value) is not kind:
        raise AnnotationError(f"'{key}' of {where} is a {type(value).__name__}, not a {kind.__name__}. Check the file.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise AnnotationError(f"'{key}' of {where} does not fit 64 bits. Check the file.")
    if isinstance(value, str) and not _storable(value):
        raise AnnotationError(f"'{key}' of {where} holds a null character or half a surrogate pair. Check the file.")
    return value


def _storable(text: str) -> bool:
    """Whether ``text`` survives UTF-8 and HDF5, which ends strings at a null character."""
    return "\0" not in text and (text.isascii() or re.search("[\ud800-\udfff]", text) is None)


def _columns(refs: list[Any], refs_path: Path, instances: _Instances, *, name: str) -> Annotations:
    category_row = {category_id: row for row, category_id in enumerate(instances.categories)}
    columns: dict[str, list[int]] = {f: [] for f in ("ref_id", "ann_id", "image_id", "category", "distractors")}
    sentences: list[tuple[int, str, str]] = []
    sentence_count: list[int] = []
    runs: list[npt.NDArray[np.uint32]] = []
    for ref in progress(refs, total=len(refs), what="reading refs", unit="ref"):
        ref_id = _field(ref, "ref_id", int, f"a ref of {refs_path}")
        where = f"ref {ref_id} of {refs_path}"
        image_id, annotation, mask = _referent(ref, where, instances)
        its_sentences = _sentences(ref, where)
        distractors = _field(ref, "distractors", int, where) if "distractors" in ref else -1
        if not -1 <= distractors < 2**31:
            raise AnnotationError(f"'distractors' of {where} is not a number of objects. Check the file.")
        columns["ref_id"].append(ref_id)
        columns["ann_id"].append(annotation["id"])
        columns["image_id"].append(image_id)
        columns["category"].append(category_row.get(annotation["category_id"], -1))
        columns["distractors"].append(distractors)
        sentences += its_sentences
        sentence_count.append(len(its_sentences))
        runs.append(mask)
    twice = [ref_id for ref_id, count in Counter(columns["ref_id"]).items() if count > 1]
    if twice:
        raise AnnotationError(f"{refs_path} has ref {twice[0]} twice. Get the file again.")

    image_ids, image_of_ref = np.unique(np.array(columns["image_id"], np.int64), return_inverse=True)
    images, image_categories = _photos(image_ids, instances, category_row)
    sentence_counts = np.array(sentence_count, np.int32)
    rle_counts = np.array([len(counts) for counts in runs], np.int32)
    return Annotations(
        name=name,
        images=images,
        refs=Refs(
            ref_id=np.array(columns["ref_id"], np.int64),
            ann_id=np.array(columns["ann_id"], np.int64),
            image=image_of_ref.astype(np.int32),
            category=np.array(columns["category"], np.int32),
            sentence_begin=begins(sentence_counts),
            sentence_count=sentence_counts,
            rle_begin=begins(rle_counts),
            rle_count=rle_counts,
            empty=np.zeros(len(refs), np.uint8),
            source=[""] * len(refs),
            distractors=np.array(columns["distractors"], np.int32),
        ),
        sentences=Sentences(
            sent_id=np.array([sent_id for sent_id, _, _ in sentences], np.int64),
            ref=np.repeat(np.arange(len(refs), dtype=np.int32), sentence_counts),
            text=[text for _, text, _ in sentences],
            raw=[raw for _, _, raw in sentences],
        ),
        image_categories=image_categories,
        category_id=np.array(list(instances.categories), np.int64),
        category_name=[
            _field(category, "name", str, f"category {category_id} of {instances.path}")
            for category_id, category in instances.categories.items()
        ],
        rle_counts=np.concatenate(runs),
    )


def _referent(ref: Any, where: str, instances: _Instances) -> tuple[int, Any, npt.NDArray[np.uint32]]:
    """The id of the ref's photo, its annotation and the run lengths of its mask."""
    ann_id, image_id = _field(ref, "ann_id", int, where), _field(ref, "image_id", int, where)
    for what, record_id, table in (
        ("annotation", ann_id, instances.annotations),
        ("photo", image_id, instances.photos),
    ):
        if record_id not in table:
            raise AnnotationError(
                f"{where} names {what} {record_id}, which {instances.path} lacks. Take both from one release."
            )
    annotation, its = instances.annotations[ann_id], f"annotation {ann_id} of {instances.path}"
    if (other := _field(annotation, "image_id", int, its)) != image_id:
        raise AnnotationError(
            f"{where} is about photo {image_id}, but {its} about {other}. Take both from one release."
        )
    if "segmentation" not in annotation:
        raise AnnotationError(f"{its} has no 'segmentation'. Check the file.")
    _field(annotation, "category_id", int, its)
    width, height = _photo_size(image_id, instances)
    try:
        return image_id, annotation, run_lengths(annotation["segmentation"], width=width, height=height)
    except ValueError as error:
        raise AnnotationError(f"The mask of {its} cannot be used: {error}. Check the file.") from error


def _sentences(ref: Any, where: str) -> list[tuple[int, str, str]]:
    """(sent_id, text, raw) of each of the ref's sentences."""
    rows = []
    for sentence in _field(ref, "sentences", list, where):
        sent_id = _field(sentence, "sent_id", int, f"a sentence of {where}")
        its = f"sentence {sent_id} of {where}"
        text = _field(sentence, "sent", str, its)
        if not text.strip():
            raise AnnotationError(f"{its} is empty. Remove it from the file.")
        rows.append((sent_id, text, _field(sentence, "raw", str, its) if "raw" in sentence else text))
    if not rows:
        raise AnnotationError(f"{where} has no sentence. Remove it from the file.")
    return rows


def _photos(
    image_ids: npt.NDArray[np.int64], instances: _Instances, category_row: dict[int, int]
) -> tuple[Images, npt.NDArray[np.int32]]:
    """The columns of the photos with these ids, and the rows of their categories."""
    image_row = {int(image_id): row for row, image_id in enumerate(image_ids)}
    pairs = set()
    for ann_id, annotation in instances.annotations.items():
        its = f"annotation {ann_id} of {instances.path}"
        image = image_row.get(_field(annotation, "image_id", int, its))
        category = category_row.get(_field(annotation, "category_id", int, its))
        if image is not None and category is not None:
            pairs.add((image, category))
    image_of, category_of = np.array(sorted(pairs), np.int32).reshape(-1, 2).T
    category_count = np.bincount(image_of, minlength=len(image_row)).astype(np.int32)
    sizes = np.array([_photo_size(image_id, instances) for image_id in image_row], np.int32)
    images = Images(
        id=image_ids,
        width=sizes[:, 0],
        height=sizes[:, 1],
        file_name=[_file_name(image_id, instances) for image_id in image_row],
        category_begin=begins(category_count),
        category_count=category_count,
    )
    return images, category_of


def _photo_size(image_id: int, instances: _Instances) -> tuple[int, int]:
    photo, where = instances.photos[image_id], f"photo {image_id} of {instances.path}"
    width, height = _field(photo, "width", int, where), _field(photo, "height", int, where)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise AnnotationError(f"{where} is {width}x{height} pixels; a side has 1 to {MAX_SIDE}. Check the file.")
    return width, height


def _file_name(image_id: int, instances: _Instances) -> str:
    where = f"photo {image_id} of {instances.path}"
    name: str = _field(instances.photos[image_id], "file_name", str, where)
    if not is_inside(name):
        raise AnnotationError(f"{where} has the file name {name!r}, which leaves the folder of photos. Check the file.")
    return name
