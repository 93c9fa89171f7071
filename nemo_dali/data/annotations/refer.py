"""Annotation files in the layout of REFER ▸ columns in memory.

RefCOCO, RefCOCO+, RefCOCOg and RefCLEF share it: ``<root>/<dataset>/refs(<split_by>).p``, a pickled list of refs,
beside ``<root>/<dataset>/instances.json``, COCO's photos, annotations and categories. Two others extend it:

* gRefCOCO: ``grefs(<split_by>).json`` or ``.p``; a ref has a *list* of annotations, ``[-1]`` where nothing fits it.
* Ref-ZOM: ``refs(final).p``; a ref has one annotation or a list, and a ``source``, ``zero`` where nothing fits it.

No file is trusted.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.data.annotations._untrusted import (
    EmptyTexts,
    RunBudget,
    checked,
    field,
    named,
    no_split,
    normal_name,
    photo_name,
    photo_size,
    read_bytes,
)
from nemo_dali.data.columns import Annotations, PhotoRecord, RefRecord, in_columns
from nemo_dali.data.rle import area, run_lengths, union
from nemo_dali.errors import AnnotationError
from nemo_dali.io.progress import progress
from nemo_dali.io.unpickle import unpickle_builtins

logger = logging.getLogger("nemo_dali")


def read_refer(
    root: str | Path,
    *,
    dataset: str,
    split_by: str,
    split: str,
    leave_out: Sequence[str] = (),
    skip_empty: bool = False,
) -> Annotations:
    """Read one split of RefCOCO, RefCOCO+, RefCOCOg, RefCLEF, gRefCOCO or Ref-ZOM.

    Splits are matched as REFER does: ``testA``, ``testB`` and ``testC`` by the last letter, so that a ref of ``testAB``
    is in both; ``test`` takes every split with that in its name; any other name must be equal.

    Args:
        root: the folder that holds ``<dataset>/instances.json`` and beside it the file of refs.
        dataset: ``refcoco``, ``refcoco+``, ``refcocog``, ``refclef``, ``grefcoco`` or ``ref-zom``, or another folder in
            one of their layouts; the file of refs shows which one.
        split_by: what is in brackets in the name of the file of refs: ``unc``, ``umd``, ``google``, ``berkeley`` or
            ``final``.
        split: ``train``, ``val``, ``test``, ``testA``, ``testB`` or ``testC``.
        leave_out: file names of photos that are left out with their refs.
        skip_empty: skip sentences without text, and refs without a sentence, instead of refusing them. Refs of gRefCOCO
            without a sentence are always skipped, as its authors do.

    Raises:
        AnnotationError: a file is missing, malformed or hostile, the split does not exist, or refs, annotations and
            photos do not fit together.
    """
    folder = Path(root) / dataset
    if not folder.is_dir():
        found = sorted(path.parent.name for path in Path(root).glob("*/instances.json"))
        raise AnnotationError(f"{folder} does not exist; data sets in {root}: {named(found)}. Choose with --dataset.")
    refs_path = _refs_path(folder, split_by)
    refs = _select_split(_read_refs(refs_path), split, refs_path)
    instances = _read_instances(folder / "instances.json")
    return refs_in_columns(
        refs, refs_path, instances, name=f"{dataset}-{split_by}-{split}", leave_out=leave_out, skip_empty=skip_empty
    )


def refs_in_columns(
    refs: list[Any], path: Path, instances: "Instances", *, name: str, leave_out: Sequence[str], skip_empty: bool
) -> Annotations:
    """The columns of refs in the form of REFER's file, read from ``path``; other arguments as for ``read_refer``."""
    refs = _without(refs, leave_out, path, instances)
    empty = EmptyTexts(skip=skip_empty, remedy="Remove it from the file.")
    columns = _columns(refs, path, instances, empty, name=name)
    empty.report(path)
    return columns


# --- files -----------------------------------------------------------------------------------------------------------


def _refs_path(folder: Path, split_by: str) -> Path:
    """The one file of refs with ``split_by`` in brackets in its name."""
    kinds = (("refs", "p"), ("Ref-ZOM", "p"), ("grefs", "p"), ("grefs", "json"))  # the second as it is published
    found = [path for kind, end in kinds if (path := folder / f"{kind}({split_by}).{end}").is_file()]
    if not found:
        there = sorted(path.name for kind, end in kinds for path in folder.glob(f"{kind}(*).{end}"))
        raise AnnotationError(
            f"{folder / f'refs({split_by}).p'} does not exist; files of refs in {folder}: {named(there)}. "
            "Choose with --split-by."
        )
    if len(found) > 1:
        raise AnnotationError(
            f"{folder} has both {found[0].name} and {found[1].name}. Move the one you do not want elsewhere."
        )
    return found[0]


@dataclass(frozen=True)
class Instances:
    """The records of instances.json by their ids; ``runs`` are the masks read so far, as many refs share one."""

    path: Path
    photos: dict[int, Any]
    annotations: dict[int, Any]
    categories: dict[int, Any]
    _: KW_ONLY
    budget: RunBudget
    runs: dict[int, npt.NDArray[np.uint32]] = dataclass_field(default_factory=dict)


def _read_instances(path: Path) -> Instances:
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
    return Instances(path, *tables, budget=RunBudget(path.stat().st_size))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not valid JSON ({error}). Get the file again.") from error


def _read_refs(path: Path) -> list[Any]:
    refs = _read_json(path) if path.suffix == ".json" else unpickle_builtins(read_bytes(path), path)
    if not isinstance(refs, list):
        raise AnnotationError(f"{path} holds a {type(refs).__name__}, not a list of refs. Get the file again.")
    return refs


def _select_split(refs: list[Any], split: str, path: Path) -> list[Any]:
    names = [field(ref, "split", str, f"ref number {number} of {path}") for number, ref in enumerate(refs)]
    chosen = [ref for ref, name in zip(refs, names, strict=True) if in_split(name, split)]
    if not chosen:
        raise no_split(path, split, names, "refs")
    return chosen


def in_split(name: str, split: str) -> bool:
    """Whether a ref whose field 'split' has this name is in a split."""
    if split in ("testA", "testB", "testC"):
        return split[-1] in name
    return split in name if split == "test" else split == name


def _without(refs: list[Any], names: Sequence[str], refs_path: Path, instances: Instances) -> list[Any]:
    """The refs without those about photos with these file names."""
    if not names:
        return refs
    names = list(map(normal_name, names))
    ids = {
        image_id: name
        for image_id in instances.photos
        if (name := _photo(image_id, instances).file_name) in names
    }  # fmt: skip
    unknown = set(names) - set(ids.values())
    if unknown:
        raise AnnotationError(f"{instances.path} has no photo {min(unknown)}. Check --leave-out.")
    kept = [ref for ref in refs if field(ref, "image_id", int, f"a ref of {refs_path}") not in ids]
    if not kept:
        raise AnnotationError(f"No ref of the split is left in {refs_path}. Leave fewer photos out.")
    return kept


# --- records ---------------------------------------------------------------------------------------------------------


def _columns(refs: list[Any], refs_path: Path, instances: Instances, empty: EmptyTexts, *, name: str) -> Annotations:
    category_row = {category_id: row for row, category_id in enumerate(instances.categories)}
    generalised, zom = refs_path.name.startswith("grefs"), any("source" in ref for ref in refs)
    records = [
        _ref(ref, refs_path, instances, category_row, empty, generalised=generalised, zom=zom)
        for ref in progress(refs, total=len(refs), what="reading refs", unit="ref")
    ]
    records = [record for record in records if record.sentences]
    if not records:
        raise AnnotationError(f"No ref of the split has a sentence in {refs_path}. Check the file.")
    if other := sum(record.no_target == (record.runs is not None) for record in records if record.no_target >= 0):
        logger.warning(
            "%s: 'no_target' of %d refs contradicts the annotations that they name, which take precedence",
            refs_path,
            other,
        )
    twice = [ref_id for ref_id, count in Counter(record.ref_id for record in records).items() if count > 1]
    if twice and (generalised or zom):  # their publishers' readers continue too
        logger.warning("%s: %d ref ids occur more than once; every ref is kept", refs_path, len(twice))
    elif twice:
        raise AnnotationError(f"{refs_path} has ref {twice[0]} twice. Get the file again.")
    photos = {image_id: _photo(image_id, instances) for image_id in {record.image_id for record in records}}
    categories = {
        category_id: field(category, "name", str, f"category {category_id} of {instances.path}")
        for category_id, category in instances.categories.items()
    }
    return in_columns(name, records, photos, _shown(instances, category_row), categories)


def _ref(
    ref: Any,
    refs_path: Path,
    instances: Instances,
    category_row: dict[int, int],
    empty: EmptyTexts,
    *,
    generalised: bool,
    zom: bool,
) -> RefRecord:
    """A ref as its file has it; without sentences where it is to be skipped."""
    ref_id = field(ref, "ref_id", int, f"a ref of {refs_path}")
    where = f"ref {ref_id} of {refs_path}"
    image_id = field(ref, "image_id", int, where)
    _known(image_id, "photo", instances.photos, where, instances)
    source = field(ref, "source", str, where) if "source" in ref else ""
    if generalised:
        ann_ids = _generalised_targets(ref, where)
    elif zom:
        ann_ids = [] if source == "zero" else _zom_targets(ref, where)
    else:
        ann_ids = [field(ref, "ann_id", int, where)]
    distractors = field(ref, "distractors", int, where) if "distractors" in ref else -1
    if not -1 <= distractors < 2**31:
        raise AnnotationError(f"'distractors' of {where} is not a number of objects. Check the file.")
    annotations = [_annotation(ann_id, image_id, where, instances) for ann_id in dict.fromkeys(ann_ids)]
    categories = {category_row.get(annotation["category_id"], -1) for annotation in annotations}
    return RefRecord(
        ref_id=ref_id,
        image_id=image_id,
        runs=_mask(annotations, image_id, where, instances, skip_crowds=generalised) if ann_ids else None,
        sentences=_sentences(ref, where, empty, generalised=generalised),
        ann_id=ann_ids[0] if len(set(ann_ids)) == 1 else -1,
        category=min(categories) if len(categories) == 1 else -1,
        source=source,
        distractors=distractors,
        no_target=_no_target(ref, where),
    )


def _no_target(ref: Any, where: str) -> int:
    """The ref's own field ``no_target``, 0 or 1; -1 if it has none."""
    if "no_target" not in ref:
        return -1
    said = ref["no_target"]
    if type(said) not in (bool, int) or said not in (0, 1):
        raise AnnotationError(f"'no_target' of {where} is neither true nor false. Check the file.")
    return int(said)


def _generalised_targets(ref: Any, where: str) -> list[int]:
    """The annotations of a ref of gRefCOCO; none where it has no target."""
    ann_ids = _ids(ref, where)
    categories = ref.get("category_id")
    if type(categories) is list and len(categories) != len(ann_ids):
        raise AnnotationError(
            f"{where} has {len(ann_ids)} values in 'ann_id', but {len(categories)} in 'category_id'. "
            "Get the file again."
        )
    if ann_ids == [-1]:
        return []
    if -1 in ann_ids or not ann_ids:
        what = "mixes -1 (no target) with annotations" if ann_ids else "is empty; a ref without a target has [-1]"
        raise AnnotationError(f"'ann_id' of {where} {what}. Get the file again.")
    return ann_ids


def _zom_targets(ref: Any, where: str) -> list[int]:
    """The annotations of a ref of Ref-ZOM whose source is not 'zero'."""
    ann_ids = _ids(ref, where)
    if -1 in ann_ids or not ann_ids:
        raise AnnotationError(f"{where} names no annotation, but its 'source' is not 'zero'. Get the file again.")
    return ann_ids


def _ids(ref: Any, where: str) -> list[int]:
    """``ann_id`` as a list, whether it is one or a single number."""
    if type(ref.get("ann_id")) is not list:
        return [field(ref, "ann_id", int, where)]
    return [checked(ann_id, int, f"a value in 'ann_id' of {where}") for ann_id in ref["ann_id"]]


def _known(record_id: int, what: str, table: dict[int, Any], where: str, instances: Instances) -> Any:
    if record_id not in table:
        raise AnnotationError(
            f"{where} names {what} {record_id}, which {instances.path} lacks. Take both from one release."
        )
    return table[record_id]


def _annotation(ann_id: int, image_id: int, where: str, instances: Instances) -> Any:
    """The record of an annotation, which must be of the ref's photo."""
    annotation = _known(ann_id, "annotation", instances.annotations, where, instances)
    its = f"annotation {ann_id} of {instances.path}"
    if (other := field(annotation, "image_id", int, its)) != image_id:
        raise AnnotationError(
            f"{where} is about photo {image_id}, but {its} about {other}. Take both from one release."
        )
    if "segmentation" not in annotation:
        raise AnnotationError(f"{its} has no 'segmentation'. Check the file.")
    field(annotation, "category_id", int, its)
    return annotation


def _mask(
    annotations: list[Any], image_id: int, where: str, instances: Instances, *, skip_crowds: bool
) -> npt.NDArray[np.uint32]:
    """The run lengths of what the annotations cover together."""
    width, height, name = _photo(image_id, instances)
    remedy = f"Get the file again, or leave the photo out with --leave-out {name}"
    masks = []
    for annotation in annotations:
        its = f"annotation {annotation['id']} of {instances.path}"
        if skip_crowds and "iscrowd" in annotation and field(annotation, "iscrowd", int, its):
            continue
        try:
            if annotation["id"] not in instances.runs:
                runs = run_lengths(annotation["segmentation"], width=width, height=height)
                instances.runs[annotation["id"]] = runs
        except ValueError as error:
            raise AnnotationError(f"The mask of {its} cannot be used: {error}. {remedy}.") from error
        masks.append(instances.runs[annotation["id"]])
        instances.budget.take(len(masks[-1]), where)
    if not masks:
        raise AnnotationError(f"{where} names only annotations of crowds, which gRefCOCO leaves out. {remedy}.")
    merged = union(masks, width=width, height=height)
    if area(merged) == 0:
        raise AnnotationError(f"The mask of {where} has no pixel, though the ref has a target. {remedy}.")
    return merged


def _sentences(ref: Any, where: str, empty: EmptyTexts, *, generalised: bool) -> list[tuple[int, str, str]]:
    """(sent_id, text, raw) of each of the ref's sentences; none where the ref is to be skipped.

    gRefCOCO is published with refs that have none; its authors skip them.
    """
    rows = []
    for sentence in field(ref, "sentences", list, where):
        sent_id = field(sentence, "sent_id", int, f"a sentence of {where}")
        its = f"sentence {sent_id} of {where}"
        text = field(sentence, "sent", str, its)
        if not empty.has_text(text, its):
            continue
        rows.append((sent_id, text, field(sentence, "raw", str, its) if "raw" in sentence else text))
    if not rows:
        empty.skip_ref(where, always=generalised and not ref["sentences"])
    return rows


def _shown(instances: Instances, category_row: dict[int, int]) -> set[tuple[int, int]]:
    """Pairs (image id, row of a category) of all annotations."""
    pairs = set()
    for ann_id, annotation in instances.annotations.items():
        its = f"annotation {ann_id} of {instances.path}"
        image_id = field(annotation, "image_id", int, its)
        category = category_row.get(field(annotation, "category_id", int, its))
        if category is not None:
            pairs.add((image_id, category))
    return pairs


def _photo(image_id: int, instances: Instances) -> PhotoRecord:
    record, where = instances.photos[image_id], f"photo {image_id} of {instances.path}"
    return PhotoRecord(*photo_size(record, where), photo_name(record, "file_name", where))
