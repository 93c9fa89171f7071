"""Annotation files of referring image segmentation ▸ columns in memory: what ``nemo-dali index`` reads.

REFER's layout, gRefCOCO, Ref-ZOM   refer       ┐
JSON lines                          json_lines  ├─▶ columns ─▶ dataset
an LMDB of CRIS                     cris_lmdb   ┘
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemo_dali.data.annotations.cris_lmdb import is_lmdb, read_cris_lmdb
from nemo_dali.data.annotations.json_lines import DEFAULT_SPLIT, read_json_lines
from nemo_dali.data.annotations.refer import read_refer
from nemo_dali.data.columns import Annotations
from nemo_dali.data.orientation import EXIF, Exif
from nemo_dali.errors import AnnotationError

__all__ = ["read_annotations", "read_cris_lmdb", "read_json_lines", "read_refer"]


def read_annotations(
    source: str | Path,
    *,
    images: str | Path,
    dataset: str | None = None,
    split_by: str | None = None,
    split: str | None = None,
    leave_out: Sequence[str] = (),
    skip_empty: bool = False,
    exif: Exif | None = None,
) -> Annotations:
    """Read one split of a data set in any of the layouts.

    Args:
        source: a folder for ``read_refer``, a ``.jsonl`` file for ``read_json_lines``, or a ``.lmdb`` for
            ``read_cris_lmdb``.
        images: the folder of photos; photos of an LMDB are written there.
        dataset, split_by, leave_out: for ``read_refer`` only; the first two must be given then.
        skip_empty: skip sentences without text, and refs without a sentence, instead of refusing them; the log says how
            many.
        split: must be given for ``read_refer``; ``train`` by default for JSON lines; an LMDB is one split.
        exif: what was annotated, and is to be shown: "ignore", photos as stored; "apply", photos turned by their EXIF
            orientation, as viewers show them; "refuse", photos for which that is the same, and ``index_dataset``
            refuses others. None: "refuse" for JSON lines, "ignore" for the others, as their publishers' code does.

    Raises:
        ValueError: an argument is missing, or does not go with the source.
        AnnotationError: the source cannot be used.
        NemoError: something else is in the way: a photo, a package, the disk.
    """
    source = Path(source)
    if exif not in (None, *EXIF):
        raise ValueError(f"exif ({exif!r}) must be one of {EXIF}")
    if source.suffix == ".jsonl" or is_lmdb(source):
        for name, value in (("dataset", dataset), ("split_by", split_by), ("leave_out", list(leave_out))):
            if value:
                raise ValueError(f"{name} ({value}) must be left out with {source.name}")
        if source.suffix == ".jsonl":
            split = DEFAULT_SPLIT if split is None else split
            return read_json_lines(source, images=images, split=split, skip_empty=skip_empty, exif=exif or "refuse")
        if split not in (None, source.stem):
            raise ValueError(f"split ({split}) must be left out with {source.name}, which holds one split")
        return read_cris_lmdb(source, images=images, skip_empty=skip_empty, exif=exif or "ignore")
    if source.is_file():
        raise AnnotationError(f"{source} is neither a folder, nor a .jsonl file, nor a .lmdb. Check the path.")
    if dataset is None or split_by is None or split is None:
        given = f"dataset ({dataset}), split_by ({split_by}) and split ({split})"
        raise ValueError(f"{given} must be given with {source}, a folder in REFER's layout")
    annotations = read_refer(
        source, dataset=dataset, split_by=split_by, split=split, leave_out=leave_out, skip_empty=skip_empty
    )
    return replace(annotations, exif=exif or "ignore")
