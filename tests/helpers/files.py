"""Small data sets with their negative tables, in files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from nemo_dali.data.annotations import read_refer
from nemo_dali.data.columns import Annotations, Images, Refs, Sentences
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from tests.helpers.refer import write_refer
from tests.helpers.tables import write_random_table


class Files(NamedTuple):
    dataset: Path  # .ris.h5
    negatives: Path  # .neg.h5
    photos: Path  # folder


def make_files(folder, *, photos=24, refs_per_photo=2, seed=0):
    refer = write_refer(folder, photos=photos, refs_per_photo=refs_per_photo, seed=seed)
    files = Files(folder / "data.ris.h5", folder / "data.neg.h5", refer.photos)
    annotations = read_refer(refer.root, dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=files.dataset)
    write_random_table(files.negatives, Dataset.open(files.dataset), seed=seed)
    return files


def index_refer(folder, *, photos=14, split="train", seed=0, edit=None):
    """A data set file of generated annotations in REFER's layout."""
    refer = write_refer(folder, photos=photos, split=split, seed=seed, edit=edit)
    path = folder / f"{split}.ris.h5"
    annotations = read_refer(refer.root, dataset="refcoco", split_by="unc", split=split)
    index_dataset(annotations, images=refer.photos, output=path)
    return path


def index_grefs(folder, *, photos=30, none=4):
    """A data set file of gRefCOCO's layout; every ref whose number is divisible by ``none`` has no target."""

    def generalise(refs, instances):
        for number, ref in enumerate(refs):
            ref["ann_id"] = [-1] if number % none == 0 else [ref["ann_id"]]
            ref["category_id"] = [-1] if number % none == 0 else [ref["category_id"]]

    refer = write_refer(folder, photos=photos, dataset="grefcoco", refs_file="grefs(unc).json", edit=generalise)
    annotations = read_refer(refer.root, dataset="grefcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=folder / "grefs.ris.h5")
    return folder / "grefs.ris.h5"


def make_noise(folder: Path, *, photos: int = 11, seed: int = 0, each: int = 3) -> Path:
    """Photos of noise, one ref each, ``each`` sentences per ref."""
    rng = np.random.default_rng(seed)
    (folder / "photos").mkdir(parents=True)
    sizes = rng.integers(40, 90, (photos, 2))
    names = [f"{row}.jpg" for row in range(photos)]
    for name, (width, height) in zip(names, sizes, strict=True):
        noise = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        noise.resize((width, height)).convert("L" if name == "3.jpg" else "RGB").save(folder / "photos" / name)
    row, nothing = np.arange(photos), np.full(photos, -1)
    words = ["left", "right", "red", "big", "the", "dog", "on", "chair"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 20))) for _ in range(photos * each)]
    annotations = Annotations(
        name="noise",
        images=Images(row, sizes[:, 0], sizes[:, 1], names, row * 0, row * 0),
        refs=Refs(
            ref_id=row,
            ann_id=row,
            image=row[::-1],
            category=nothing,
            sentence_begin=row * each,
            sentence_count=row * 0 + each,
            rle_begin=row * 2,
            rle_count=row * 0 + 2,
            empty=row * 0,
            no_target=nothing,
            source=[""] * photos,
            distractors=nothing,
        ),
        sentences=Sentences(np.arange(len(texts)), np.repeat(row, each), texts, texts),
        image_categories=np.zeros(0, np.int32),
        category_id=np.zeros(0, np.int64),
        category_name=[],
        rle_counts=np.stack([row[::-1] * 0, sizes[::-1].prod(axis=1)], axis=1).ravel().astype(np.uint32),
    )
    index_dataset(annotations, images=folder / "photos", output=folder / "noise.ris.h5")
    return folder / "noise.ris.h5"
