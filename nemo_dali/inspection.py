"""What is in a file of ours, as JSON values and as text: ``nemo-dali inspect``."""

from pathlib import Path
from typing import Any

import h5py

from nemo_dali import dataset, table
from nemo_dali.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.table import NegativeTable


def inspect_file(path: str | Path, *, pools: list[tuple[float | None, int]]) -> dict[str, Any]:
    """Describe a data set file or a negative table after all checks of opening it.

    Args:
        pools: (tau, K) pairs whose pool sizes are wanted; for a table only.

    Returns:
        ``format``, ``version``, ``fingerprint``, ``made_by`` and what the kind of file has.

    Raises:
        FileFormatError: the file is not one of ours or is damaged.
    """
    kind, common = _attributes(Path(path))
    if kind == dataset.FORMAT:
        opened = Dataset.open(path)
        return common | {
            "name": opened.name,
            "image_root": opened.image_root,
            "photos": len(opened.images.id),
            "left_out": opened.left_out,
            "refs": len(opened.refs.ref_id),
            "sentences": len(opened.sentences.ref),
            "categories": len(opened.category_id),
            "run_lengths": len(opened.rle_counts),
        }
    found = NegativeTable.open(path)
    sentences, width = found.neighbors.shape
    return common | {
        "dataset": found.dataset_name,
        "dataset_fingerprint": found.dataset_fingerprint,
        "model": found.model,
        "pretrained": found.pretrained,
        "weights_hash": found.weights_hash,
        "sentences": sentences,
        "photos": len(found.image_embedding),
        "depth": found.depth,
        "neighbors": width,
        "exclusions": found.exclusions,
        "pools": [found.pool_sizes(tau, k) for tau, k in pools],
    }


def _attributes(path: Path) -> tuple[str, dict[str, Any]]:
    kinds = {dataset.FORMAT, table.FORMAT}
    remedy = "Give a file that 'nemo-dali index' or 'nemo-dali mine' made."
    try:
        with h5py.File(path, "r", locking=False) as file:
            kind = str(file.attrs.get("format", "unknown"))
            common = {
                "format": kind,
                "version": int(file.attrs.get("version", -1)),
                "fingerprint": str(file.attrs.get("fingerprint", "")),
                "made_by": str(file.attrs.get("made_by", "")),
            }
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist. {remedy}") from error
    except OSError as error:
        raise FileFormatError(f"{path} is not an HDF5 file or has been cut short. {remedy}") from error
    if kind not in kinds:
        raise FileFormatError(f"{path} is of format '{kind}', not one of {', '.join(sorted(kinds))}. {remedy}")
    return kind, common
