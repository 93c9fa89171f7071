"""The data set file (.ris.h5): written once by ``nemo-dali index``, then opened read-only by every rank.

Numeric columns are memory-mapped, so that the ranks of a node share them. Photos stay files. ``columns`` says what the
columns mean; ranges of sentences, run lengths and categories are side by side, in row order.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import Exif
from nemo_dali.data.columns import (
    MAX_SIDE,
    Annotations,
    Images,
    PhotoFiles,
    Refs,
    Sentences,
    begins,
    is_inside,
)
from nemo_dali.data.orientation import EXIF
from nemo_dali.data.photos import batch_error
from nemo_dali.data.s3 import check_names, image_root, is_remote
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.io.h5 import MappedFile, fingerprint
from nemo_dali.io.index import Value, row_checksum
from nemo_dali.io.writer import Content

FORMAT = "nemo-dali/ris"
VERSION = 2
# Every column of the file and its type; "" is UTF-8 strings of any length.
COLUMNS = {
    "images": {
        "id": "<i8",
        "width": "<i4",
        "height": "<i4",
        "file_name": "",
        "category_begin": "<i8",
        "category_count": "<i4",
    },
    "refs": {
        "ref_id": "<i8",
        "ann_id": "<i8",
        "image": "<i4",
        "category": "<i4",
        "sentence_begin": "<i8",
        "sentence_count": "<i4",
        "rle_begin": "<i8",
        "rle_count": "<i4",
        "empty": "|u1",
        "no_target": "|i1",
        "source": "",
        "distractors": "<i4",
    },
    "sentences": {"sent_id": "<i8", "ref": "<i4", "text": "", "raw": ""},
}
PHOTO_COLUMNS = {"images/orientation": "|u1", "images/coco_id": "<i8"}
OTHER_COLUMNS = {"image_categories": "<i4", "categories/id": "<i8", "categories/name": "", "rle/counts": "<u4"}
RUN_CHECKSUMS = "checksums/rle/counts"  # of each ref's run lengths, <u8 [refs]; files that lack it are read too
BLOCK = 1 << 14  # refs whose run lengths are checked together


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """An open data set file: columns by row number. It pickles as its path.

    A ref's run lengths are checked when they are first used: call ``check_masks`` before you read any.
    """

    path: Path
    mapped: MappedFile
    fingerprint: str
    name: str
    image_root: str
    left_out: int  # photos that index left out because they cannot be used
    exif: Exif  # whether photos are shown as stored or as viewers show them, as in ``Annotations``
    box_format: str  # of the boxes that masks were made from, as in ``Annotations``
    images: Images
    photo_files: PhotoFiles
    refs: Refs
    sentences: Sentences
    image_categories: npt.NDArray[np.int32]
    category_id: npt.NDArray[np.int64]
    category_name: Sequence[str]
    rle_counts: npt.NDArray[np.uint32]

    @staticmethod
    def open(path: str | Path, *, images: str | Path | None = None) -> "Dataset":
        """Open a data set file and check its structure: numbers now, strings and run lengths when they are used.

        Args:
            path: a .ris.h5 file.
            images: where the photos are, if not where they were when the file was made; may be ``s3://bucket/prefix``.

        Raises:
            ValueError: ``images`` is an address that is not s3://bucket/prefix.
            FileFormatError: not such a file, truncated, or damaged.
            PhotoError: the folder given as ``images`` does not exist.
        """
        path = Path(path).absolute()
        root = None if images is None else image_root(images)
        dataset = _read(MappedFile(path, format=FORMAT, version=VERSION, remedy=_remedy(path)), root)
        if (damage := _damage(dataset)) is not None:
            raise dataset.mapped.damage(damage)
        if images is not None:
            dataset.photo_path(0)  # a wrong argument is reported now
        return dataset

    def content_fingerprint(self) -> str:
        """The fingerprint of what the file holds now; reads all of it."""
        for begin in range(0, len(self.refs.image), BLOCK):
            self.check_masks(np.arange(begin, min(begin + BLOCK, len(self.refs.image))))
        return _fingerprint(_flat_columns(self) | _photo_columns(self.photo_files), self.exif)

    def photo_path(self, row: int) -> str:
        """Path or address of the photo in this row of ``images``.

        Raises:
            PhotoError: the image root is a folder that does not exist, or an address that a photo's name does not fit.
            FileFormatError: the names are damaged, or one points outside the image root.
        """
        root, names = self._checked_root, self._names
        if (name := names[row]) is None:
            name = names[row] = self.images.file_name[row]
        return f"{root}/{name}"

    @cached_property
    def _names(self) -> list[str | None]:
        """The photos' names, as far as they were used: making them each time would be slow."""
        return [None] * len(self.images.id)

    @cached_property
    def _checked_root(self) -> str:
        # When first needed, not on opening: a table can be inspected, and tiles loaded, where there are no photos.
        check_names(self.image_root, self.images.file_name)
        if not is_remote(self.image_root) and not os.path.isdir(self.image_root):
            raise PhotoError(
                f"The photos of {self.path.name} are not in {self.image_root}, which does not exist. "
                "Say where they are with images=... or --images."
            )
        return self.image_root

    @cached_property
    def _sound_masks(self) -> npt.NDArray[np.bool_]:
        """bool [refs]: those whose run lengths were checked."""
        return np.zeros(len(self.refs.image), bool)

    @cached_property
    def _run_checksums(self) -> npt.NDArray[np.uint64] | None:
        """uint64 [refs]; None: the file has none, and its run lengths have been compared as a whole."""
        if RUN_CHECKSUMS in self.mapped.index.arrays:
            return self.mapped.array(RUN_CHECKSUMS, "<u8", (len(self.refs.image),))
        self.mapped.array("rle/counts", "<u4", (None,))
        return None

    def check_masks(self, refs: npt.NDArray[np.integer[Any]]) -> None:
        """Check the run lengths of refs before they are read; each ref's once, so that later calls cost nothing.

        Several threads may call it.

        Raises:
            FileFormatError: they are not as they were written, or do not fit the photo.
        """
        if (new := np.unique(refs[~self._sound_masks[refs]])).size == 0:
            return
        self.mapped.check()
        begin, count = self.refs.rle_begin[new], self.refs.rle_count[new]
        if (expected := self._run_checksums) is not None:
            runs, digest = self.rle_counts, row_checksum
            rows = zip(new.tolist(), begin.tolist(), (begin + count).tolist(), expected[new].tolist(), strict=True)
            for ref, first, end, found in rows:
                if digest(runs[first:end].data) != found:
                    raise self.mapped.damage(f"the run lengths of ref {ref} do not match their checksum")
        some = np.flatnonzero(count)
        if some.size:  # the run lengths of all, one after the other
            ends = begins(count)
            together = self.rle_counts[np.arange(count.sum(dtype=np.int64)) + np.repeat(begin - ends, count)]
            pixels = np.add.reduceat(together, ends[some], dtype=np.int64)
            photo = self.refs.image[new[some]]
            if not np.array_equal(pixels, self.images.width[photo].astype(np.int64) * self.images.height[photo]):
                raise self.mapped.damage("the run lengths of a ref do not add up to its photo's pixels")
        self._sound_masks[new] = True

    def runs_of(self, ref: int) -> npt.NDArray[np.uint32]:
        """A ref's run lengths, uint32 [n]; see ``check_masks``."""
        self.check_masks(np.array([ref]))
        begin = int(self.refs.rle_begin[ref])
        return self.rle_counts[begin : begin + int(self.refs.rle_count[ref])]

    def mask(self, ref: int) -> npt.NDArray[np.uint8]:
        """uint8 [height, width] in {0, 1}: the mask of a ref, at its photo's size; see ``check_masks``."""
        row, runs = self.refs.image[ref], self.runs_of(ref)
        down_columns = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
        width, height = int(self.images.width[row]), int(self.images.height[row])
        return down_columns.reshape(width, height).T if len(runs) else np.zeros((height, width), np.uint8)

    @cached_property
    def turn(self) -> npt.NDArray[np.uint8]:
        """uint8 [photos]: how to turn each photo as stored, as EXIF numbers it; 1: not at all."""
        stored = self.photo_files.orientation
        turn: npt.NDArray[np.uint8] = np.maximum(stored, 1) if self.exif == "apply" else np.ones_like(stored)
        return turn

    def shown_categories(self) -> npt.NDArray[np.bool_]:
        """bool [photos, categories]: the categories of the objects that each photo shows."""
        shown = np.zeros((len(self.images.id), len(self.category_id)), bool)
        shown[np.repeat(np.arange(len(shown)), self.images.category_count), self.image_categories] = True
        return shown

    def batch_error(self, rows: list[int], error: object) -> NemoError:
        """Why these photos could not be decoded together; see ``photos.batch_error``."""
        paths = [self.photo_path(row) for row in rows]
        columns = (self.images.width, self.images.height, self.turn)
        width, height, turn = (column[rows].tolist() for column in columns)
        return batch_error(paths, width, height, turn, error)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.image_root)


def _remedy(path: Path) -> str:
    return f"Make it with: nemo-dali index REFER_ROOT --dataset NAME --split-by BY --split SPLIT --images DIR -o {path}"


def _reopen(path: Path, image_root: str) -> Dataset:
    return replace(Dataset.open(path), image_root=image_root)


def _read(file: MappedFile, root: str | None) -> Dataset:
    tables = {
        group: {name: _column(file, f"{group}/{name}", dtype) for name, dtype in columns.items()}
        for group, columns in COLUMNS.items()
    }
    others = {name: _column(file, name, dtype) for name, dtype in (OTHER_COLUMNS | PHOTO_COLUMNS).items()}
    exif = cast(Exif, file.text("exif"))
    if exif not in EXIF:
        raise file.damage("its attribute exif is not a known value")
    try:
        recorded = image_root(file.text("image_root"))
    except ValueError as error:
        raise file.damage(f"its image root cannot be used: {error}") from error
    return Dataset(
        path=file.path,
        mapped=file,
        fingerprint=file.index.fingerprint,
        name=file.text("name"),
        image_root=recorded if root is None else root,
        left_out=file.integer("left_out", least=0),
        exif=exif,
        box_format=file.text("box_format"),
        images=Images(**tables["images"]),
        photo_files=PhotoFiles(
            digest=file.array("images/digest", "|u1", (None, 32)),
            orientation=others["images/orientation"],
            coco_id=others["images/coco_id"],
        ),
        refs=Refs(**tables["refs"]),
        sentences=Sentences(**tables["sentences"]),
        image_categories=others["image_categories"],
        category_id=others["categories/id"],
        category_name=others["categories/name"],
        rle_counts=others["rle/counts"],
    )


def _column(file: MappedFile, name: str, dtype: str) -> Any:
    if dtype:
        return file.array(name, dtype, (None,), compare=name != "rle/counts")
    if name == "images/file_name":
        return file.strings(name, allowed=is_inside, otherwise="has a name that leaves the image root")
    return list(file.strings(name)) if name == "categories/name" else file.strings(name)  # they are few, and needed


def _damage(dataset: Dataset) -> str | None:
    """The first thing in the columns that contradicts another, or None.

    Reads every column of numbers once, except for run lengths, which are most of a file: see ``Dataset.check_masks``.
    """
    images, refs, sentences = dataset.images, dataset.refs, dataset.sentences
    photos, categories = len(images.id), len(dataset.category_id)
    files = dataset.photo_files
    for what, table in (("images", images), ("refs", refs), ("sentences", sentences)):
        lengths = {len(getattr(table, f.name)) for f in fields(table)}
        if len(lengths) > 1 or 0 in lengths:
            return f"the columns of /{what} are not equally long, or empty"
    if {len(files.digest), len(files.orientation), len(files.coco_id)} != {photos}:
        return "the columns of /images are not equally long"
    if len(dataset.category_name) != categories:
        return "the columns of /categories are not equally long"
    for what, values, low, high in (
        ("images/width", images.width, 1, MAX_SIDE + 1),
        ("images/height", images.height, 1, MAX_SIDE + 1),
        ("refs/image", refs.image, 0, photos),
        ("images/orientation", files.orientation, 0, 9),
        ("images/coco_id", files.coco_id, -1, 2**62),
        ("refs/category", refs.category, -1, categories),
        ("refs/empty", refs.empty, 0, 2),
        ("refs/no_target", refs.no_target, -1, 2),
        ("refs/distractors", refs.distractors, -1, 2**31),
        ("image_categories", dataset.image_categories, 0, categories),
    ):
        if len(values) and not (low <= values.min() and values.max() < high):
            return f"/{what} has a value out of range"
    for what, begin, count, total in (
        ("images/category", images.category_begin, images.category_count, len(dataset.image_categories)),
        ("refs/sentence", refs.sentence_begin, refs.sentence_count, len(sentences.sent_id)),
        ("refs/rle", refs.rle_begin, refs.rle_count, len(dataset.rle_counts)),
    ):
        if count.min() < 0 or count.sum(dtype=np.int64) != total or not np.array_equal(begin, begins(count)):
            return f"the ranges of /{what}_begin and _count are not contiguous"
    if refs.sentence_count.min() < 1 or not np.array_equal(
        sentences.ref, np.repeat(np.arange(len(refs.image)), refs.sentence_count)
    ):
        return "/sentences/ref does not fit the refs' ranges"
    if not ((refs.rle_count > 0) | (refs.empty == 1)).all():
        return "the run lengths of a ref do not add up to its photo's pixels"
    if dataset.exif == "refuse" and (files.orientation > 1).any():
        return "/images/orientation has values that the attribute exif excludes"
    return None


# --- writing ---------------------------------------------------------------------------------------------------------


def write_columns(
    write: Callable[[Content], None], annotations: Annotations, files: PhotoFiles, *, image_root: str, left_out: int
) -> str:
    """Write everything that a data set file holds with the function of ``write_h5``; return its fingerprint."""
    columns = _flat_columns(annotations) | _photo_columns(files)
    attributes: dict[str, Value] = {
        "name": annotations.name,
        "image_root": image_root,
        "left_out": left_out,
        "exif": annotations.exif,
        "box_format": annotations.box_format,
    }
    digest = _fingerprint(columns, annotations.exif)
    begin, count = annotations.refs.rle_begin.tolist(), annotations.refs.rle_count.tolist()
    runs = np.ascontiguousarray(columns["rle/counts"])
    sums = [row_checksum(runs[first : first + n].data) for first, n in zip(begin, count, strict=True)]
    # First: nothing must come after the last array, so that a file that was cut short lacks a part of it.
    write(Content({RUN_CHECKSUMS: np.array(sums, np.uint64), **columns}, attributes, digest))
    return digest


def _flat_columns(annotations: Annotations | Dataset) -> dict[str, npt.NDArray[Any] | list[str]]:
    """What was annotated, by the names of the columns."""
    columns: dict[str, Any] = {
        f"{group}/{name}": getattr(getattr(annotations, group), name) for group in COLUMNS for name in COLUMNS[group]
    }
    columns["image_categories"] = annotations.image_categories
    columns["categories/id"] = annotations.category_id
    columns["categories/name"] = annotations.category_name
    columns["rle/counts"] = annotations.rle_counts
    types = {f"{group}/{name}": dtype for group in COLUMNS for name, dtype in COLUMNS[group].items()} | OTHER_COLUMNS
    return {name: np.asarray(columns[name], dtype) if dtype else list(columns[name]) for name, dtype in types.items()}


def _photo_columns(files: PhotoFiles) -> dict[str, npt.NDArray[Any] | list[str]]:
    """What the photos' files are, by the names of the columns."""
    return {
        "images/digest": files.digest,
        "images/orientation": files.orientation,
        "images/coco_id": np.asarray(files.coco_id, np.int64),
    }


def _fingerprint(columns: Mapping[str, npt.NDArray[Any] | list[str]], exif: str) -> str:
    return fingerprint({**columns, "exif": exif})
