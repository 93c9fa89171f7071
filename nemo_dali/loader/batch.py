"""Batch: what a loader yields."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.plan.rows import KINDS, SINGLE, PlanRows
from nemo_dali.loader.format import BatchFormat
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline.cells import lay_out

if TYPE_CHECKING:
    import torch

    from nemo_dali.loader.contact_sheet import Sample

SHOWN = 8  # samples, at most, in a notebook


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's batch. Iterating over it gives the first five attributes, so that it can be unpacked.

    Attributes:
        image: torch tensor [B, 3, size, size] of the loader's dtype.
        mask: torch tensor [B, size, size] of the loader's mask_dtype, 1 where the referent is.
        tokens: torch int64 [B, L].
        attention_mask: torch int64 [B, L], 1 up to and including the end token.
        plan: NumPy array of dtype ``plan.PLAN`` [B], what each sample is made of.
        masked_tokens: torch int64 [B, L], the tokens with some words masked; None unless the loader masks words.
    """

    image: "torch.Tensor"
    mask: "torch.Tensor"
    tokens: "torch.Tensor"
    attention_mask: "torch.Tensor"
    plan: PlanRows
    _corpus: Corpus = field(repr=False)
    _format: BatchFormat = field(repr=False)
    masked_tokens: "torch.Tensor | None" = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.image, self.mask, self.tokens, self.attention_mask, self.plan))

    def to(self, device: Any, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on a device, as ``torch.Tensor.to`` puts them there."""
        names = ("image", "mask", "tokens", "attention_mask", "masked_tokens")
        tensors = {name: getattr(self, name) for name in names}
        return replace(
            self,
            **{name: t.to(device, non_blocking=non_blocking) for name, t in tensors.items() if t is not None},
        )

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
    def sent_ids(self) -> list[int]:
        """The publisher's sentence ids, B integers."""
        ids: list[int] = self._corpus.sent_id[self.plan["sentence"]].tolist()
        return ids

    @property
    def categories(self) -> list[int]:
        """The targets' categories, as rows of the data set's categories, B integers; -1 where unknown."""
        rows: list[int] = self._corpus.category[self.plan["ref"]].tolist()
        return rows

    @property
    def category_ids(self) -> list[int]:
        """The publisher's category ids (COCO's, in RefCOCO) of the targets, B integers; -1 where unknown."""
        ids: list[int] = self._corpus.category_id[self.plan["ref"]].tolist()
        return ids

    @property
    def sources(self) -> list[str]:
        """Where each ref came from (Ref-ZOM's 'source'), B strings, "" where the files do not say."""
        return [self._corpus.source(row) for row in self.plan["ref"].tolist()]

    @property
    def distractors(self) -> npt.NDArray[np.int64]:
        """int64 [B]: how many objects like the target its photo shows, as annotated; -1 where unknown."""
        found: npt.NDArray[np.int64] = self._corpus.distractors[self.plan["ref"]].astype(np.int64)
        return found

    @property
    def empty(self) -> npt.NDArray[np.bool_]:
        """bool [B]: nothing in the target's photo fits the expression; the mask is empty."""
        found: npt.NDArray[np.bool_] = self._corpus.empty[self.plan["ref"]] == 1
        return found

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """int64 [B, 2]: height and width, in pixels, of the photos that hold the targets."""
        rows = self._target_photos
        return np.stack([self._corpus.photo_height[rows], self._corpus.photo_width[rows]], axis=1).astype(np.int64)

    def original_masks(self) -> list[npt.NDArray[np.uint8]]:
        """The targets' masks at their photos' own sizes: B arrays, uint8 [height, width] in {0, 1}."""
        return [self._corpus.mask(row) for row in self.plan["ref"].tolist()]

    @property
    def image_ids(self) -> list[int]:
        """The publisher's image ids of the photos that hold the targets, B integers."""
        ids: list[int] = self._corpus.image_id[self._target_photos].tolist()
        return ids

    def samples(self, most: int | None = None) -> "list[Sample]":
        """What a contact sheet shows of the first samples, at most ``most``; their pixels are copied to the host."""
        from nemo_dali.loader.contact_sheet import Cell, Sample

        rows, image = self.plan[:most], self.image[:most].detach().cpu()
        if image.is_floating_point():
            image = image.float()
            mean, std = (image.new_tensor(of)[:, None, None] for of in (self._format.mean, self._format.std))
            image = ((image * std + mean) * 255).round().clamp(0, 255).byte()
        masks = (self.mask[:most].cpu() >= 0.5).byte().numpy()  # letterboxed ones have soft edges
        tiles, owner, _ = lay_out(rows, self._format.size)
        boxes = np.stack([tiles[edge] for edge in ("x0", "y0", "x1", "y1")], axis=1)
        return [
            Sample(
                pixels,
                mask,
                sentence,
                KINDS[row["kind"]],
                ()
                if row["kind"] == SINGLE
                else tuple(Cell((x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes[owner == index].tolist()),
                bool(empty),
            )
            for index, (pixels, mask, sentence, row, empty) in enumerate(
                zip(image.numpy(), masks, self.sentences[:most], rows, self.empty[:most], strict=True)
            )
        ]

    def _repr_html_(self) -> str:
        """What a notebook shows: a contact sheet."""
        from nemo_dali.loader.contact_sheet import html_of

        shape = " x ".join(map(str, self.image.shape))
        facts = {"image": f"{shape}, {self.image.dtype}, on {self.image.device}"}
        return html_of("Batch", facts, self.samples(SHOWN))

    @property
    def _target_photos(self) -> npt.NDArray[np.int32]:
        """Photo rows, int32 [B]."""
        cells = self.plan["cell"][:, None].astype(np.int64)
        return np.take_along_axis(self.plan["images"], cells, axis=1)[:, 0]
