"""Task: what a table is mined from."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.io.h5 import fingerprint
from nemo_dali.mining.clip import Clip, checked_device, load_clip
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.mining.ranking import Excluded
from nemo_dali.mining.table import NegativeTable


@dataclass(frozen=True, eq=False)
class Task:
    """What is mined from."""

    dataset: Dataset
    clips: list[Clip]
    given: NegativeTable | None  # whose embeddings are used instead of the clips'
    excluded: Excluded
    rules: dict[str, Any]  # what is excluded, as attributes of the table
    device: str

    def attributes(self, depth: int, batch_size: int, method: str) -> dict[str, Any]:
        """What the table records, and what ranks must agree on to make one table."""
        made = {
            "dataset_fingerprint": self.dataset.fingerprint,
            "dataset_name": self.dataset.name,
            "depth": depth,
            **self.rules,
            "method": method,
        }
        if self.given is not None:
            names = ("model", "pretrained", "weights_hash", "batch_size", "encoder")
            return made | {name: getattr(self.given, name) for name in names}
        hashes = [clip.weights_hash for clip in self.clips]
        return made | {
            "model": " + ".join(clip.model for clip in self.clips),
            "pretrained": " + ".join(clip.pretrained for clip in self.clips),
            "weights_hash": hashes[0] if len(hashes) == 1 else fingerprint({"models": hashes}),
            "batch_size": batch_size,
            "encoder": " + ".join(clip.encoder for clip in self.clips),
        }


def open_task(
    dataset_path: str | Path,
    images: str | Path | None,
    models: list[str],
    weights: list[str],
    embeddings: str | Path | None,
    device: str | None,
    exclusions: Exclusions,
) -> Task:
    """Open the data set, and load the models or take the embeddings; see ``mine`` for the arguments."""
    import torch

    if device is not None:
        checked_device(device)
    dataset = Dataset.open(dataset_path, images=images)
    if len(dataset.images.id) < 2:
        raise NemoError(f"{dataset.path} has only one photo, so there are no negatives. Index more photos.")
    excluded, rules = exclusions.of(dataset)
    if device in (None, "cuda"):
        local = int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1)
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    given = None
    if embeddings is not None:
        given = NegativeTable.open(embeddings)
        given.check_dataset(dataset)
        given.check_embeddings()
        if excluded.crops_margin is not None:
            if not len(given.crop_embedding):
                raise NemoError(
                    f"{given.path} has no embeddings of crops, which --exclude-crops compares. Mine with --model and "
                    "--pretrained once, which keeps them."
                )
            given.check_embeddings("crop_embedding")
        given.check_all_rows()  # rows are not used, but damage to them should be reported
    else:
        dataset.photo_path(0)  # a missing folder is reported before a model is loaded
    clips = [load_clip(*pair, device=device) for pair in zip(models, weights, strict=True)]
    return Task(dataset, clips, given, excluded, rules, device)
