"""What is in a file of ours, as JSON values and as text: ``nemo-dali inspect``."""

from pathlib import Path
from typing import Any

from nemo_dali import dataset, table
from nemo_dali.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.storage import read_attributes
from nemo_dali.table import NegativeTable


def inspect_file(path: str | Path, *, pools: list[tuple[float | None, int]]) -> dict[str, Any]:
    """Describe a data set file or a negative table after all checks of opening it, and of its whole content.

    Args:
        pools: (tau, K) pairs whose pool sizes are wanted; for a table only.

    Returns:
        ``format``, ``version``, ``fingerprint``, ``made_by`` and what the kind of file has.

    Raises:
        FileFormatError: the file is not one of ours or is damaged.
    """
    remedy = "Give a file that 'nemo-dali index' or 'nemo-dali mine' made."
    attributes = read_attributes(path, remedy=remedy)
    kind = str(attributes.get("format", "unknown"))
    if kind not in (dataset.FORMAT, table.FORMAT):
        raise FileFormatError(f"{path} is of format '{kind}', not {dataset.FORMAT} or {table.FORMAT}. {remedy}")
    common = {
        "format": kind,
        "version": int(attributes.get("version", -1)),
        "fingerprint": str(attributes.get("fingerprint", "")),
        "made_by": str(attributes.get("made_by", "")),
    }
    opened = Dataset.open(path) if kind == dataset.FORMAT else NegativeTable.open(path)
    if opened.content_fingerprint() != opened.fingerprint:
        raise FileFormatError(f"{path} is damaged: its content does not match its fingerprint. Make it again.")
    if isinstance(opened, Dataset):
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
        "pools": [opened.pool_sizes(tau, k) for tau, k in pools],
    }
