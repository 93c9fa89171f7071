"""Proposing tau and K from a table's curves, by rules that can be read.

1. tau is the largest value that at most ``passing`` of the sentences' own photos do not exceed: if photos that hold
   what a sentence describes are as similar to it as its own photo is, at most that share of them is left in the pools.
2. If more than 1 % of the pools then hold fewer photos than a mosaic needs, tau is raised until at most 1 % do: such
   samples would be filled with photos from above tau, or at random. A deeper table avoids this.
3. K is the smallest value, from 20 on, at which the 1 % of the photos drawn most often get at most 10 % of the draws,
   because a few photos that are used for everything are memorised; but no larger than what keeps four fifths of the
   similarity above chance that the pools of K = 20 have, because larger pools are too easy. (In 40 epochs a sentence of
   RefCOCO draws about 20 negatives: one sample in two is a mosaic, and a ref has three sentences.)

tau is chosen for each K, and K among these pairs.

4. Sentences without a target get their own tau by rules 1 and 2, at that K and from their own pools, but with at most
   ``PASSING_NO_TARGET`` instead of ``passing``: what they say may have been taken from another photo of the set, which
   is then as similar to them as other sentences are to their own photos. Their own photos say nothing about it.
5. If more than ``FEW_PLACED`` of the sentences say where in the photo their target is, the target gets a cell that
   keeps them true: in another, "left man" is false.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import GRIDS
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.kernels.plan.pools import pool_begins
from nemo_dali.mining.pool_curves import DRAWN, Curves, NoTargetCurves, measure_curves
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import MosaicPolicy

PASSING = 0.25
PASSING_NO_TARGET = 0.05
LARGEST_SHORT = 0.01
MOST_DRAWN, LARGEST_DRAWN = 0.01, 0.10
FEW_PLACED = 0.01
MOST_KNOWN_FALSE = 0.05  # of the candidates; on generated photos, two to four times as many were false negatives
NEAREST_K, LEAST_HARDNESS = 20, 0.8
LEAST_TOLD_APART = 0.65
ENOUGH = 0.999  # share of the sentences that a proposed depth suffices for
COUNTED_PAIRS, CELLS = 4_000_000_000, 16_000_000  # pairs of sentence and photo compared for it, and held in memory


@dataclass(frozen=True)
class Proposal:
    """A policy, the reasons for it, and how deep a table it needs.

    Attributes:
        t, c: the indices of tau and K in the curves.
        t_no_target: the index of the tau for sentences without a target; None: there are none.
        why: a sentence for each decision.
        tau: what the first rule alone gives; None: no bound.
        depth: photos per sentence that suffice for that tau and nearly all sentences.
    """

    policy: MosaicPolicy
    t: int
    c: int
    t_no_target: int | None
    why: tuple[str, ...]
    tau: float | None
    depth: int


def propose(curves: Curves, *, passing: float = PASSING, grid: int = 2) -> Proposal:
    """Apply the rules.

    Args:
        passing: the largest share of the own photos that tau may let pass, 0 to 1.
        grid: 2 for 2x2 mosaics, 3 for 3x3.

    Raises:
        ValueError: an argument out of range.
        NemoError: the data set has too few photos for any mosaic.
    """
    if not 0 <= passing <= 1:
        raise ValueError(f"passing ({passing}) must be between 0 and 1")
    if grid not in GRIDS[1:]:
        raise ValueError(f"grid ({grid}) must be 2 or 3")
    _check_photos(curves, grid)
    short = curves.short3 if grid == 2 else curves.short8
    cells = grid**2 - 1
    unambiguous, found = _unambiguous(curves, passing)
    taus = [_raised(short[:, c], unambiguous) for c in range(len(curves.ks))]  # for each K
    c, about_k = _choose_k(curves, taus, cells)
    t = taus[c]
    why = [_about_tau(curves, unambiguous, c, passing, found=found), *_about_false(curves, t, c)]
    if curves.told_apart < LEAST_TOLD_APART:
        why.insert(
            0,
            f"Warning: a sentence's own photo is more similar to it than another photo only {curves.told_apart:.0%} "
            "of the time (50% by chance). This model hardly knows these photos; mine with another one.",
        )
    if t != unambiguous:
        remedy = "a deeper table" if curves.cut[unambiguous, c] > 0 else "more photos"
        why.append(
            f"{short[unambiguous, c]:.1%} of the pools would hold fewer than {cells} photos there, so tau is raised to "
            f"{curves.taus[t]:g}, where {short[t, c]:.1%} do and {curves.true_below[t]:.1%} of the own photos pass; "
            f"{remedy} would make that unnecessary."
        )
    last = len(curves.taus) - 1
    k = max(int(curves.ks[c]), cells)  # a policy needs enough to fill the cells, even if the table has fewer
    if curves.ks[-1] < cells:
        why.append(
            f"Warning: the table has {curves.ks[-1]} photos a sentence, and a mosaic needs {cells}. Mine deeper."
        )
    elif t == unambiguous and short[t, c] > LARGEST_SHORT:
        why.append(
            f"Warning: {short[t, c]:.1%} of the pools hold fewer than {cells} photos at any tau: too much is excluded. "
            "Mine with fewer exclusions, or more photos."
        )
    why.append(about_k)
    # A shallow table may not reach the tau that the rule asks for.
    tau = min(float(curves.taus[unambiguous]), float(np.quantile(curves.true, passing)))
    unlimited = unambiguous == last
    depth = needed_depth(curves, curves.rows, float(curves.taus[last]) if unlimited else tau, k)
    other = bound = None
    if curves.no_target is not None:
        strict = min(passing, PASSING_NO_TARGET)
        other, about_other = _choose_other(curves, curves.no_target, c, strict, cells)
        why.append(about_other)
        if (other, t) != (last, last):  # else neither has a bound
            bound = min(float(curves.taus[other]), 1.0)
        depth = max(depth, needed_depth(curves, curves.no_target.rows, float(np.quantile(curves.true, strict)), k))
    if placed := curves.placed > FEW_PLACED:
        why.append(
            f"{curves.placed:.0%} of the sentences say where in the photo their target is (left, top right, ...), so "
            "target_cell is positional: the target is put where they stay true."
        )
    policy = MosaicPolicy(
        max_similarity=None if t == last else float(curves.taus[t]),
        max_similarity_no_target=bound,
        top_k=k,
        grids={grid: 1.0},
        target_cell="positional" if placed else "uniform",
    )
    return Proposal(policy, t, c, other, tuple(why), None if unlimited else round(tau, 3), depth)


def _check_photos(curves: Curves, grid: int) -> None:
    """Refuse a table whose data set has too few photos, as the Loader would refuse any policy with mosaics for it."""
    table = curves.table
    photos, excluded = len(table.image_embedding), int(table.excluded_photos.sum())
    if photos - excluded < grid**2:
        left_out = f", {excluded} of which the table excludes" if excluded else ""
        raise NemoError(
            f"A {grid}x{grid} mosaic needs {grid**2} photos, but the data set of {table.path} has {photos}{left_out}: "
            f"no policy can be proposed. Index more photos{', or mine with fewer exclusions' if excluded else ''}"
            f"{', or use --grid 2' if grid == 3 and photos - excluded >= 4 else ''}, or train with p_mined=0 and "
            "p_random=0."
        )


def _unambiguous(curves: Curves, passing: float) -> tuple[int, bool]:
    """The index of the first rule's tau, and True; 0 and False if even the smallest tau lets more pass."""
    few = np.flatnonzero(curves.true_below <= passing)
    return (int(few[-1]), True) if few.size else (0, False)


def _choose_other(curves: Curves, none: NoTargetCurves, c: int, passing: float, cells: int) -> tuple[int, str]:
    """The index of the tau for sentences without a target, and why."""
    short = (none.short3 if cells == 3 else none.short8)[:, c]
    unambiguous, found = _unambiguous(curves, passing)
    t = _raised(short, unambiguous)
    tau = f"{curves.taus[unambiguous]:g}"
    what = f"For sentences without a target tau is {tau}, "
    if found:
        text = f"{what}the largest value that at most {passing:.0%} of the others' own photos do not exceed"
    else:
        text = (
            f"{what}the smallest that the table reaches, though more than {passing:.0%} of the others' own photos pass"
        )
    if t == unambiguous:
        few = f" {short[t]:.1%} of these pools hold fewer than {cells} photos." if short[t] > LARGEST_SHORT else ""
        return t, f"{text}.{few}"
    return t, (
        f"{text}. {short[unambiguous]:.1%} of these sentences' pools would hold fewer than {cells} photos there, so it "
        f"is raised to {curves.taus[t]:g}, where {short[t]:.1%} do and {curves.true_below[t]:.1%} of those own photos "
        "pass."
    )


def _raised(short: npt.NDArray[np.float64], t: int) -> int:
    """The first index from ``t`` on at which few pools are short, or the last."""
    enough = np.flatnonzero(short[t:] <= LARGEST_SHORT)
    return t + int(enough[0]) if enough.size else len(short) - 1


def _about_tau(curves: Curves, t: int, c: int, passing: float, *, found: bool) -> str:
    tau, last, below = curves.taus[t], len(curves.taus) - 1, f"{curves.true_below[t]:.1%}"
    if not found:
        text = f"Even the smallest tau that the table reaches, {tau:g}, is not exceeded by {below} of the own photos."
    elif t == last:
        text = f"No bound is needed: {below} of the own photos are no more similar than the most similar candidate."
    else:
        text = f"tau {tau:g} is the largest value that at most {passing:.0%} of the own photos do not exceed: {below}."
    if not curves.labelled or math.isnan(curves.shown[t, c]):  # no labels, or no candidates
        return text
    return (
        f"{text} {curves.shown[t, c]:.0%} of the candidates then show the target's category, as false negatives do; "
        f"without a bound {curves.shown[last, c]:.0%} would, and of all photos {curves.shown_by_chance:.0%} do."
    )


def _about_false(curves: Curves, t: int, c: int) -> list[str]:
    """What is known about false negatives in these pools."""
    if curves.known_false is None or math.isnan(curves.known_false[t, c]):
        return []
    least = curves.known_false[t, c]
    most = "" if math.isnan(curves.shown[t, c]) else f" and at most {curves.shown[t, c]:.0%}"
    text = (
        f"At least {least:.0%}{most} of the candidates are false negatives: for that many, another sentence about an "
        "object of the target's category says everything that this one says, apart from places."
    )
    if least <= MOST_KNOWN_FALSE:
        return [text]
    with_crops = "exclude_crops" in curves.table.mapped.index.attributes
    remedy = "raise the margin of --exclude-crops" if with_crops else "mine with --exclude-crops MARGIN"
    return [
        f"{text} Warning: that is more than {MOST_KNOWN_FALSE:.0%}, and most are not found this way. Lower "
        f"--passing, or {remedy}, which leaves fewer at the same hardness (docs/mining.md)."
    ]


def _choose_k(curves: Curves, taus: list[int], cells: int) -> tuple[int, str]:
    """The index of K, and why; ``taus``: the index of tau for each K."""
    ks, every = curves.ks, np.arange(len(curves.ks))
    drawn = curves.drawn[taus, every, DRAWN.index(MOST_DRAWN)]
    hardness = curves.hardness[taus, every]
    first = int(np.searchsorted(ks, min(max(cells, NEAREST_K), ks[-1])))
    easy = np.flatnonzero(hardness[first:] < LEAST_HARDNESS * max(hardness[first], 0.0))
    last = first + (int(easy[0]) - 1 if easy.size and easy[0] > 0 else 0 if easy.size else len(ks) - 1 - first)
    even = np.flatnonzero(drawn[first : last + 1] <= LARGEST_DRAWN)
    c = first + int(even[0]) if even.size else last
    shares = f"the {MOST_DRAWN:.0%} of the photos drawn most often get {drawn[c]:.1%} of the draws"
    if even.size:
        return c, f"K {ks[c]} is the smallest, from {ks[first]} on, at which {shares}, at most {LARGEST_DRAWN:.0%}."
    return c, (
        f"K {ks[c]}: {shares}, more than {LARGEST_DRAWN:.0%}, but with a larger K candidates would keep less than "
        f"{LEAST_HARDNESS:.0%} of the similarity above chance that those of K {ks[first]} have."
    )


def needed_depth(curves: Curves, rows: npt.NDArray[np.int64], tau: float, k: int) -> int:
    """How many photos per sentence a table must keep for the whole window of nearly all ``rows``; rounded up."""
    table = curves.table
    photos, width = len(table.image_embedding), table.neighbors.shape[1]
    rows = rows[:: -(-len(rows) * photos // COUNTED_PAIRS)]
    begin = pool_begins(table.similarity[rows], tau)
    beyond = np.flatnonzero(begin == width)  # rows whose last photo is still above tau: counted from the embeddings
    for some in np.array_split(beyond, max(1, len(beyond) * photos // CELLS)):
        scores = np.asarray(table.text_embedding[rows[some]]) @ np.asarray(table.image_embedding).T
        begin[some] = (scores > tau).sum(axis=1)
    wanted = int(np.quantile(begin, ENOUGH, method="higher")) + k
    return min(-(-wanted // 50) * 50, photos - 1)


def mining_advice(dataset: Dataset, table: NegativeTable) -> str:
    """``depth_advice`` on what would be proposed for a table, or why nothing would be."""
    try:
        return depth_advice(curves := measure_curves(dataset, table), propose(curves))
    except NemoError as error:
        return str(error)


def depth_advice(curves: Curves, proposal: Proposal) -> str:
    """What depth the proposed window needs, and whether the table has it."""
    width = curves.table.neighbors.shape[1]
    tau = "no bound" if proposal.tau is None else f"tau {proposal.tau:g}"
    needed = (
        f"{ENOUGH:.1%} of the pools for {tau} and K {proposal.policy.top_k} are complete in a table {proposal.depth} "
        f"photos deep; this one has {width}"
    )
    return (
        f"{needed}: mine again with --embeddings THIS_TABLE --depth {proposal.depth}."
        if proposal.depth > width
        else f"{needed}."
    )
