"""Batch: what a loader yields."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.corpus import Corpus

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's batch. Iterating it gives the first five attributes, so that it can be unpacked.

    Attributes:
        image: torch tensor [B, 3, size, size] of the loader's dtype.
        mask: torch uint8 [B, size, size], 1 where the referent is.
        tokens: torch int64 [B, L].
        attention_mask: torch int64 [B, L], 1 up to and including the end token.
        plan: NumPy array of dtype ``plan.PLAN`` [B], what each sample is made of.
    """

    image: "torch.Tensor"
    mask: "torch.Tensor"
    tokens: "torch.Tensor"
    attention_mask: "torch.Tensor"
    plan: npt.NDArray[Any]
    _corpus: Corpus = field(repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.image, self.mask, self.tokens, self.attention_mask, self.plan))

    def to(self, device: Any, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on a device, as ``torch.Tensor.to`` puts them there."""
        tensors = ("image", "mask", "tokens", "attention_mask")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in tensors})

    @property
    def sentences(self) -> list[str]:
        """The referring expressions, B strings."""
        return [self._corpus.sentence(row) for row in self.plan["sentence"].tolist()]

    @property
    def ref_ids(self) -> list[int]:
        """The publisher's ref ids, B integers."""
        ids: list[int] = self._corpus.ref_id[self.plan["ref"]].tolist()
        return ids

    @property
    def image_ids(self) -> list[int]:
        """The publisher's image ids of the photos that hold the targets, B integers."""
        rows = np.take_along_axis(self.plan["images"], self.plan["cell"][:, None].astype(np.int64), axis=1)[:, 0]
        ids: list[int] = self._corpus.image_id[rows].tolist()
        return ids
