"""The plan: the ref, sentence, mosaic and photos that every sample of every epoch is made of.

A row is a pure function of (data set, table, policy, seed, epoch, position). Position p of an epoch owns 16 random
words: those that ``numpy.random.Philox(key=[seed, epoch], counter=[0, p, 0, 0]).random_raw(16)`` returns. Their use:

    word    use
    0       key of *item* p in the epoch's permutation: refs, or sentences where each is a sample of its own, are put
            in the order of their keys
    1       sentence of the ref, where a ref is a sample
    2       kind: single, random or mined
    3       grid of a mosaic
    4       cell of the target among those allowed
    5, 6    x and y of the crossing of a jittered 2x2
    7       unused
    8..15   the negatives, in the order of the free cells

A number below n is the high word of ``word * n``; a share is the upper 53 bits of a word. Distinct draws are made by
skipping what was drawn before, never by drawing again, so the number of words used does not depend on their values.
Photos that are excluded for every sentence, or that show an excluded category, are never drawn at random: the draw is
among the others. A drawn photo that is the target's own, or that is excluded as too similar to it, is replaced by the
next of the others; the first follows the last. If too few are left, the target's photo is shown alone.

If photos turn out to be bad, ``Planner.substitute`` makes another row from a plan row:

* A bad target is replaced by the next ref of the epoch's permutation whose photo is not bad; the first ref follows the
  last. The row is made again for that ref, from the words of the same position.
* A bad negative of a mined sample is replaced by the next candidate of the sentence's window that the sample does not
  show yet; the window's beginning follows its end. Once the window is exhausted, the last candidates of the table's
  row follow, from its end, as many as there are cells to fill; then random photos.
* A bad photo of a random sample is replaced by another random one.
* A random photo for the k-th free cell is the first available one of those that words 16 + k, 24 + k, 32 + k, ...
  name; after 64 of them, the first available one in the rows after the last. If the target's exclusions leave none,
  the target's photo is shown alone.
* A cell without pixels stays as it is: its photo is never read.

Every photo that is tried on the way and found good is then shown. So it does not matter which bad photos were known
besides those that were replaced: meeting the faults one by one gives the same rows as knowing them all beforehand.
"""

from typing import TYPE_CHECKING

from nemo_dali._lazy import lazy_names

if TYPE_CHECKING:
    from nemo_dali.kernels.plan.rows import KINDS as KINDS
    from nemo_dali.kernels.plan.rows import PLAN as PLAN
    from nemo_dali.plan.by_epoch import ByEpoch as ByEpoch
    from nemo_dali.plan.policy import MosaicPolicy as MosaicPolicy
    from nemo_dali.plan.policy import read_policy as read_policy
    from nemo_dali.plan.policy import write_policy as write_policy

__all__ = ["KINDS", "PLAN", "ByEpoch", "MosaicPolicy", "read_policy", "write_policy"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "KINDS": ".kernels.plan.rows",
        "PLAN": ".kernels.plan.rows",
        "ByEpoch": "by_epoch",
        "MosaicPolicy": "policy",
        "read_policy": "policy",
        "write_policy": "policy",
    },
)
