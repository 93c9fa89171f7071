"""Proposing tau and K from a table's curves, by rules that can be read.

1. tau is the largest value that at most ``passing`` of the sentences' own photos do not exceed: if photos that hold
   what a sentence describes are as similar to it as its own photo is, no more of them than that are left in the pools.
2. Where more than 1 % of the pools then hold fewer photos than a mosaic's cells need, tau is raised until they do not:
   such samples would be filled up with photos from above tau, or at random. A deeper table avoids it.
3. K is the smallest value, from 20 on, at which the 1 % of the photos drawn most often get at most 10 % of the draws,
   as a few photos that are used for everything are learnt by heart; but no larger than what keeps four fifths of the
   similarity above chance that the pools of K = 20 have, as others are too easy. (In 40 epochs a sentence of RefCOCO
   draws some 20 negatives: a sample in two is a mosaic, and a ref has three sentences.)

tau is chosen for each K, and K among these pairs.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_dali.mining.pool_curves import DRAWN, Curves
from nemo_dali.mining.table import first_at_most
from nemo_dali.plan.policy import MosaicPolicy

PASSING = 0.25
LARGEST_SHORT = 0.01
MOST_DRAWN, LARGEST_DRAWN = 0.01, 0.10
NEAREST_K, LEAST_HARDNESS = 20, 0.8
LEAST_TOLD_APART = 0.65
ENOUGH = 0.999  # share of the sentences that a proposed depth suffices for
COUNTED_PAIRS, CELLS = 4_000_000_000, 16_000_000  # of sentences and photos looked at for it, and held in memory


@dataclass(frozen=True)
class Proposal:
    """A policy, why it is that, and how deep a table it needs.

    Attributes:
        t, c: where tau and K are in the curves.
        why: a sentence for each decision.
        tau: what the first rule alone gives; None: no bound.
        depth: photos a sentence that suffice for that tau and nearly all sentences.
    """

    policy: MosaicPolicy
    t: int
    c: int
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
    """
    if not 0 <= passing <= 1:
        raise ValueError(f"passing ({passing}) must be between 0 and 1")
    if grid not in (2, 3):
        raise ValueError(f"grid ({grid}) must be 2 or 3")
    short = curves.short3 if grid == 2 else curves.short8
    cells = grid**2 - 1
    few = np.flatnonzero(curves.true_below <= passing)
    unambiguous = int(few[-1]) if few.size else 0
    taus = [_raised(short[:, c], unambiguous) for c in range(len(curves.ks))]  # for each K
    c, about_k = _choose_k(curves, taus, cells)
    t = taus[c]
    why = [_about_tau(curves, unambiguous, c, passing, found=bool(few.size))]
    if curves.told_apart < LEAST_TOLD_APART:
        why.insert(
            0,
            f"Beware: a sentence's own photo is more similar to it than some other only {curves.told_apart:.0%} of the "
            "time (50% by chance). This model hardly knows these photos; mine with another.",
        )
    if t != unambiguous:
        remedy = "a deeper table" if curves.cut[unambiguous, c] > 0 else "more photos"
        why.append(
            f"{short[unambiguous, c]:.1%} of the pools would hold fewer than {cells} photos there, so tau is raised to "
            f"{curves.taus[t]:g}, where {short[t, c]:.1%} do and {curves.true_below[t]:.1%} of the own photos pass; "
            f"{remedy} would do without."
        )
    last = len(curves.taus) - 1
    k = max(int(curves.ks[c]), cells)  # a policy has as many as it must fill, a table perhaps not
    if curves.ks[-1] < cells:
        why.append(f"Beware: the table has {curves.ks[-1]} photos a sentence, and a mosaic needs {cells}. Mine deeper.")
    elif t == unambiguous and short[t, c] > LARGEST_SHORT:
        why.append(
            f"Beware: {short[t, c]:.1%} of the pools hold fewer than {cells} photos at any tau: too much is excluded. "
            "Mine with fewer exclusions, or more photos."
        )
    policy = MosaicPolicy(max_similarity=None if t == last else float(curves.taus[t]), top_k=k, grids={grid: 1.0})
    # A shallow table may not reach the tau that the rule asks for.
    tau = min(float(curves.taus[unambiguous]), float(np.quantile(curves.true, passing)))
    unlimited = unambiguous == last
    return Proposal(
        policy,
        t,
        c,
        (*why, about_k),
        None if unlimited else round(tau, 3),
        needed_depth(curves, float(curves.taus[last]) if unlimited else tau, k),
    )


def _raised(short: npt.NDArray[np.float64], t: int) -> int:
    """The first place from ``t`` on at which few pools are short, or the last."""
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


def _choose_k(curves: Curves, taus: list[int], cells: int) -> tuple[int, str]:
    """Where K is in the curves, and why; ``taus``: where tau is for each K."""
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


def needed_depth(curves: Curves, tau: float, k: int) -> int:
    """How many photos a sentence a table must keep for the whole window, for nearly all sentences; rounded up."""
    table = curves.table
    photos, width = len(table.image_embedding), table.neighbors.shape[1]
    rows = curves.rows[:: -(-len(curves.rows) * photos // COUNTED_PAIRS)]
    begin = first_at_most(np.asarray(table.similarity[rows], np.float32), tau)
    beyond = np.flatnonzero(begin == width)  # rows whose last photo is still above tau: counted from the embeddings
    for some in np.array_split(beyond, max(1, len(beyond) * photos // CELLS)):
        scores = np.asarray(table.text_embedding[rows[some]]) @ np.asarray(table.image_embedding).T
        begin[some] = (scores > tau).sum(axis=1)
    wanted = int(np.quantile(begin, ENOUGH, method="higher")) + k
    return min(-(-wanted // 50) * 50, photos - 1)


def depth_advice(curves: Curves, proposal: Proposal) -> str:
    """What depth the proposed window needs, and whether the table has it."""
    width = curves.table.neighbors.shape[1]
    tau = "no bound" if proposal.tau is None else f"tau {proposal.tau:g}"
    needed = (
        f"{ENOUGH:.1%} of the pools for {tau} and K {proposal.policy.top_k} are whole in a table {proposal.depth} "
        f"photos deep; this one has {width}"
    )
    return (
        f"{needed}: mine again with --embeddings THIS_TABLE --depth {proposal.depth}."
        if proposal.depth > width
        else f"{needed}."
    )
