"""How many of the negatives that training draws are false: they show what the sentence describes.

Nobody has labelled real photos for this, and the share that shows the target's category is an upper bound at best. For
generated data the truth is known, so that tables, policies and rules of mining can be compared by what counts.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import PathLike
from nemo_dali.data.dataset import Dataset
from nemo_dali.kernels.plan.rows import RANDOM
from nemo_dali.loader.sources import Corpus
from nemo_dali.plan.planner import Planner
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.synthetic._scenes import UNSURE, YES
from nemo_dali.synthetic.truth import Truth

# If all negatives of a mosaic were alike, and half of them false, a share's standard error would be 0.46 percentage
# points.
MOSAICS = 12_000
SIZE = 64  # of the frames that are planned; the photos drawn do not depend on it

Drawn = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # negatives: the rows of their sentences and photos


@dataclass(frozen=True)
class Shares:
    """Shares of some negatives; NaN where there are none.

    Attributes:
        negatives: how many there are.
        words: those with a thing that the sentence's kind, colour and size fit, wherever it is.
        fits: those with a thing that all of the sentence fits, as seen in their own frame.
        unsure: those where people would differ on that.
        category: those that show the target's category, among sentences whose target has a known one.
    """

    negatives: int
    words: float
    fits: float
    unsure: float
    category: float


@dataclass(frozen=True)
class FalseNegatives:
    """What the negatives of mosaics show, mined ones and random ones, and those of each kind of expression."""

    mined: Shares
    random: Shares
    mined_by_kind: Mapping[str, Shares]
    random_by_kind: Mapping[str, Shares]

    def __str__(self) -> str:
        rows = [("mined", self.mined), ("random", self.random)]
        for kind, mined in self.mined_by_kind.items():
            rows += [(f"mined, {kind}", mined), (f"random, {kind}", self.random_by_kind[kind])]
        lines = [f"{'negatives':20}{'number':>8}{'words fit':>12}{'all fits':>12}{'unsure':>10}{'category':>12}"]
        for name, s in rows:
            shares = ["-" if math.isnan(share) else f"{share:.1%}" for share in (s.words, s.fits, s.unsure, s.category)]
            lines.append("{:20}{:8,}{:>12}{:>12}{:>10}{:>12}".format(name, s.negatives, *shares))
        return "\n".join(lines)


def false_negatives(
    dataset: PathLike,
    table: PathLike,
    truth: Truth,
    *,
    policy: MosaicPolicy,
    seed: int = 0,
    mosaics: int = MOSAICS,
) -> FalseNegatives:
    """Draw mosaics as a Loader does, and look at what their negatives show.

    Args:
        dataset: a .ris.h5 file of generated data.
        table: its .neg.h5 file.
        truth: of the data set, or of a larger one.
        policy: its window and its grids are used; all mosaics are mined first, and then all random.
        seed: of the draws.
        mosaics: how many are planned of each kind.

    Raises:
        AnnotationError: the truth is of another data set.
        FileFormatError: a file cannot be used, or the table is of another data set.
        NemoError: the data set has too few photos for the policy's mosaics.
    """
    corpus = Corpus([dataset], [table], [])
    (opened,) = corpus.datasets
    (part,) = corpus.parts()
    known = truth.of(opened)
    found = {}
    for name in ("mined", "random"):
        drawn = replace(
            policy,
            p_mined=float(name == "mined"),
            p_random=float(name == "random"),
            mine_after_epoch=0,
            jitter=0.0,  # where the target is, and how large its cell is, does not change what is drawn
            target_cell="uniform",
        )
        planner = Planner([part.under(drawn, samples="refs")], drawn, seed=seed, size=SIZE)
        found[name] = _Looked(known, opened, _negatives(planner, mosaics))
    kinds = [(kind, name) for kind, name in enumerate(known.kind_names) if (known.kind == kind).any()]
    by_kind = {
        name: {kind_name: looked.shares(looked.kind == kind) for kind, kind_name in kinds}
        for name, looked in found.items()
    }
    return FalseNegatives(
        mined=found["mined"].shares(),
        random=found["random"].shares(),
        mined_by_kind=by_kind["mined"],
        random_by_kind=by_kind["random"],
    )


def _negatives(planner: Planner, mosaics: int) -> Drawn:
    """The negatives of the first mosaics, epoch after epoch."""
    sentences, photos = [], []
    for epoch, count in enumerate(_epochs(planner.length, mosaics)):
        rows = planner.plan(epoch, np.arange(count))
        rows = rows[rows["kind"] >= RANDOM]
        others = rows["images"] >= 0
        others[np.arange(len(rows)), rows["cell"]] = False
        row, cell = np.nonzero(others)
        sentences.append(rows["sentence"][row].astype(np.int64))
        photos.append(rows["images"][row, cell].astype(np.int64))
    return np.concatenate(sentences), np.concatenate(photos)


def _epochs(length: int, count: int) -> Iterator[int]:
    """How many samples of each epoch make ``count`` in all."""
    for first in itertools.count(0, length):
        if first >= count:
            return
        yield min(length, count - first)


class _Looked:
    """Negatives, and what each of them shows."""

    def __init__(self, truth: Truth, dataset: Dataset, drawn: Drawn) -> None:
        sentences, photos = drawn
        category = dataset.refs.category[dataset.sentences.ref[sentences]]
        self.kind = truth.kind[sentences]
        self._words = truth.fits_words(sentences, photos)
        self._fits = truth.fits(sentences, photos)
        self._labelled = category >= 0
        self._category = dataset.shown_categories()[photos, category] & self._labelled

    def shares(self, some: Any = slice(None)) -> Shares:
        """The shares of some of them, bool [n]; or of all."""
        return Shares(
            negatives=len(self._words[some]),
            words=_mean(self._words[some]),
            fits=_mean(self._fits[some] == YES),
            unsure=_mean(self._fits[some] == UNSURE),
            category=_mean(self._category[some][self._labelled[some]]),
        )


def _mean(values: npt.NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else float("nan")
