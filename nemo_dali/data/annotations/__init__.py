"""Annotation files of referring image segmentation ▸ columns in memory: what ``nemo-dali index`` reads.

REFER's layout, gRefCOCO, Ref-ZOM   refer           ┐
JSON lines                          json_lines      ├─▶ columns ─▶ dataset
an LMDB of CRIS                     cris_lmdb       │
a mirror of RefCOCO as Parquet      parquet_mirror  ┘
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_dali._checks import PathLike, as_list
from nemo_dali._choices import Exif
from nemo_dali.data.annotations.cris_lmdb import is_lmdb, read_cris_lmdb
from nemo_dali.data.annotations.json_lines import DEFAULT_SPLIT, read_json_lines
from nemo_dali.data.annotations.parquet_mirror import is_parquet, read_parquet_mirror
from nemo_dali.data.annotations.refer import read_refer
from nemo_dali.data.columns import Annotations
from nemo_dali.data.orientation import EXIF
from nemo_dali.errors import AnnotationError

__all__ = ["read_annotations", "read_cris_lmdb", "read_json_lines", "read_parquet_mirror", "read_refer"]


def read_annotations(
    source: str | Path,
    *,
    images: PathLike | Sequence[PathLike],
    dataset: str | None = None,
    split_by: str | None = None,
    split: str | None = None,
    leave_out: Sequence[str] = (),
    skip_empty: bool = False,
    box_format: str | None = None,
    exif: Exif | None = None,
) -> Annotations:
    """Read one split of a data set in any of the layouts.

    Args:
        source: a folder for ``read_refer``, a ``.jsonl`` file for ``read_json_lines``, a ``.lmdb`` for
            ``read_cris_lmdb``, or a ``.parquet`` file, or a folder of them, for ``read_parquet_mirror``.
        images: the folder of photos, or several; the photos of an LMDB are written to it, and it must be one folder.
        dataset, split_by: for ``read_refer``, which needs them; not for the others.
        leave_out: for ``read_refer`` and ``read_parquet_mirror``.
        skip_empty: skip sentences without text, and refs without a sentence, instead of refusing them; the log says how
            many.
        box_format: the format of the boxes in JSON lines; see ``read_json_lines``.
        split: must be given for ``read_refer``; ``train`` by default for JSON lines and Parquet; an LMDB is one split.
        exif: how the photos were annotated, and are to be shown: "ignore", as stored; "apply", turned by their EXIF
            orientation, as viewers show them; "refuse", only photos for which these are the same: ``index_dataset``
            refuses others. None: "refuse" for JSON lines, "ignore" for the others, as their publishers' code does.

    Raises:
        ValueError: an argument is missing, or does not fit the source.
        AnnotationError: the source cannot be used.
        NemoError: something else fails: a photo, a package, the disk.
    """
    source = Path(source)
    if box_format is not None and source.suffix != ".jsonl":
        raise ValueError(f"box_format ({box_format}) must be left out with {source.name}, which is not a .jsonl file")
    if exif not in (None, *EXIF):
        raise ValueError(f"exif ({exif!r}) must be one of {EXIF}")
    # A folder may have both Parquet files and REFER's layout; the latter is asked for by name.
    parquet = is_parquet(source) and (not source.is_dir() or (dataset is None and split_by is None))
    if source.suffix == ".jsonl" or is_lmdb(source) or parquet:
        given = [("dataset", dataset), ("split_by", split_by), ("leave_out", [] if parquet else list(leave_out))]
        for name, value in given:
            if value:
                raise ValueError(f"{name} ({value}) must be left out with {source.name}")
        wanted = DEFAULT_SPLIT if split is None else split
        if parquet:
            return read_parquet_mirror(source, split=wanted, leave_out=leave_out, skip_empty=skip_empty)
        if source.suffix == ".jsonl":
            return read_json_lines(
                source,
                images=images,
                split=wanted,
                skip_empty=skip_empty,
                box_format=box_format,
                exif=exif or "refuse",
            )
        if split not in (None, source.stem):
            raise ValueError(f"split ({split}) must be left out with {source.name}, which holds one split")
        if len(folders := as_list(images)) > 1:
            raise ValueError(f"images must be one folder with {source.name}, whose photos are extracted into it")
        return read_cris_lmdb(source, images=folders[0], skip_empty=skip_empty, exif=exif or "ignore")
    if source.is_file():
        raise AnnotationError(
            f"{source} is neither a folder, nor a .jsonl or .parquet file, nor a .lmdb. Check the path."
        )
    if dataset is None or split_by is None or split is None:
        missing = f"dataset ({dataset}), split_by ({split_by}) and split ({split})"
        raise ValueError(f"{missing} must be given with {source}, a folder in REFER's layout")
    annotations = read_refer(
        source, dataset=dataset, split_by=split_by, split=split, leave_out=leave_out, skip_empty=skip_empty
    )
    return replace(annotations, exif=exif or "ignore")
