"""The stream loader beside decode-only DALI, for both resamplings; results go to benchmarks/results/.

    python benchmarks/stream.py                              generated photos of about 640x480
    python benchmarks/stream.py F.ris.h5 F.neg.h5            one's own

Prints the medians and writes stream.<resample>.json. The ratio counts; samples per second depend on the machine's day.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from nemo_dali.annotations import read_refer
from nemo_dali.bench import bench_loader
from nemo_dali.dataset import Dataset, index_dataset
from nemo_dali.loader import Loader
from nemo_dali.policy import MosaicPolicy
from nemo_dali.synthetic import synthesize
from nemo_dali.table import write_table

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("negatives", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.dataset is not None and options.negatives is None:
        parser.error("a data set needs its negative table")
    measured = revision()  # before the results change the tree
    with tempfile.TemporaryDirectory() as folder:
        files = (options.dataset, options.negatives) if options.dataset else generate(Path(folder))
        for resample in ("cv2-linear", "pillow-bilinear"):
            loader = Loader(
                *files,
                batch_size=options.batch_size,
                policy=MosaicPolicy(p_mined=1.0),
                num_threads=2,
                resample=resample,
            )
            result = bench_loader(loader, pairs=options.pairs, steps=options.steps)
            result["revision"] = measured
            options.output.mkdir(parents=True, exist_ok=True)
            path = options.output / f"stream.{resample}.json"
            path.write_text(json.dumps(result, indent=2) + "\n")
            medians = {name: result[name]["median"] for name in ("samples_per_s", "decode_only", "ratio_decode_only")}
            print(resample, medians, path)


def generate(folder: Path) -> tuple[Path, Path]:
    """A generated data set with a table of random similarities: which photos are drawn does not matter to the clock."""
    synthesize(folder / "data", images=400)
    annotations = read_refer(folder / "data", dataset="refcoco", split_by="unc", split="train")
    paths = folder / "data.ris.h5", folder / "data.neg.h5"
    index_dataset(annotations, images=folder / "data/images/mscoco/images/train2014", output=paths[0])
    dataset = Dataset.open(paths[0])
    random = np.random.default_rng(0)
    sentences, photos = len(dataset.sentences.ref), len(dataset.images.id)
    own = dataset.refs.image[dataset.sentences.ref]
    neighbors = random.permuted(np.tile(np.arange(photos, dtype=np.int32), (sentences, 1)), axis=1)
    neighbors = neighbors[neighbors != own[:, None]].reshape(sentences, photos - 1)
    write_table(
        paths[1],
        blocks=[(neighbors, -np.sort(-random.random(neighbors.shape, np.float32), axis=1))],
        text_embedding=np.ones((sentences, 1), np.float32),
        image_embedding=np.ones((photos, 1), np.float32),
        depth=1000,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="random",
        pretrained="none",
        weights_hash="",
        exclusions=["own photo"],
    )
    return paths


def revision() -> str:
    """The git revision that is measured, with a plus sign where files have been changed since."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip()


if __name__ == "__main__":
    main()
