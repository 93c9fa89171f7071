"""What a table's pools are like over tau and K: what ``report`` shows and ``tune`` decides by.

A photo of the pool is a *false negative* if it holds what the sentence describes. Nobody has labelled these, but three
things bound their share. If another sentence about a thing in the photo says all that this one says, the photo is one
(``said``): at least a share ``known_false`` are. A false negative shows an object of the target's category: at most a
share ``shown`` of a pool's candidates are false negatives, if the data set's labels are complete. And if false
negatives are as similar to the sentence as its own photo is, tau lets only the share ``true_below`` of them pass.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.kernels.plan.pools import pool_begins, pool_ends, valid_ends
from nemo_dali.mining.said import Said
from nemo_dali.mining.table import NegativeTable
from nemo_dali.text.position_words import placed_share

F64 = npt.NDArray[np.float64]

SAMPLE = 10_000  # sentences of each kind looked at, evenly spread: shares are then known to half a percent
SAID = 1_000  # of these, compared with the words of all sentences: a millisecond each
SAMPLED_CELLS = 10_000_000  # of the table held in memory for a kind, at most
TAUS = 61  # points of the grid, at most
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)  # between them
TOP_KS = (3, 5, 8, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 5000)
DRAWN = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)  # of the photos, those drawn most often
RANKS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 5000)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class NoTargetCurves:
    """The pools of sentences without a target, over the same tau and K; names as in ``Curves``."""

    rows: npt.NDArray[np.int64]
    size: F64
    empty: F64
    short3: F64
    short8: F64
    cut: F64


@dataclass(frozen=True, eq=False)
class Curves:
    """Arrays [T, C] are over T values of tau and C of K; all but ``no_target`` describe sentences with a target.

    Attributes:
        rows: int64 [n], the sentences looked at.
        taus: float64 [T], ascending; the last one bounds nothing.
        ks: int64 [C], ascending.
        true: float64 [n], similarity of each sentence's own photo.
        chance: float64 [n], similarity of each sentence to some other photo.
        size: float64 [T, C], median size of a pool.
        empty, short3, short8: shares of the pools with no photo, and with fewer than fill a 2x2 or a 3x3.
        cut: share of the pools that a deeper table would make larger.
        similarity: mean similarity in the pools.
        shown: share of the candidates that show the target's category; NaN where no category is known.
        shown_by_chance: the same share of all photos. labelled: share of the sentences whose category is known.
        true_below: float64 [T], share of the own photos whose similarity is at most tau.
        drawn: float64 [T, C, len(DRAWN)], share of the draws that the most drawn photos get.
        never: share of the photos that are in no pool looked at.
        rank_quantiles: float64 [len(ranks), len(QUANTILES)], of the similarity at these ranks.
        ranks: int64, ranks in the table, from 1.
        no_target: the curves of sentences without a target; None: there are none.
        placed: share of the sentences that say where in the photo their target is.
        known_false: float64 [T, C], share of the candidates that ``said`` shows to be false negatives; None: not
            measured.
    """

    table: NegativeTable
    rows: npt.NDArray[np.int64]
    taus: F64
    ks: npt.NDArray[np.int64]
    true: F64
    chance: F64
    size: F64
    empty: F64
    short3: F64
    short8: F64
    cut: F64
    similarity: F64
    shown: F64
    shown_by_chance: float
    labelled: float
    true_below: F64
    drawn: F64
    never: F64
    ranks: npt.NDArray[np.int64]
    rank_quantiles: F64
    no_target: NoTargetCurves | None = None
    placed: float = 0.0
    known_false: F64 | None = None

    @cached_property
    def hardness(self) -> F64:
        """[T, C]: how far above chance the pools' similarities are, in standard deviations of ``chance``."""
        return (self.similarity - float(self.chance.mean())) / max(float(self.chance.std()), 1e-6)

    @cached_property
    def told_apart(self) -> float:
        """How often a sentence's own photo is more similar to it than some other photo; 0.5 by chance."""
        return float((self.true > self.chance).mean())


def measure_curves(dataset: Dataset, table: NegativeTable) -> Curves:
    """Measure the curves on a sample of the table's rows.

    Raises:
        FileFormatError: the table is of another data set.
        NemoError: no sentence has a target.
    """
    table.check_dataset(dataset)
    width = table.neighbors.shape[1]
    empty = dataset.refs.empty[dataset.sentences.ref] == 1
    if empty.all():
        raise NemoError(
            f"No sentence of {dataset.path} has a target, so no photo is known to show what one describes, and no "
            "bound can be derived. Write a policy file by hand, and look at what it draws with: nemo-dali preview "
            "--policy"
        )
    rows, others = (_sample(np.flatnonzero(kind), width) for kind in (~empty, empty))
    table.check_rows(np.concatenate([rows, others]))
    table.check_embeddings()
    neighbors, similarity, valid = _looked_at(table, rows)
    ref = dataset.sentences.ref[rows]
    own = dataset.refs.image[ref]
    true, chance = _similarities(table, rows, own)
    _, similarity_others, valid_others = _looked_at(table, others)
    taus = tau_grid(np.concatenate([similarity, similarity_others]), np.concatenate([valid, valid_others]))
    ks = np.array([k for k in TOP_KS if k < width] + [width])
    category = dataset.refs.category[ref]
    hits, by_chance = _hits(dataset, neighbors, category)
    begins = np.stack([pool_begins(similarity, tau) for tau in taus])
    deeper = width < len(table.image_embedding) - 1
    curves = _windows(similarity, hits, valid, begins, ks, deeper)
    weight = 1.0 / dataset.refs.sentence_count[ref]
    drawn, never = _drawn(neighbors, begins, valid, ks, weight, len(table.image_embedding))
    ranks = np.array([rank for rank in RANKS if rank < width] + [width])
    at_ranks = [similarity[valid >= rank, rank - 1] for rank in ranks]
    some = [len(values) > 0 for values in at_ranks]
    return Curves(
        table=table,
        rows=rows,
        taus=taus,
        ks=ks,
        true=true,
        chance=chance,
        **curves,
        shown_by_chance=by_chance,
        labelled=float((category >= 0).mean()),
        true_below=(true[:, None] <= taus).mean(axis=0),
        drawn=drawn,
        never=never,
        ranks=ranks[some],
        rank_quantiles=np.array([np.quantile(values, QUANTILES) for values in at_ranks if len(values)]).reshape(
            -1, len(QUANTILES)
        ),
        no_target=_no_target(others, similarity_others, valid_others, taus, ks, deeper) if len(others) else None,
        placed=placed_share([dataset.sentences.text[row] for row in rows.tolist()]),
        known_false=_known_false(dataset, rows, neighbors, similarity, valid, begins, ks),
    )


def _sample(rows: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """Some of these rows, evenly spread."""
    if not len(rows):
        return rows
    count = min(len(rows), SAMPLE, max(SAMPLED_CELLS // width, 1))
    return rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))]


def _looked_at(
    table: NegativeTable, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The neighbors and similarities of some rows, and how many each row has."""
    similarity = np.array(table.similarity[rows], np.float32)
    return np.array(table.neighbors[rows]), similarity, valid_ends(similarity)


def _no_target(
    rows: npt.NDArray[np.int64],
    similarity: npt.NDArray[np.float32],
    valid: npt.NDArray[np.int64],
    taus: F64,
    ks: npt.NDArray[np.int64],
    deeper: bool,
) -> NoTargetCurves:
    begins = np.stack([pool_begins(similarity, tau) for tau in taus])
    unlabelled = np.full((len(rows), 1), -1, np.int32)
    curves = _windows(similarity, unlabelled, valid, begins, ks, deeper)
    return NoTargetCurves(rows, **{name: curves[name] for name in ("size", "empty", "short3", "short8", "cut")})


def tau_grid(similarity: npt.NDArray[np.float32], valid: npt.NDArray[np.int64]) -> F64:
    """Round values of tau from where rows end to where they begin; the last is above all similarities."""
    some = valid > 0
    if not some.any():
        return np.array([1.0])
    low = float(np.quantile(similarity[some, valid[some] - 1], 0.01))
    high = float(similarity[some, 0].max())
    step = next((step for step in STEPS if (high - low) / step <= TAUS - 3), STEPS[-1])
    first, last = int(np.floor(low / step)), int(np.floor(high / step)) + 1
    return np.round(np.arange(first, last + 1) * step, 3)


def _similarities(table: NegativeTable, rows: npt.NDArray[np.int64], own: npt.NDArray[np.int32]) -> tuple[F64, F64]:
    """The similarities of sentences to their own photo, and to another one."""
    text = np.array(table.text_embedding[rows], np.float64)
    photos = len(table.image_embedding)
    other = (own + 1 + np.arange(len(rows)) * 7919 % (photos - 1)) % photos  # any but their own
    true, chance = (
        np.einsum("nd,nd->n", text, table.image_embedding[which].astype(np.float64)) for which in (own, other)
    )
    return true, chance


def _hits(
    dataset: Dataset, neighbors: npt.NDArray[np.int32], category: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], float]:
    """How many of a row's first photos show the target's category, int32 [labelled, N + 1]; and the share by chance.

    Rows whose category is unknown are marked by -1.
    """
    known = category >= 0
    hits = np.zeros((len(neighbors), neighbors.shape[1] + 1), np.int32)
    hits[~known] = -1
    if not known.any():
        return hits, float("nan")
    shown = dataset.shown_categories()
    hits[known, 1:] = np.cumsum(shown[neighbors[known], category[known, None]], axis=1)
    return hits, float(shown.mean(axis=0)[category[known]].mean())


def _known_false(
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    neighbors: npt.NDArray[np.int32],
    similarity: npt.NDArray[np.float32],
    valid: npt.NDArray[np.int64],
    begins: npt.NDArray[np.int64],
    ks: npt.NDArray[np.int64],
) -> F64:
    """See ``Curves.known_false``; measured on some of the rows, evenly spread."""
    some = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAID)).astype(np.int64))
    said, fits = Said(dataset), np.zeros(len(dataset.images.id), bool)
    hits = np.full((len(some), neighbors.shape[1] + 1), -1, np.int32)
    for place, row in enumerate(some):
        photos = said.photos(int(rows[row]))
        if photos is not None:
            fits[photos] = True
            hits[place, 0] = 0
            np.cumsum(fits[neighbors[row]], out=hits[place, 1:])
            fits[photos] = False
    share: F64 = _windows(similarity[some], hits, valid[some], begins[:, some], ks, False)["shown"]
    return share


def _windows(
    similarity: npt.NDArray[np.float32],
    hits: npt.NDArray[np.int32],
    valid: npt.NDArray[np.int64],
    begins: npt.NDArray[np.int64],
    ks: npt.NDArray[np.int64],
    deeper: bool,
) -> dict[str, Any]:
    """The curves that are means over windows; ``deeper``: whether a deeper table would have more photos."""
    every = np.arange(len(valid))
    sums = np.zeros((len(valid), similarity.shape[1] + 1))
    np.cumsum(np.where(np.isneginf(similarity), 0, similarity), axis=1, dtype=np.float64, out=sums[:, 1:])
    known = hits[:, 0] >= 0
    shape = len(begins), len(ks)
    curves = {
        name: np.full(shape, np.nan) for name in ("size", "empty", "short3", "short8", "cut", "similarity", "shown")
    }
    for t, begin in enumerate(begins):
        for c, k in enumerate(ks):
            end = pool_ends(begin, valid, k)
            size = end - begin
            total = size.sum()
            curves["size"][t, c] = np.median(size)
            curves["empty"][t, c] = (size == 0).mean()
            curves["short3"][t, c] = (size < 3).mean()
            curves["short8"][t, c] = (size < 8).mean()
            curves["cut"][t, c] = ((size < k) & (valid == similarity.shape[1])).mean() if deeper else 0.0
            if total:
                curves["similarity"][t, c] = (sums[every, end] - sums[every, begin]).sum() / total
            if labelled := size[known].sum():
                found = (hits[every, end] - hits[every, begin])[known].sum()
                curves["shown"][t, c] = found / labelled
    return curves


def _drawn(
    neighbors: npt.NDArray[np.int32],
    begins: npt.NDArray[np.int64],
    valid: npt.NDArray[np.int64],
    ks: npt.NDArray[np.int64],
    weight: F64,
    photos: int,
) -> tuple[F64, F64]:
    """``Curves.drawn`` and ``Curves.never``."""
    from nemo_dali.kernels.ranking.pools import move_windows

    shape = len(begins), len(ks)
    drawn, never = np.zeros((*shape, len(DRAWN))), np.zeros(shape)
    most = [max(1, round(share * photos)) for share in DRAWN]
    for c, k in enumerate(ks):
        counts = np.zeros(photos)
        old = np.zeros(len(valid), np.int64), np.zeros(len(valid), np.int64)
        for t in range(len(begins) - 1, -1, -1):
            window = begins[t], pool_ends(begins[t], valid, k)
            move_windows(neighbors, *old, *window, weight, counts)
            old = window
            counts[np.abs(counts) < 1e-9] = 0  # what rounding left behind
            descending = np.sort(counts)[::-1]
            sums = np.cumsum(descending)
            never[t, c] = (descending == 0).mean()
            if sums[-1] > 0:
                drawn[t, c] = sums[np.array(most) - 1] / sums[-1]
    return drawn, never
