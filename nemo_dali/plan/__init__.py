"""The plan: which ref, sentence, mosaic and photos every sample of every epoch is made of.

A row is a pure function of (data set, table, policy, seed, epoch, position). Position p of an epoch owns 16 random
words: those that ``numpy.random.Philox(key=[seed, epoch], counter=[0, p, 0, 0]).random_raw(16)`` returns. They mean:

    word    use
    0       key of *item* p in the epoch's permutation: refs, or sentences where each is a sample of its own, are put
            in the order of their keys
    1       sentence of the ref, where a ref is a sample
    2       kind: single, random or mined
    3       grid of a mosaic
    4       cell of the target among those allowed
    5, 6    x and y of the crossing of a jittered 2x2
    7       not used
    8..15   the negatives, in the order of the free cells

A number below n is the high word of ``word * n``; a share is the upper 53 bits of a word. Distinct draws are made by
skipping what was drawn before, never by drawing again, so the number of words used does not depend on their values.
Photos that are excluded for every sentence or show an excluded category are no random ones: places among the others are
drawn then. A photo that is the target's own once more, or that is excluded as too similar to it, gives way to the next
of those places; behind the last comes the first. Where too few are left, the target's photo is shown alone.

Where photos turn out to be bad, ``Planner.substitute`` makes another row from a plan row:

* A bad target gives way to the next ref of the epoch's permutation whose photo is not bad; behind the last ref comes
  the first. The row is made anew for that ref, from the words of the same position.
* A bad negative of a mined sample gives way to the next candidate of the sentence's window that the sample does not
  show yet; behind the window's end comes its beginning. Once the window is spent, the last candidates of the table's
  row follow, from its end, as many as there are cells to fill; then random photos.
* A bad photo of a random sample gives way to another random one.
* A random photo for the k-th free cell is the first that can be had of those that words 16 + k, 24 + k, 32 + k, ...
  name; after 64 of them, the first that can be had in the rows behind the last. Where the target's exclusions leave
  none, the target's photo is shown alone.
* A cell without pixels is left alone: its photo is never read.

Every photo that is asked for on the way and found good is then shown. So it does not matter which bad photos were
known besides those that had to go: who meets the faults one by one ends with the rows of somebody who knew them all.
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
