"""The data set file (.ris.h5): written once by ``nemo-dali index``, then opened read-only by every rank.

Numeric columns are memory-mapped, so that the ranks of a node share them. Photos stay files. What the columns mean is
said in ``columns``; ranges of sentences, run lengths and categories lie side by side, in row order.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, TypeVar, overload

import h5py
import numpy as np
import numpy.typing as npt

from nemo_dali.data.columns import MAX_SIDE, Annotations, Images, Refs, Sentences, begins, is_inside
from nemo_dali.data.photos import batch_error, check_photos
from nemo_dali.data.s3 import check_names, image_root, is_remote
from nemo_dali.errors import FileFormatError, NemoError, PhotoError
from nemo_dali.io.h5 import (
    MappedFile,
    fingerprint,
    map_array,
    open_h5,
    read_strings,
    write_array,
    write_h5,
    write_strings,
)

FORMAT = "nemo-dali/ris"
VERSION = 1
# Every dataset of the file and its type; "" is UTF-8 strings of any length.
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
        "source": "",
        "distractors": "<i4",
    },
    "sentences": {"sent_id": "<i8", "ref": "<i4", "text": "", "raw": ""},
}
OTHER_COLUMNS = {"image_categories": "<i4", "categories/id": "<i8", "categories/name": "", "rle/counts": "<u4"}

Table = TypeVar("Table", Images, Refs, Sentences)


class _Strings(Sequence[str]):
    """A column of strings that is read when first used; a file with 120,000 sentences then opens in 0.05 s."""

    def __init__(self, mapped: MappedFile, name: str, length: int) -> None:
        self._mapped, self._name, self._length = mapped, name, length

    @cached_property
    def _values(self) -> list[str]:
        self._mapped.check()
        try:
            with open(self._mapped.still, "rb") as still, h5py.File(still, "r") as file:
                return read_strings(file[self._name])
        except (OSError, RuntimeError, LookupError, FileFormatError) as error:
            raise FileFormatError(f"{self._mapped.path} is damaged ({error}). {_remedy(self._mapped.path)}") from error

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        return self._values[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """An open data set file: columns by row number. It pickles as its path."""

    path: Path
    mapped: MappedFile
    fingerprint: str
    name: str
    image_root: str
    left_out: int  # photos left out by index as corrupt
    images: Images
    refs: Refs
    sentences: Sentences
    image_categories: npt.NDArray[np.int32]
    category_id: npt.NDArray[np.int64]
    category_name: Sequence[str]
    rle_counts: npt.NDArray[np.uint32]

    @staticmethod
    def open(path: str | Path, *, images: str | Path | None = None) -> "Dataset":
        """Open a data set file and check its structure.

        Args:
            path: a .ris.h5 file.
            images: where the photos are, if not where they were when the file was made; may be ``s3://bucket/prefix``.

        Raises:
            ValueError: ``images`` is an address that is not s3://bucket/prefix.
            FileFormatError: not such a file, cut short, or damaged.
            PhotoError: the folder given as ``images`` does not exist.
        """
        path = Path(path).absolute()
        root = None if images is None else image_root(images)
        with open_h5(path, format=FORMAT, version=VERSION, remedy=_remedy(path)) as file:
            try:
                dataset = _read(file, path, root)
            except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
                raise FileFormatError(f"{path} is damaged ({error}). {_remedy(path)}") from error
        if (damage := _damage(dataset)) is not None:
            raise FileFormatError(f"{path} is damaged: {damage}. {_remedy(path)}")
        if images is not None:
            dataset.photo_path(0)  # a wrong argument is told now
        return dataset

    def content_fingerprint(self) -> str:
        """The fingerprint of what the file holds now; reads all of it."""
        return fingerprint(_flat_columns(self))

    def photo_path(self, row: int) -> str:
        """Path or address of the photo in this row of ``images``.

        Raises:
            PhotoError: the image root is a folder that does not exist, or an address that a photo's name does not fit.
        """
        return f"{self._checked_root}/{self.images.file_name[row]}"

    @cached_property
    def _checked_root(self) -> str:
        # When first needed, not on opening: a table can be inspected and tiles be loaded where no photos are.
        check_names(self.image_root, self.images.file_name)
        if not is_remote(self.image_root) and not os.path.isdir(self.image_root):
            raise PhotoError(
                f"The photos of {self.path.name} are not in {self.image_root}, which does not exist. "
                "Say where they are with images=... or --images."
            )
        return self.image_root

    def mask(self, ref: int) -> npt.NDArray[np.uint8]:
        """uint8 [height, width] in {0, 1}: the mask of a ref, at its photo's size."""
        row = self.refs.image[ref]
        begin = int(self.refs.rle_begin[ref])
        runs = self.rle_counts[begin : begin + int(self.refs.rle_count[ref])]
        down_columns = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
        width, height = int(self.images.width[row]), int(self.images.height[row])
        return down_columns.reshape(width, height).T if len(runs) else np.zeros((height, width), np.uint8)

    def shown_categories(self) -> npt.NDArray[np.bool_]:
        """bool [photos, categories]: which categories a photo shows objects of."""
        shown = np.zeros((len(self.images.id), len(self.category_id)), bool)
        shown[np.repeat(np.arange(len(shown)), self.images.category_count), self.image_categories] = True
        return shown

    def batch_error(self, rows: list[int], error: object) -> NemoError:
        """Why these photos could not be decoded together; see ``photos.batch_error``."""
        paths = [self.photo_path(row) for row in rows]
        return batch_error(paths, self.images.width[rows].tolist(), self.images.height[rows].tolist(), error)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.image_root)


def _remedy(path: Path) -> str:
    return f"Make it with: nemo-dali index REFER_ROOT --dataset NAME --split-by BY --split SPLIT --images DIR -o {path}"


def _reopen(path: Path, image_root: str) -> Dataset:
    return replace(Dataset.open(path), image_root=image_root)


def _read(file: h5py.File, path: Path, root: str | None) -> Dataset:
    mapped = MappedFile(file, path)
    tables = {
        group: {name: _column(file, f"{group}/{name}", dtype, mapped) for name, dtype in columns.items()}
        for group, columns in COLUMNS.items()
    }
    others = {name: _column(file, name, dtype, mapped) for name, dtype in OTHER_COLUMNS.items()}
    return Dataset(
        path=path,
        mapped=mapped,
        fingerprint=str(file.attrs["fingerprint"]),
        name=str(file.attrs["name"]),
        image_root=image_root(file.attrs["image_root"]) if root is None else root,
        left_out=int(file.attrs["left_out"]),
        images=Images(**tables["images"]),
        refs=Refs(**tables["refs"]),
        sentences=Sentences(**tables["sentences"]),
        image_categories=others["image_categories"],
        category_id=others["categories/id"],
        category_name=others["categories/name"],
        rle_counts=others["rle/counts"],
    )


def _column(file: h5py.File, name: str, dtype: str, mapped: MappedFile) -> Any:
    column = file[name]
    if not isinstance(column, h5py.Dataset) or column.ndim != 1:
        raise ValueError(f"/{name} is not a column")
    if not dtype:
        if name in ("images/file_name", "categories/name"):  # few, and always needed
            return read_strings(column)
        return _Strings(mapped, name, len(column))
    if column.dtype != np.dtype(dtype):
        raise ValueError(f"/{name} is {column.dtype}, not {np.dtype(dtype)}")
    return map_array(column)


def _damage(dataset: Dataset) -> str | None:
    """The first thing in the columns that contradicts another, or None. Reads every numeric column once."""
    images, refs, sentences = dataset.images, dataset.refs, dataset.sentences
    photos, categories = len(images.id), len(dataset.category_id)
    for what, table in (("images", images), ("refs", refs), ("sentences", sentences)):
        lengths = {len(getattr(table, f.name)) for f in fields(table)}
        if len(lengths) > 1 or 0 in lengths:
            return f"the columns of /{what} are not equally long, or empty"
    if len(dataset.category_name) != categories:
        return "the columns of /categories are not equally long"
    for what, values, low, high in (
        ("images/width", images.width, 1, MAX_SIDE + 1),
        ("images/height", images.height, 1, MAX_SIDE + 1),
        ("refs/image", refs.image, 0, photos),
        ("refs/category", refs.category, -1, categories),
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
            return f"the ranges of /{what}_begin and _count do not lie side by side"
    if refs.sentence_count.min() < 1 or not np.array_equal(
        sentences.ref, np.repeat(np.arange(len(refs.image)), refs.sentence_count)
    ):
        return "/sentences/ref does not fit the refs' ranges"
    some = refs.rle_count > 0
    area = images.width.astype(np.int64) * images.height
    runs = np.add.reduceat(dataset.rle_counts, refs.rle_begin[some], dtype=np.int64) if some.any() else np.empty(0)
    if not (some | (refs.empty == 1)).all() or not np.array_equal(runs, area[refs.image[some]]):
        return "the run lengths of a ref do not add up to its photo's pixels"
    if not all(map(is_inside, images.file_name)):
        return "/images/file_name has a name that leaves the image root"
    return None


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexReport:
    """What ``index_dataset`` wrote."""

    output: Path
    fingerprint: str
    photos: int
    refs: int
    sentences: int
    left_out: tuple[str, ...]  # file names of corrupt photos
    left_out_refs: int


def index_dataset(
    annotations: Annotations,
    *,
    images: str | Path,
    output: str | Path,
    verify: bool = False,
    skip_corrupt: bool = False,
) -> IndexReport:
    """Check every photo against its annotation and write the data set file.

    Args:
        images: the folder, or the address s3://bucket/prefix, that the file names of the photos are relative to.
        output: the .ris.h5 file; one that exists is replaced only when the new one is complete.
        verify: decode every photo instead of only reading its header.
        skip_corrupt: leave out photos that cannot be read, with their refs, instead of failing.

    Raises:
        PhotoError: a photo is missing, cannot be read, or has another size than annotated.
        FileFormatError: the output cannot be written.
    """
    root = image_root(images)
    if not is_remote(root) and not os.path.isdir(root):
        raise PhotoError(f"{root} is no folder of photos. Say where they are with --images.")
    check_names(root, annotations.images.file_name)
    output = Path(output)
    with write_h5(output, format=FORMAT, version=VERSION) as file:
        corrupt = check_photos(annotations.images, root, verify=verify, skip_corrupt=skip_corrupt).corrupt
        kept = _without(annotations, corrupt)
        columns = _flat_columns(kept)
        for name, column in columns.items():
            (write_array if isinstance(column, np.ndarray) else write_strings)(file, name, column)
        file.attrs["fingerprint"] = digest = fingerprint(columns)
        file.attrs["name"] = annotations.name
        file.attrs["image_root"] = root
        file.attrs["left_out"] = len(corrupt)
    return IndexReport(
        output=output,
        fingerprint=digest,
        photos=len(kept.images.id),
        refs=len(kept.refs.ref_id),
        sentences=len(kept.sentences.sent_id),
        left_out=tuple(annotations.images.file_name[row] for row in corrupt),
        left_out_refs=len(annotations.refs.ref_id) - len(kept.refs.ref_id),
    )


def _flat_columns(annotations: Annotations | Dataset) -> dict[str, npt.NDArray[Any] | list[str]]:
    """Everything that the file holds, by the names of its datasets."""
    columns: dict[str, Any] = {
        f"{group}/{name}": getattr(getattr(annotations, group), name) for group in COLUMNS for name in COLUMNS[group]
    }
    columns["image_categories"] = annotations.image_categories
    columns["categories/id"] = annotations.category_id
    columns["categories/name"] = annotations.category_name
    columns["rle/counts"] = annotations.rle_counts
    types = {f"{group}/{name}": dtype for group in COLUMNS for name, dtype in COLUMNS[group].items()} | OTHER_COLUMNS
    return {name: np.asarray(columns[name], dtype) if dtype else list(columns[name]) for name, dtype in types.items()}


def _without(annotations: Annotations, photos: list[int]) -> Annotations:
    """The same less these photos and their refs."""
    images, refs = annotations.images, annotations.refs
    keep = np.ones(len(images.id), bool)
    keep[photos] = False
    keep_ref = keep[refs.image]
    if not keep_ref.any():
        raise PhotoError("No photo is left, so there is nothing to index. Replace the photos.")
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
