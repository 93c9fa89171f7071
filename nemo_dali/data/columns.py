"""One split of a data set as columns in memory: what every reader of annotation files makes, and ``dataset`` writes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import compress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import Exif
from nemo_dali.errors import PhotoError

MAX_SIDE = 65535  # of a photo, in pixels: the most a JPEG can have; an area then fits a uint32


Table = TypeVar("Table", "Images", "Refs", "Sentences")


@dataclass(frozen=True, eq=False)
class Images:
    """Photos, one row each; ``category_begin`` and ``category_count`` give a photo's range in ``image_categories``."""

    id: npt.NDArray[np.int64]
    width: npt.NDArray[np.int32]  # pixels; as stored, or as viewers show it: see ``Annotations.exif``
    height: npt.NDArray[np.int32]
    file_name: Sequence[str]  # relative to the image root, with forward slashes
    category_begin: npt.NDArray[np.int64]
    category_count: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PhotoFiles:
    """What ``index`` found in the photos' files, one row each."""

    digest: npt.NDArray[np.uint8]  # [photos, 32], sha256 of the file
    orientation: npt.NDArray[np.uint8]  # EXIF's, 1 to 8; 0 where the file has none
    coco_id: npt.NDArray[np.int64]  # COCO's id of the photo, if it is named like COCO's photos; else -1


def shared_photos(photos: PhotoFiles, others: PhotoFiles) -> npt.NDArray[np.bool_]:
    """Which photos are among others, bool [photos]: by COCO's id where both have one, and by the files' content.

    File names do not tell: data sets name one photo differently, and different photos alike.
    """
    same_id = (photos.coco_id >= 0) & np.isin(photos.coco_id, others.coco_id)
    known = set(map(bytes, others.digest))
    shared: npt.NDArray[np.bool_] = same_id | np.array([bytes(digest) in known for digest in photos.digest], bool)
    return shared


def twins(photos: PhotoFiles) -> npt.NDArray[np.int32]:
    """Which photos have the same content, int32 [photos]: the first row with the same file, which may be their own.

    So two photos are twins where these are equal. A file of unknown content, whose digest is zeros, has no twins.
    """
    rows = np.arange(len(photos.digest), dtype=np.int32)
    beginning = np.ascontiguousarray(photos.digest[:, :8]).view("<u8").ravel()
    order = np.argsort(beginning, kind="stable")
    alike = np.flatnonzero(beginning[order[1:]] == beginning[order[:-1]])
    some = np.unique(order[np.concatenate([alike, alike + 1])])  # the few that must be compared whole
    some = some[photos.digest[some].any(axis=1)]
    if len(some):
        whole = np.ascontiguousarray(photos.digest[some]).view("V32").ravel()
        _, first, which = np.unique(whole, return_index=True, return_inverse=True)
        rows[some] = some[first][which]
    return rows


def have_twins(content: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which photos share their content with another, bool [photos]; ``content`` is what ``twins`` returns."""
    several: npt.NDArray[np.bool_] = np.bincount(content, minlength=1)[content] > 1
    return several


@dataclass(frozen=True, eq=False)
class Refs:
    """Refs (what in a photo expressions refer to: an object, several or none), one row each; -1 where unknown."""

    ref_id: npt.NDArray[np.int64]
    ann_id: npt.NDArray[np.int64]  # of the one object
    image: npt.NDArray[np.int32]  # row in Images
    category: npt.NDArray[np.int32]  # row in the categories, if all objects of the ref share it
    sentence_begin: npt.NDArray[np.int64]  # rows in Sentences
    sentence_count: npt.NDArray[np.int32]
    rle_begin: npt.NDArray[np.int64]  # range in rle_counts
    rle_count: npt.NDArray[np.int32]
    empty: npt.NDArray[np.uint8]  # 1: nothing in the photo fits the expressions
    no_target: npt.NDArray[np.int8]  # the annotations' own field of that name, 0 or 1; -1 where they have none
    source: Sequence[str]  # where the ref came from, "" if the files do not say
    distractors: npt.NDArray[np.int32]  # similar objects in the photo, where that was recorded


@dataclass(frozen=True, eq=False)
class Sentences:
    """Referring expressions, one row each, those of a ref side by side."""

    sent_id: npt.NDArray[np.int64]
    ref: npt.NDArray[np.int32]  # row in Refs
    text: Sequence[str]  # cleaned by the publisher: REFER's 'sent'
    raw: Sequence[str]  # as the annotator typed it


# A box: left, top, width and height (COCO's), or its corners; in pixels, or in shares of the photo's sides.


@dataclass(frozen=True, eq=False)
class Annotations:
    """One split of one data set. Photos are those with at least one ref in the split, by ascending id.

    Masks are COCO's run lengths: down the columns, beginning with a (possibly empty) run of background.
    ``box_format`` is the ``BoxFormat`` of the boxes that masks were made from, or "" if none was. ``exif`` says whether
    masks and sizes are of the photos as stored ("ignore") or as viewers show them ("apply"), or that these must be the
    same for every photo ("refuse").
    """

    name: str
    images: Images
    refs: Refs
    sentences: Sentences
    image_categories: npt.NDArray[np.int32]  # distinct rows in the categories, photo after photo
    category_id: npt.NDArray[np.int64]
    category_name: Sequence[str]
    rle_counts: npt.NDArray[np.uint32]
    box_format: str = ""
    exif: Exif = "ignore"


class PhotoRecord(NamedTuple):
    """A photo as a reader found it; ``file_name`` is inside the image root."""

    width: int
    height: int
    file_name: str


class RefRecord(NamedTuple):
    """A ref as a reader found it; ``runs`` are the run lengths of its mask, None where it has no target."""

    ref_id: int
    image_id: int
    runs: npt.NDArray[np.uint32] | None
    sentences: list[tuple[int, str, str]]  # (sent_id, text, raw), at least one
    ann_id: int = -1
    category: int = -1
    source: str = ""
    distractors: int = -1
    no_target: int = -1


def in_columns(
    name: str,
    refs: Sequence[RefRecord],
    photos: Mapping[int, PhotoRecord],
    shown: Iterable[tuple[int, int]],
    categories: Mapping[int, str],
) -> Annotations:
    """The columns of refs, and of those photos that have one.

    Args:
        photos: by image id; possibly more than the refs name.
        shown: pairs (image id, row in the categories): the photo shows such an object.
        categories: names by category id, in the order of their rows.
    """
    image_ids, image_of_ref = np.unique(np.array([ref.image_id for ref in refs], np.int64), return_inverse=True)
    its_photos = [photos[image_id] for image_id in image_ids.tolist()]
    image_row = {image_id: row for row, image_id in enumerate(image_ids.tolist())}
    pairs = {(image_row[image_id], category) for image_id, category in shown if image_id in image_row}
    image_of, category_of = np.array(sorted(pairs), np.int32).reshape(-1, 2).T
    category_count = np.bincount(image_of, minlength=len(image_ids)).astype(np.int32)
    sentences = [sentence for ref in refs for sentence in ref.sentences]
    sentence_count = np.array([len(ref.sentences) for ref in refs], np.int32)
    runs = [np.empty(0, np.uint32) if ref.runs is None else ref.runs for ref in refs]
    rle_count = np.array([len(counts) for counts in runs], np.int32)
    return Annotations(
        name=name,
        images=Images(
            id=image_ids,
            width=np.array([photo.width for photo in its_photos], np.int32),
            height=np.array([photo.height for photo in its_photos], np.int32),
            file_name=[photo.file_name for photo in its_photos],
            category_begin=begins(category_count),
            category_count=category_count,
        ),
        refs=Refs(
            ref_id=np.array([ref.ref_id for ref in refs], np.int64),
            ann_id=np.array([ref.ann_id for ref in refs], np.int64),
            image=image_of_ref.astype(np.int32),
            category=np.array([ref.category for ref in refs], np.int32),
            sentence_begin=begins(sentence_count),
            sentence_count=sentence_count,
            rle_begin=begins(rle_count),
            rle_count=rle_count,
            empty=np.array([ref.runs is None for ref in refs], np.uint8),
            no_target=np.array([ref.no_target for ref in refs], np.int8),
            source=[ref.source for ref in refs],
            distractors=np.array([ref.distractors for ref in refs], np.int32),
        ),
        sentences=Sentences(
            sent_id=np.array([sent_id for sent_id, _, _ in sentences], np.int64),
            ref=np.repeat(np.arange(len(refs), dtype=np.int32), sentence_count),
            text=[text for _, text, _ in sentences],
            raw=[raw for _, _, raw in sentences],
        ),
        image_categories=category_of,
        category_id=np.array(list(categories), np.int64),
        category_name=list(categories.values()),
        rle_counts=np.concatenate(runs),
    )


def begins(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Where each range begins when ranges of these lengths lie side by side."""
    return np.cumsum(counts, dtype=np.int64) - counts


def coco_id(name: str) -> int:
    """COCO's id of a photo that is named as in COCO's releases of 2014 and 2017; -1 for any other name."""
    found = re.search(r"(?:^|/)(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg$", name)
    return -1 if found is None else int(found[1])


def other_coco_names(name: str) -> list[str]:
    """A photo's names in COCO's other release, of 2014 or 2017; none for any other name. Folders before it stay.

    The two hold the same files, though what is in train2014 may be in val2017 and vice versa.
    """
    folder, slash, last = name.rpartition("/")
    if re.fullmatch(r"COCO_(?:train|val)2014_\d{12}\.jpg", last):
        return [f"{folder}{slash}{last[-16:]}"]
    if re.fullmatch(r"\d{12}\.jpg", last):
        return [f"{folder}{slash}COCO_{part}2014_{last}" for part in ("train", "val")]
    return []


def is_inside(name: str) -> bool:
    """Whether ``name`` is a plain relative path: no root, no drive, no step up, no backslash, no control character."""
    return (
        re.match(r"[A-Za-z]:|.*[\x00-\x1f\\]", name, re.DOTALL) is None
        and not {"", ".", ".."} & set(name.split("/"))
        and is_storable(name)
    )


def is_storable(text: str) -> bool:
    """Whether ``text`` survives UTF-8 and HDF5, which ends strings at a null character."""
    return "\0" not in text and (text.isascii() or re.search("[\ud800-\udfff]", text) is None)


def with_photos(annotations: Annotations, keep: npt.NDArray[np.bool_]) -> Annotations:
    """The annotations with only the photos that are to be kept, bool [photos], and their refs.

    Raises:
        PhotoError: none is left.
    """
    images, refs = annotations.images, annotations.refs
    keep_ref = keep[refs.image]
    if not keep_ref.any():
        raise PhotoError("No photo is left, so there is nothing to index. Replace corrupt ones, or leave fewer out.")
    kept_images, kept_refs = _rows(images, keep), _rows(refs, keep_ref)
    new_row = np.cumsum(keep_ref, dtype=np.int32) - 1
    kept_sentences = _rows(annotations.sentences, np.repeat(keep_ref, refs.sentence_count))
    return replace(
        annotations,
        images=replace(kept_images, category_begin=begins(kept_images.category_count)),
        refs=replace(
            kept_refs,
            image=(np.cumsum(keep, dtype=np.int32) - 1)[kept_refs.image],
            sentence_begin=begins(kept_refs.sentence_count),
            rle_begin=begins(kept_refs.rle_count),
        ),
        sentences=replace(kept_sentences, ref=new_row[kept_sentences.ref]),
        image_categories=annotations.image_categories[np.repeat(keep, images.category_count)],
        rle_counts=annotations.rle_counts[np.repeat(keep_ref, refs.rle_count)],
    )


def _rows(table: Table, keep: npt.NDArray[np.bool_]) -> Table:
    """The rows of every column that are kept."""
    columns: dict[str, Any] = {f.name: getattr(table, f.name) for f in fields(table)}
    for name, column in columns.items():
        columns[name] = column[keep] if isinstance(column, np.ndarray) else list(compress(column, keep))
    return type(table)(**columns)
