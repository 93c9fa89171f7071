"""Mirrors of RefCOCO, RefCOCO+ and RefCOCOg as Parquet ▸ columns in memory: nearly what REFER's files of them give.

``jxu124/refcoco``, ``refcocoplus`` and ``refcocog`` have one row per ref, with the records of its annotation and its
photo as JSON. Nothing else of ``instances.json`` is there: no names of categories, no annotations of other objects.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_dali.data.annotations._untrusted import RunBudget, field, no_split
from nemo_dali.data.annotations.refer import Instances, in_split, refs_in_columns
from nemo_dali.data.columns import Annotations
from nemo_dali.errors import AnnotationError
from nemo_dali.io.files import check_regular
from nemo_dali.io.parquet import parquet_pieces

COLUMNS = ("ref_id", "ann_id", "image_id", "category_id", "split", "sentences", "raw_anns", "raw_image_info")
ROWS = 1024  # of a piece, a few kilobytes each
# Bytes of all rows in memory: the published files have about 200 MB. Compressed data may expand to any size.
FREE_BYTES, BYTES_PER_BYTE = 4 << 30, 50


def is_parquet(path: Path) -> bool:
    """Whether a path is a Parquet file by its name, or a folder that holds some."""
    return path.suffix == ".parquet" or (path.is_dir() and next(path.glob("*.parquet"), None) is not None)


def read_parquet_mirror(
    path: str | Path, *, split: str, leave_out: Sequence[str] = (), skip_empty: bool = False
) -> Annotations:
    """Read one split of a mirror.

    Args:
        path: a file, such as ``train-00000-of-00001.parquet``, or a folder, whose ``*.parquet`` are read in name order.
        split: ``train``, ``val``, ``test``, ``testA`` or ``testB``, by the column ``split``, matched as REFER does.
        leave_out, skip_empty: as for ``read_refer``.

    Raises:
        AnnotationError: a file cannot be read, the split does not exist, or a record cannot be used.
        NemoError: pyarrow is not installed, or a file is not a Parquet file or lacks a column.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    refs, splits, categories = list[Any](), list[str](), set[int]()
    photos, annotations = dict[int, Any](), dict[int, Any]()
    try:
        size = sum(map(check_regular, files))
        for where, ref in _rows(files, size):
            splits.append(field(ref, "split", str, where))
            categories.add(field(ref, "category_id", int, where))
            if not in_split(splits[-1], split):
                continue
            ids = {name: field(ref, name, int, where) for name in ("ann_id", "image_id", "category_id")}
            own = {"id": ids["ann_id"], "image_id": ids["image_id"], "category_id": ids["category_id"]}
            _take(ref.pop("raw_anns"), annotations, own, f"'raw_anns' of {where}")
            _take(ref.pop("raw_image_info"), photos, {"id": ids["image_id"]}, f"'raw_image_info' of {where}")
            refs.append(ref)
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    if not refs:
        raise no_split(path, split, splits, "refs")
    names = {category_id: {"name": f"category {category_id}"} for category_id in sorted(categories)}
    instances = Instances(path, photos, annotations, names, budget=RunBudget(size))
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    return refs_in_columns(
        refs, path, instances, name=f"{folder.name}-{split}", leave_out=leave_out, skip_empty=skip_empty
    )


def _rows(files: list[Path], size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row is, for messages, and its values."""
    left = FREE_BYTES + BYTES_PER_BYTE * size
    for path in files:
        row = 0
        for piece in parquet_pieces(path, COLUMNS, what="a mirror of RefCOCO", rows=ROWS):
            left -= piece.nbytes
            if left < 0:
                raise AnnotationError(f"{path} takes far more memory than its size explains. Check the file.")
            for values in piece.to_pylist():
                yield f"row {row} of {path}", values
                row += 1


def _take(text: Any, table: dict[int, Any], own: dict[str, int], where: str) -> None:
    """Put a record, given as JSON, into the table under its id; ``own`` is what the row says about it."""
    try:
        record = json.loads(text) if type(text) is str else None
    except (ValueError, RecursionError):
        record = None
    if type(record) is not dict:
        raise AnnotationError(f"{where} is not a JSON record. Get the file again.")
    record = own | record
    for name, value in own.items():
        if field(record, name, int, where) != value:
            raise AnnotationError(f"{where} has a different '{name}' than its row. Get the file again.")
    if table.setdefault(own["id"], record) != record:
        raise AnnotationError(f"{where} differs from what another row has for the same id. Get the file again.")
