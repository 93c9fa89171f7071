"""Small data sets in REFER's layout for tests: photos of noise, random polygons, any edit to the records."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nemo_dali.data.columns import Annotations

Edit = Callable[[list[Any], dict[str, list[Any]]], None]
CATEGORIES = [{"id": i, "name": name} for i, name in ((1, "person"), (18, "dog"), (44, "bottle"))]


class ReferFiles(NamedTuple):
    root: Path  # what read_refer and `nemo-dali index` take
    photos: Path  # the folder of photos
    refs: list[Any]
    instances: dict[str, list[Any]]


def write_refer(
    folder: Path,
    *,
    photos: int = 6,
    refs_per_photo: int = 2,
    split: str = "train",
    dataset: str = "refcoco",
    split_by: str = "unc",
    protocol: int = 2,
    seed: int = 0,
    refs_file: str | None = None,
    edit: Edit | None = None,
) -> ReferFiles:
    """Write ``<folder>/refer/<dataset>`` and ``<folder>/photos``; ``edit(refs, instances)`` may change the records.

    Ids are not row numbers, photos are not in the order of their ids, and a ref's own file name is wrong, as in
    RefCOCO. Every photo has as many refs as asked for and one crowd annotation (uncompressed run lengths).
    ``refs_file`` is another name for the file of refs, which is JSON if the name ends in .json.
    """
    random = np.random.default_rng(seed)
    photo_folder = folder / "photos"
    photo_folder.mkdir(parents=True)
    refs: list[Any] = []
    instances: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": CATEGORIES}
    sent_id = 500
    for number in random.permutation(photos).tolist():
        width, height = random.integers(40, 120, 2).tolist()
        image_id, file_name = 1000 + 7 * number, f"COCO_train2014_{1000 + 7 * number:012d}.jpg"
        pixels = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(photo_folder / file_name, quality=90)
        instances["images"].append({"id": image_id, "width": width, "height": height, "file_name": file_name})
        crowd = {"size": [height, width], "counts": [5, 10, width * height - 15]}
        instances["annotations"].append(
            {"id": 9000 + number, "image_id": image_id, "category_id": 44, "iscrowd": 1, "segmentation": crowd}
        )
        for _ in range(refs_per_photo):
            ann_id, ref_id = 300 + 3 * len(refs), 70 + 2 * len(refs)
            polygon = (random.uniform(0, 1, (5, 2)) * (width, height)).round(2).ravel().tolist()
            category_id = int(random.choice([1, 18]))
            instances["annotations"].append(
                {
                    "id": ann_id,
                    "image_id": image_id,
                    "category_id": category_id,
                    "iscrowd": 0,
                    "segmentation": [polygon],
                }
            )
            sentences = [
                {
                    "sent_id": sent_id + k,
                    "sent": f"thing {ref_id} no {k}",
                    "raw": f"Thing {ref_id}, no. {k}!",
                    "tokens": [],
                }
                for k in range(int(random.integers(1, 4)))
            ]
            sent_id += len(sentences)
            refs.append(
                {
                    "ref_id": ref_id,
                    "ann_id": ann_id,
                    "image_id": image_id,
                    "category_id": category_id,
                    "split": split,
                    "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    if edit is not None:
        edit(refs, instances)
    root = folder / "refer"
    (root / dataset).mkdir(parents=True)
    refs_path = root / dataset / (refs_file or f"refs({split_by}).p")
    is_json = refs_path.suffix == ".json"
    refs_path.write_bytes(json.dumps(refs).encode() if is_json else pickle.dumps(refs, protocol=protocol))
    (root / dataset / "instances.json").write_text(json.dumps(instances))
    return ReferFiles(root, photo_folder, refs, instances)


def stored_mask(found: Annotations, row: int) -> np.ndarray:
    """The mask of a ref, spelled out from its run lengths: uint8 [H, W]."""
    begin, count, image = found.refs.rle_begin[row], found.refs.rle_count[row], found.refs.image[row]
    runs = found.rle_counts[begin : begin + count]
    height, width = found.images.height[image], found.images.width[image]
    return np.repeat(np.arange(count) % 2, runs).reshape(width, height).T.astype(np.uint8)
