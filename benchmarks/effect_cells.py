"""What is hard about a mosaic's cells: how often trained models find a target that is blurred, small, or among others.

    python benchmarks/effect_cells.py --work DIR     after effect.py --work DIR --study larger, from its checkpoints

Each model is asked for the hard samples of the evaluation in several ways: ``whole``, the photo fills the frame;
``blurred``, it does, but with a cell's pixels, reduced to half its side and enlarged again; ``small``, reduced, in a
quarter of a frame that is empty otherwise. The fourth is a mosaic of photos that show nothing that fits, which the
runs were measured on. Writes benchmarks/results/effect-cells.json; ``effect_report.py`` makes a table of it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import revision
from effect import WORDS, Training
from effect_data import Asked, Files
from effect_numbers import chosen, recorded, value
from effect_study import STUDIES
from torch.nn.functional import interpolate

from nemo_dali.commands.bench import machine
from nemo_dali.loader.batch import Batch
from nemo_dali.loader.loader import Loader
from nemo_dali.metrics import Segmentation
from nemo_dali.plan.policy import MosaicPolicy

STUDY = "larger"  # single photos and mosaics, of the same photos and steps
Shown = tuple[torch.Tensor, torch.Tensor]  # images [B, 3, S, S] and masks [B, S, S]


def whole(batch: Batch) -> Shown:
    """The photos as they are."""
    return batch.image, batch.mask


def blurred(batch: Batch) -> Shown:
    """The photos with a quarter of their pixels."""
    return interpolate(_reduced(batch.image), batch.image.shape[2:], mode="bilinear"), batch.mask


def small(batch: Batch) -> Shown:
    """The photos in a quarter of a frame of the mean colour, one quarter after the other."""
    image, mask = torch.zeros_like(batch.image), torch.zeros_like(batch.mask)
    half = image.shape[-1] // 2
    photos = _reduced(batch.image)
    masks = interpolate(batch.mask[:, None], (half, half), mode="nearest")[:, 0]
    for sample, position in enumerate(batch.plan["position"].tolist()):
        y, x = divmod(position % 4, 2)
        image[sample, :, y * half :, x * half :][:, :half, :half] = photos[sample]
        mask[sample, y * half :, x * half :][:half, :half] = masks[sample]
    return image, mask


WAYS: dict[str, Callable[[Batch], Shown]] = {"whole": whole, "blurred": blurred, "small": small}


def _reduced(image: torch.Tensor) -> torch.Tensor:
    half = image.shape[-1] // 2
    return interpolate(image, (half, half), mode="bilinear", antialias=True)


@torch.inference_mode()
def found(files: Files, arm: str, seed: int) -> dict[str, float]:
    """P@0.5 of a trained model on hard samples, in percent, by the way in which they are shown."""
    study, asked = files.study, Asked.of(files, "hard")
    training = Training(torch.device("cpu"), learning_rate=study.learning_rate, steps=1, warm_up=0)
    training.load_state_dict(torch.load(files.checkpoint(arm, seed), weights_only=True)["training"])
    model = training.segmenter.eval()
    loader = Loader(
        files.dataset("hard"),
        batch_size=study.batch_size,
        policy=MosaicPolicy(p_mined=0),
        tiles=files.tiles("hard"),
        samples="first",
        drop_last=False,
        size=study.size,
        context_length=WORDS,
    )
    metrics = {way: Segmentation("lavt") for way in WAYS}
    for batch in loader:
        new = batch.plan["position"] < asked.refs  # the last batch is filled up with the first samples
        for way, shown in WAYS.items():
            image, mask = shown(batch)
            metrics[way].update((model(image, batch.tokens, batch.attention_mask) > 0)[new], mask[new])
    loader.close()
    return {way: 100 * float(np.mean(metric.per_sample()["iou"] >= 0.5)) for way, metric in metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the files and checkpoints")
    options = parser.parse_args()
    files, study = Files(options.work, STUDIES[STUDY]), json.loads(recorded(STUDY).read_text())
    runs: list[dict[str, Any]] = []
    for run in sorted(study["runs"], key=lambda run: (run["seed"], run["arm"])):
        looked = found(files, run["arm"], run["seed"])
        before = value(chosen(run, "single", hard=True), "P@0.5")
        if abs(looked["whole"] - before) > 0.5:  # another machine's last bits do less
            raise SystemExit(f"{options.work} holds another training of {run['arm']}, seed {run['seed']}: {looked}.")
        runs.append({"arm": run["arm"], "seed": run["seed"], **looked})
        print(runs[-1], flush=True)
    record = {"design": files.study.digest(), "revision": revision(), "machine": machine(), "runs": runs}
    recorded("cells").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
