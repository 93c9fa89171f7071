"""The file layouts of published data sets, as ``nemo-dali synth`` writes them.

All but RefCOCO's are based on what their publishers' readers take from the files; no sample was available.
"""

from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from nemo_dali._choices import LayoutName
from nemo_dali.synthetic._scenes import Scene, Sentence, describe_none, describe_several

# Of every 50 photos, these are not for training: 8, 6 and 6 per cent, spread so that a small data set has all splits.
SPLITS = {
    i: split
    for split, numbers in {"val": (2, 14, 27, 39), "testA": (4, 21, 35), "testB": (9, 25, 45)}.items()
    for i in numbers
}


class Said(NamedTuple):
    """What one ref is about: the numbers of its things, and its sentences."""

    things: list[int]
    sentences: list[Sentence]


@dataclass(frozen=True)
class Layout:
    """Where a data set's files are, and what its refs look like. Paths are below the data set's own folder."""

    folder: str  # of the annotations
    refs_file: str
    photos: str
    photo_name: str  # a template; without its ending
    generalised: bool = False  # refs of several things, and of none
    compressed: bool = False  # masks are lists of compressed run lengths
    splits: tuple[str, ...] = ("train", "val", "testA", "testB")

    def split(self, number: int) -> str:
        """The split of a photo, by its number."""
        split = SPLITS.get(number % 50, "train")
        return split if split in self.splits else "test"

    def said(self, scene: Scene, sentences: dict[int, list[Sentence]], shown: list[int], random: Random) -> list[Said]:
        """The refs of a photo.

        Args:
            sentences: of every thing that is referred to.
            shown: the things of which anything can be seen.
        """
        one = [Said([i], sentences[i]) for i in range(len(scene.things)) if i in sentences]
        if not self.generalised:
            return one
        several = describe_several(scene, sentences, shown, random)
        return [*one, *([Said(*several)] if several else []), Said([], describe_none(scene, random))]

    def ref(self, annotations: list[dict[str, Any]], here: list[dict[str, Any]]) -> dict[str, Any]:
        """The keys in which this layout's refs differ from RefCOCO's.

        Args:
            annotations: of the ref's things.
            here: all of the photo's.
        """
        ids, categories = [a["id"] for a in annotations], [a["category_id"] for a in annotations]
        if not self.generalised:
            return {"ann_id": ids[0], "category_id": categories[0]}
        if self.folder == "grefcoco":
            return {"ann_id": ids or [-1], "category_id": categories or [-1]}
        # The publisher's reader looks up the annotations of every ref, even where source says that they do not count.
        none = not ids
        if none:
            ids, categories = [here[0]["id"]], [here[0]["category_id"]]
        return {
            "ann_id": ids if len(ids) > 1 else ids[0],
            "category_id": categories if len(ids) > 1 else categories[0],
            "source": "zero" if none else "many" if len(ids) > 1 else "one",
        }


LAYOUTS: dict[LayoutName, Layout] = {
    "refcoco": Layout("refcoco", "refs(unc).p", "images/mscoco/images/train2014", "COCO_train2014_{:012d}"),
    "refclef": Layout("refclef", "refs(unc).p", "images/saiapr_tc-12", "{}", compressed=True),
    "grefcoco": Layout(
        "grefcoco", "grefs(unc).json", "images/train2014", "COCO_train2014_{:012d}", generalised=True
    ),
    "ref-zom": Layout(
        "ref-zom",
        "refs(final).p",
        "images/trainval2014",
        "COCO_train2014_{:012d}",
        generalised=True,
        splits=("train", "test"),
    ),
}  # fmt: skip


def compressed(mask: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """A mask as RefCLEF stores it: a list of COCO's compressed run lengths, as text."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return [{"size": rle["size"], "counts": rle["counts"].decode()}]
