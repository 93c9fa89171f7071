"""Data that several test files share: a small data set and a negative table with random similarities."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset, index_dataset
from nemo_dali.mining.table import write_table
from tests.kernels.cuda_host import library
from tests.played_gpu import played  # noqa: F401  # a fixture
from tests.refer_files import write_refer

CLIP_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def pytest_runtest_setup(item):
    """A test marked ``gpu`` is skipped without a CUDA device; where FAIL_WITHOUT_CUDA=1 that is a failure."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("FAIL_WITHOUT_CUDA") == "1" else pytest.skip)("needs a CUDA device")


class Files(NamedTuple):
    dataset: Path  # .ris.h5
    negatives: Path  # .neg.h5
    photos: Path  # folder


def write_random_table(path, dataset, *, depth=1000, seed=0):
    """A table as mining would write it, but with similarities drawn from a generator."""
    random = np.random.default_rng(seed)
    sentences, photos = len(dataset.sentences.ref), len(dataset.images.id)
    neighbors = np.empty((sentences, min(depth, photos - 1)), np.int32)
    for row, ref in enumerate(dataset.sentences.ref):
        others = np.delete(np.arange(photos), dataset.refs.image[ref])
        neighbors[row] = random.permutation(others)[: neighbors.shape[1]]
    similarity = -np.sort(-random.uniform(0, 0.5, neighbors.shape).astype(np.float32))
    write_table(
        path,
        blocks=[(neighbors, similarity)],
        text_embedding=np.ones((sentences, 1), np.float32),
        image_embedding=np.ones((photos, 1), np.float32),
        depth=depth,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="random",
        pretrained="none",
        weights_hash="0" * 64,
        exclusions=["own photo"],
    )


def make_files(folder, *, photos=24, refs_per_photo=2, seed=0):
    refer = write_refer(folder, photos=photos, refs_per_photo=refs_per_photo, seed=seed)
    files = Files(folder / "data.ris.h5", folder / "data.neg.h5", refer.photos)
    annotations = read_refer(refer.root, dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=files.dataset)
    write_random_table(files.negatives, Dataset.open(files.dataset), seed=seed)
    return files


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """24 photos, 48 refs. Read-only: a test that changes a file makes its own with ``make_files``."""
    return make_files(tmp_path_factory.mktemp("shared"))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests neither read nor leave tokens in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMO_DALI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory):
    """The CUDA source, built for the host; needs g++."""
    return library(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A tiny open_clip model with random weights: its config, its weights and the network itself."""
    import open_clip
    import torch

    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**CLIP_CONFIG).eval()
    (folder / "tiny.json").write_text(json.dumps(CLIP_CONFIG))
    torch.save(network.state_dict(), folder / "tiny.pt")
    return folder, network
