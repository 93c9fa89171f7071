"""Annotation files in the layout of REFER ▸ columns in memory.

RefCOCO, RefCOCO+ and RefCOCOg share it: ``<root>/<dataset>/refs(<split_by>).p``, a pickled list of refs, beside
``<root>/<dataset>/instances.json``, COCO's photos, annotations and categories. Neither file is trusted.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.columns import Annotations, PhotoRecord, RefRecord, in_columns
from nemo_dali.errors import AnnotationError
from nemo_dali.progress import progress
from nemo_dali.records import field, listed, photo_name, photo_size, read_bytes
from nemo_dali.runlength import run_lengths
from nemo_dali.unpickle import unpickle_builtins


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
        raise AnnotationError(f"{folder} does not exist; data sets in {root}: {listed(found)}. Choose with --dataset.")
    if not refs_path.is_file():
        found = sorted(path.name for path in folder.glob("refs(*).p"))
        raise AnnotationError(
            f"{refs_path} does not exist; files of refs in {folder}: {listed(found)}. Choose with --split-by."
        )
    refs = _select_split(_read_refs(refs_path), split, refs_path)
    return _columns(refs, refs_path, _read_instances(instances_path), name=f"{dataset}-{split_by}-{split}")


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instances:
    """The records of instances.json by their ids."""

    path: Path
    photos: dict[int, Any]
    annotations: dict[int, Any]
    categories: dict[int, Any]


def _read_instances(path: Path) -> _Instances:
    content = _read_json(path)
    tables = []
    for key, what in (("images", "photo"), ("annotations", "annotation"), ("categories", "category")):
        table: dict[int, Any] = {}
        for number, record in enumerate(field(content, key, list, str(path))):
            record_id = field(record, "id", int, f"{what} number {number} of {path}")
            if record_id in table:
                raise AnnotationError(f"{path} describes {what} {record_id} twice. Get the file again.")
            table[record_id] = record
        tables.append(table)
    return _Instances(path, *tables)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not valid JSON ({error}). Get the file again.") from error


def _read_refs(path: Path) -> list[Any]:
    refs = unpickle_builtins(read_bytes(path), path)
    if not isinstance(refs, list):
        raise AnnotationError(f"{path} holds a {type(refs).__name__}, not a list of refs. Get the file again.")
    return refs


def _select_split(refs: list[Any], split: str, path: Path) -> list[Any]:
    names = [field(ref, "split", str, f"ref number {number} of {path}") for number, ref in enumerate(refs)]
    if split in ("testA", "testB", "testC"):
        chosen = [ref for ref, name in zip(refs, names, strict=True) if split[-1] in name]
    elif split == "test":
        chosen = [ref for ref, name in zip(refs, names, strict=True) if split in name]
    else:
        chosen = [ref for ref, name in zip(refs, names, strict=True) if split == name]
    if not chosen:
        found = [f"{name} ({count} refs)" for name, count in sorted(Counter(names).items())]
        raise AnnotationError(f"{path} has no split '{split}'; it has {listed(found)}. Choose with --split.")
    return chosen


# --- records ---------------------------------------------------------------------------------------------------------


def _columns(refs: list[Any], refs_path: Path, instances: _Instances, *, name: str) -> Annotations:
    category_row = {category_id: row for row, category_id in enumerate(instances.categories)}
    records = [
        _ref(ref, refs_path, instances, category_row)
        for ref in progress(refs, total=len(refs), what="reading refs", unit="ref")
    ]
    twice = [ref_id for ref_id, count in Counter(record.ref_id for record in records).items() if count > 1]
    if twice:
        raise AnnotationError(f"{refs_path} has ref {twice[0]} twice. Get the file again.")
    photos = {image_id: _photo(image_id, instances) for image_id in {record.image_id for record in records}}
    categories = {
        category_id: field(category, "name", str, f"category {category_id} of {instances.path}")
        for category_id, category in instances.categories.items()
    }
    return in_columns(name, records, photos, _shown(instances, category_row), categories)


def _ref(ref: Any, refs_path: Path, instances: _Instances, category_row: dict[int, int]) -> RefRecord:
    ref_id = field(ref, "ref_id", int, f"a ref of {refs_path}")
    where = f"ref {ref_id} of {refs_path}"
    image_id, annotation, mask = _referent(ref, where, instances)
    distractors = field(ref, "distractors", int, where) if "distractors" in ref else -1
    if not -1 <= distractors < 2**31:
        raise AnnotationError(f"'distractors' of {where} is not a number of objects. Check the file.")
    return RefRecord(
        ref_id=ref_id,
        image_id=image_id,
        runs=mask,
        sentences=_sentences(ref, where),
        ann_id=annotation["id"],
        category=category_row.get(annotation["category_id"], -1),
        distractors=distractors,
    )


def _referent(ref: Any, where: str, instances: _Instances) -> tuple[int, Any, npt.NDArray[np.uint32]]:
    """The id of the ref's photo, its annotation and the run lengths of its mask."""
    ann_id, image_id = field(ref, "ann_id", int, where), field(ref, "image_id", int, where)
    for what, record_id, table in (
        ("annotation", ann_id, instances.annotations),
        ("photo", image_id, instances.photos),
    ):
        if record_id not in table:
            raise AnnotationError(
                f"{where} names {what} {record_id}, which {instances.path} lacks. Take both from one release."
            )
    annotation, its = instances.annotations[ann_id], f"annotation {ann_id} of {instances.path}"
    if (other := field(annotation, "image_id", int, its)) != image_id:
        raise AnnotationError(
            f"{where} is about photo {image_id}, but {its} about {other}. Take both from one release."
        )
    if "segmentation" not in annotation:
        raise AnnotationError(f"{its} has no 'segmentation'. Check the file.")
    field(annotation, "category_id", int, its)
    width, height, _ = _photo(image_id, instances)
    try:
        return image_id, annotation, run_lengths(annotation["segmentation"], width=width, height=height)
    except ValueError as error:
        raise AnnotationError(f"The mask of {its} cannot be used: {error}. Check the file.") from error


def _sentences(ref: Any, where: str) -> list[tuple[int, str, str]]:
    """(sent_id, text, raw) of each of the ref's sentences."""
    rows = []
    for sentence in field(ref, "sentences", list, where):
        sent_id = field(sentence, "sent_id", int, f"a sentence of {where}")
        its = f"sentence {sent_id} of {where}"
        text = field(sentence, "sent", str, its)
        if not text.strip():
            raise AnnotationError(f"{its} is empty. Remove it from the file.")
        rows.append((sent_id, text, field(sentence, "raw", str, its) if "raw" in sentence else text))
    if not rows:
        raise AnnotationError(f"{where} has no sentence. Remove it from the file.")
    return rows


def _shown(instances: _Instances, category_row: dict[int, int]) -> set[tuple[int, int]]:
    """Pairs (image id, row of a category) of all annotations."""
    pairs = set()
    for ann_id, annotation in instances.annotations.items():
        its = f"annotation {ann_id} of {instances.path}"
        image_id = field(annotation, "image_id", int, its)
        category = category_row.get(field(annotation, "category_id", int, its))
        if category is not None:
            pairs.add((image_id, category))
    return pairs


def _photo(image_id: int, instances: _Instances) -> PhotoRecord:
    record, where = instances.photos[image_id], f"photo {image_id} of {instances.path}"
    return PhotoRecord(*photo_size(record, where), photo_name(record, "file_name", where))
