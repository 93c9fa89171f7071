"""What is in a nemo-dali file, as JSON values: ``nemo-dali inspect``."""

from pathlib import Path
from typing import Any

from nemo_dali.data import dataset
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import read_kind
from nemo_dali.mining import table
from nemo_dali.mining.table import NegativeTable
from nemo_dali.tiles import file as tile_file
from nemo_dali.tiles.file import TileFile


def inspect_file(path: str | Path, *, pools: list[tuple[float | None, int]]) -> dict[str, Any]:
    """Describe a data set file, a negative table or a tile file after opening it with all checks.

    Its whole content is read and compared with its fingerprint.

    Args:
        pools: (tau, K) pairs whose pool sizes are wanted; for a table only.

    Returns:
        ``format``, ``version``, ``fingerprint``, ``made_by`` and what the kind of file has.

    Raises:
        FileFormatError: the file is not a nemo-dali file or is damaged.
    """
    remedy = "Give a file made by 'nemo-dali index', 'nemo-dali mine' or 'nemo-dali tiles'."
    kind = read_kind(path, remedy=remedy)
    kinds: dict[str, type[Dataset] | type[NegativeTable] | type[TileFile]]
    kinds = {dataset.FORMAT: Dataset, table.FORMAT: NegativeTable, tile_file.FORMAT: TileFile}
    if kind not in kinds:
        raise FileFormatError(f"{path} has format '{kind}', not one of {', '.join(kinds)}. {remedy}")
    opened = kinds[kind].open(path)
    if isinstance(opened, NegativeTable):
        opened.check_all_rows()
        if opened.has_embeddings:
            opened.check_embeddings()
    index = opened.mapped.index
    common: dict[str, Any] = {"format": index.format, "version": index.version}
    common |= {"fingerprint": index.fingerprint, "made_by": index.made_by}
    if opened.content_fingerprint() != opened.fingerprint:
        raise FileFormatError(f"{path} is damaged: its content does not match its fingerprint. Make it again.")
    if isinstance(opened, Dataset):
        return common | {
            "name": opened.name,
            "image_root": opened.image_root,
            "photos": len(opened.images.id),
            "left_out": opened.left_out,
            "refs": len(opened.refs.ref_id),
            "no_target": int((opened.refs.empty == 1).sum()),
            "sentences": len(opened.sentences.ref),
            "categories": len(opened.category_id),
            "run_lengths": len(opened.rle_counts),
            "box_format": opened.box_format,
            "exif": opened.exif,
            "rotated": int((opened.photo_files.orientation > 1).sum()),
        }
    if isinstance(opened, TileFile):
        return common | {
            "dataset": opened.dataset_name,
            "dataset_fingerprint": opened.dataset_fingerprint,
            "photos": len(opened.digest),
            "size": opened.size,
            "resample": opened.resample,
            "grids": list(opened.grids),
            "cells": [f"{h}x{w}" for h, w in opened.arrays],
            "decoder": opened.decoder,
            "bytes": Path(path).stat().st_size,
        }
    sentences, width = opened.neighbors.shape
    return common | {
        "dataset": opened.dataset_name,
        "dataset_fingerprint": opened.dataset_fingerprint,
        "model": opened.model,
        "pretrained": opened.pretrained,
        "weights_hash": opened.weights_hash,
        "sentences": sentences,
        "photos": len(opened.image_embedding),
        "depth": opened.depth,
        "neighbors": width,
        "exclusions": opened.exclusions,
        "excluded_photos": int(opened.excluded_photos.sum()),
        "method": opened.method,
        "recall": [{"n": int(n), "recall": float(share)} for n, share in opened.recall],
        "pools": [opened.pool_sizes(tau, k) for tau, k in pools],
    }
