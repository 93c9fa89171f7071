"""Schedule: which positions of an epoch each step of a rank shows."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_dali.errors import NemoError


@dataclass(frozen=True)
class Schedule:
    """Which samples of an epoch each step shows. A place in an epoch is the number of samples seen, over all ranks.

    Attributes:
        length: samples of an epoch.
        batch_size: of this rank.
        drop_last: leave out samples that do not fill a step.
        pad: fill up the last step with positions past the epoch's end; else it is smaller, and ranks may have different
            numbers of steps.
    """

    length: int
    batch_size: int
    rank: int
    world_size: int
    drop_last: bool
    pad: bool

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all ranks."""
        return self.batch_size * self.world_size

    def steps_after(self, seen: int) -> int:
        """Steps left in an epoch of which ``seen`` samples are done, by any number of ranks."""
        if not self.pad:
            seen += self.rank * self.batch_size
        left = max(self.length - seen, 0)
        return left // self.global_batch if self.drop_last else -(-left // self.global_batch)

    def check_filled(self) -> None:
        """Refuse an epoch without a step; in evaluation, which does not pad, a rank may have none.

        Raises:
            NemoError: there is none.
        """
        if self.pad and not self.steps_after(0):
            raise NemoError(
                f"The data set's {self.length} samples fill no global batch of {self.global_batch}. "
                "Lower batch_size or use drop_last=False."
            )

    def behind(self, epoch: int, seen: int) -> tuple[int, int]:
        """Epoch and samples seen of the step after this one."""
        seen += self.global_batch
        return (epoch, seen) if self.steps_after(seen) else (epoch + 1, 0)

    def positions(self, seen: int) -> npt.NDArray[np.int64]:
        """What this rank shows in the step after ``seen`` samples: int64 [batch_size], or fewer without padding."""
        first = seen + self.rank * self.batch_size
        end = first + self.batch_size
        return np.arange(first, end if self.pad else min(end, self.length))
