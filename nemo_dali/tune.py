"""Proposing tau and K from a table's curves, by rules that can be read.

1. tau is the largest value at which at most ``false_negatives`` of a pool's candidates may hold what the sentence
   describes (the bound of ``curves``, at K = 100): the hardest pools that are not ambiguous.
2. Where more than 1 % of the pools then hold fewer photos than a mosaic's cells need, tau is raised until they do not:
   such samples would be filled up with photos from above tau, or at random. A deeper table avoids it.
3. K is the smallest value at which the 1 % of the photos drawn most often get at most 10 % of the draws, as a few
   photos that are used for everything are learnt by heart; but no larger than what keeps four fifths of the similarity
   above chance that the 20 nearest candidates have, as others are too easy.
"""

from dataclasses import dataclass

import numpy as np

from nemo_dali.curves import DRAWN, Curves
from nemo_dali.policy import MosaicPolicy
from nemo_dali.table import first_at_most

TYPICAL_K = 100  # MosaicPolicy's default
LARGEST_SHORT = 0.01
MOST_DRAWN, LARGEST_DRAWN = 0.01, 0.10
NEAREST_K, LEAST_HARDNESS = 20, 0.8
ENOUGH = 0.999  # share of the sentences that a proposed depth suffices for


@dataclass(frozen=True)
class Proposal:
    """A policy, why it is that, and how deep a table it needs.

    Attributes:
        t, c: where tau and K are in the curves.
        why: a sentence for each decision.
        depth: photos a sentence that suffice for nearly all sentences.
    """

    policy: MosaicPolicy
    t: int
    c: int
    why: tuple[str, ...]
    depth: int


def propose(curves: Curves, *, false_negatives: float = 0.1, grid: int = 2) -> Proposal:
    """Apply the rules.

    Args:
        false_negatives: the largest share of candidates that may hold what the sentence describes, 0 to 1.
        grid: 2 for 2x2 mosaics, 3 for 3x3.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 <= false_negatives <= 1:
        raise ValueError(f"false_negatives ({false_negatives}) must be between 0 and 1")
    if grid not in (2, 3):
        raise ValueError(f"grid ({grid}) must be 2 or 3")
    why: list[str] = []
    short = curves.short3 if grid == 2 else curves.short8
    cells = grid**2 - 1
    typical = int(np.searchsorted(curves.ks, min(TYPICAL_K, curves.ks[-1])))

    few = np.flatnonzero(curves.false_negatives[:, typical] <= false_negatives)
    t = int(few[-1]) if few.size else 0
    why.append(_about_tau(curves, t, typical, false_negatives, found=bool(few.size)))
    if short[t, typical] > LARGEST_SHORT:
        enough = np.flatnonzero(short[:, typical] <= LARGEST_SHORT)
        raised = int(enough[0]) if enough.size else len(curves.taus) - 1
        remedy = "a deeper table" if curves.cut[t, typical] > 0 else "more photos"
        why.append(
            f"{short[t, typical]:.1%} of the pools would hold fewer than {cells} photos there, so tau is raised to "
            f"{curves.taus[raised]:g}, where {short[raised, typical]:.1%} do and up to "
            f"{curves.false_negatives[raised, typical]:.1%} of the candidates may be false negatives; {remedy} would "
            "do without."
        )
        t = raised

    c, reason = _choose_k(curves, t, cells)
    why.append(reason)
    unbounded = t == len(curves.taus) - 1
    policy = MosaicPolicy(
        max_similarity=None if unbounded else float(curves.taus[t]), top_k=int(curves.ks[c]), grids={grid: 1.0}
    )
    return Proposal(policy, t, c, tuple(why), needed_depth(curves, t, int(curves.ks[c])))


def _about_tau(curves: Curves, t: int, c: int, limit: float, *, found: bool) -> str:
    labels = (
        f"{curves.shown[t, c]:.0%} of the candidates show the target's category ({curves.shown_by_chance:.0%} of all "
        "photos do)"
        if curves.labelled
        else "no category is known, so every candidate counts as if it showed the target's"
    )
    passes = f"{curves.true_below[t]:.1%} of the sentences' own photos are no more similar than that"
    if not found:
        return (
            f"Even at {curves.taus[t]:g}, the smallest tau that the table reaches, up to "
            f"{curves.false_negatives[t, c]:.1%} of the candidates may be false negatives, more than {limit:.1%}: "
            f"{passes}, and {labels}."
        )
    if t == len(curves.taus) - 1:
        return f"No bound is needed: at most {curves.false_negatives[t, c]:.1%} of the candidates are false negatives."
    return (
        f"tau {curves.taus[t]:g} is the largest at which at most {limit:.1%} of the candidates may be false negatives "
        f"({curves.false_negatives[t, c]:.1%}): {passes}, and {labels}."
    )


def _choose_k(curves: Curves, t: int, cells: int) -> tuple[int, str]:
    drawn = curves.drawn[t, :, DRAWN.index(MOST_DRAWN)]
    nearest = int(np.searchsorted(curves.ks, min(NEAREST_K, curves.ks[-1])))
    fits = curves.ks >= min(max(cells, NEAREST_K), curves.ks[-1])
    hard = curves.hardness[t] >= LEAST_HARDNESS * curves.hardness[t, nearest]
    hard[: nearest + 1] = True
    even = np.flatnonzero(fits & (drawn <= LARGEST_DRAWN))
    hardest = np.flatnonzero(fits & hard)
    last = int(hardest[-1]) if hardest.size else nearest
    shares = f"the {MOST_DRAWN:.0%} of the photos drawn most often get {{:.1%}} of the draws"
    if even.size and even[0] <= last:
        c = int(even[0])
        return c, f"K {curves.ks[c]} is the smallest at which {shares.format(drawn[c])}, at most {LARGEST_DRAWN:.0%}."
    return last, (
        f"K {curves.ks[last]}: {shares.format(drawn[last])}, more than {LARGEST_DRAWN:.0%}, but with a larger K "
        f"candidates would keep less than {LEAST_HARDNESS:.0%} of the similarity above chance that the {NEAREST_K} "
        "nearest have."
    )


def needed_depth(curves: Curves, t: int, k: int) -> int:
    """How many photos a sentence a table must keep for the whole window, for nearly all sentences; rounded up."""
    table = curves.table
    photos, tau = len(table.image_embedding), float(curves.taus[t])
    begin = first_at_most(np.asarray(table.similarity[curves.rows], np.float32), tau)
    beyond = np.flatnonzero(np.asarray(table.neighbors[curves.rows, -1]) >= 0)
    beyond = beyond[begin[beyond] == table.neighbors.shape[1]]  # rows whose last photo is still above tau
    for some in np.array_split(beyond, max(1, len(beyond) * photos // 16_000_000)):
        scores = np.asarray(table.text_embedding[curves.rows[some]]) @ np.asarray(table.image_embedding).T
        begin[some] = (scores > tau).sum(axis=1)
    wanted = int(np.quantile(begin, ENOUGH, method="higher")) + k
    return min(-(-wanted // 50) * 50, photos - 1)
