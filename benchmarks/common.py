"""What the benchmarks share: generated data, the GPU to measure, and where results go."""

import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali.commands.bench import machine, versions
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import NemoError
from nemo_dali.mining.table_writer import write_table
from nemo_dali.pipeline.gpu import cuda_device
from nemo_dali.synthetic import synthesize

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def generate(folder: Path, *, images: int = 400) -> tuple[Path, Path]:
    """Generate a data set with a table of random similarities; timings do not depend on which photos are drawn."""
    synthesize(folder / "data", images=images)
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


def in_a_process(measure: Callable[..., None], *arguments: Any) -> dict[str, Any]:
    """What ``measure(*arguments, connection)`` sends from a fresh process with its own memory, threads and imports."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=measure, args=(*arguments, there), daemon=True)
    process.start()
    there.close()  # so that recv() raises if the process dies
    found: dict[str, Any] = here.recv()
    process.join()
    return found


def revision() -> str:
    """The git revision being measured, with a plus sign if files have changed since."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip()


def require_gpu() -> int:
    """The number of the GPU to measure; without one, exits with a message and exit code 1."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a GPU, and torch sees none; 'nemo-dali doctor' says what is missing.")
    try:
        number = cuda_device("cuda")
    except NemoError as error:
        sys.exit(str(error))
    assert number is not None
    return number


def described(device: int, measured: str) -> dict[str, Any]:
    """What every GPU result records about where it was measured; ``measured`` is the git revision."""
    import torch

    here = machine()
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": here.get("driver"),
        "cuda": {"driver": here.get("cuda"), "torch": torch.version.cuda},
        "revision": measured,
        "machine": here,
        "versions": versions(),
    }


def file_name(benchmark: str, device: str) -> str:
    """``benchmark.device.json``, with the device's name in lower-case letters, digits and hyphens."""
    return f"{benchmark}.{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def save(result: dict[str, Any], benchmark: str, folder: Path) -> Path:
    """Write a GPU result to its file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(benchmark, result["device"])
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
