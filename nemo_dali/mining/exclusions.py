"""Exclusions: photos that a sentence does not get as negatives, whatever tau and K are chosen later."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali.data.columns import have_twins, shared_photos, twins
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.mining.ranking import Excluded
from nemo_dali.mining.table_writer import rules_as_attributes

logger = logging.getLogger("nemo_dali")

ALWAYS = ["own photo", "photos outside the split"]  # a data set file holds the photos of its split only


@dataclass(frozen=True, kw_only=True)
class Exclusions:
    """What mining leaves out besides the sentence's own photo and copies of its file. Validated when created.

    Attributes:
        similar_photos: photos more similar than this to the sentence's own photo (near duplicates, or the same scene);
            None: none. The official code filters by photo-to-photo similarity too.
        category: photos that show an object of the target's category.
        siblings: photos more similar than this to another sentence of the same ref: if "man in red" finds a photo, "guy
            on the left" should not get it; None: none.
        crops: photos with a crop that is less than this below the best crop of the sentence's own photo, in similarity
            to the sentence: a crop shows what is small in the photo; None: none.
        photos_of: other data set files, such as test sets, whose photos are left out, by COCO's id or by content.
    """

    similar_photos: float | None = None
    category: bool = False
    siblings: float | None = None
    crops: float | None = None
    photos_of: Sequence[str | Path] = ()

    def __post_init__(self) -> None:
        for name in ("similar_photos", "siblings"):
            bound = getattr(self, name)
            if bound is not None and not (math.isfinite(bound) and -1 <= bound <= 1):
                raise ValueError(f"{name} ({bound}) must be None or between -1 and 1")
        if self.crops is not None and not (math.isfinite(self.crops) and -2 <= self.crops <= 2):
            raise ValueError(f"crops ({self.crops}) must be None or between -2 and 2")

    def of(self, dataset: Dataset) -> tuple[Excluded, dict[str, Any]]:
        """The exclusions as the ranking takes them, and as attributes of the table.

        Raises:
            NemoError: no ref of the data set has a category, every photo is left out, or a file in ``photos_of`` is not
                a data set file.
        """
        words, others = list(ALWAYS), list[str]()
        shown = category = never = None
        content = twins(dataset.photo_files)
        if copies := int(have_twins(content).sum()):
            words.append(f"copies of the own photo: {copies} photos have some")
        if self.similar_photos is not None:
            words.append(f"photos more similar than {float(self.similar_photos)!r} to the own photo")
        if self.category:
            category = dataset.refs.category[dataset.sentences.ref]
            if (category < 0).all():
                raise NemoError(f"No ref of {dataset.path} has a category, so photos cannot be excluded by category.")
            shown = dataset.shown_categories()
            words.append("photos that show the target's category")
        if self.siblings is not None:
            words.append(f"photos more similar than {float(self.siblings)!r} to another sentence of the ref")
        if self.crops is not None:
            words.append(
                f"photos with a crop less than {float(self.crops)!r} below the own photo's best, by similarity to the "
                "sentence"
            )
        if self.photos_of:
            never = np.zeros(len(dataset.images.id), bool)
            for path in self.photos_of:
                other = Dataset.open(path)
                common = shared_photos(dataset.photo_files, other.photo_files)
                if not common.any():
                    logger.warning("%s has none of the photos of %s: nothing is left out for it.", dataset.path, path)
                never |= common
                others.append(other.fingerprint)
                words.append(f"photos of {other.name} ({other.fingerprint[:12]}): {common.sum()}")
        if never is not None and never.all():
            raise NemoError(
                f"All {len(never)} photos of {dataset.path} are among those to be left out, so there are no negatives. "
                "Leave some of the data sets out of --exclude-photos-of."
            )
        if never is not None and (own := int(never[dataset.refs.image].sum())):
            logger.warning(
                "%d of %d refs are of photos that are left out as negatives; they are still shown as targets. To leave "
                "those out too, index with --leave-out.",
                own,
                len(dataset.refs.image),
            )
        bounds = {
            "similar_above": self.similar_photos,
            "siblings_above": self.siblings,
            "crops_margin": self.crops,
        }
        rules = rules_as_attributes(
            category=self.category,
            similar_photos=self.similar_photos,
            siblings=self.siblings,
            crops=self.crops,
            photos_of=others,
        )
        return Excluded(never=never, twins=content if copies else None, shown=shown, category=category, **bounds), {
            "exclusions": words
        } | rules
