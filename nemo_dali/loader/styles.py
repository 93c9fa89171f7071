"""Styles: a batch in the structure of a repository's own loader. ``nemo_dali.loader`` has the table."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import MaskDType
from nemo_dali.loader.batch import Batch
from nemo_dali.pipeline import gpu

if TYPE_CHECKING:
    import torch


def arrange(batch: Batch, style: str) -> Any:
    """A batch in one of the styles in the table of ``nemo_dali.loader``."""
    return STYLES[style](batch)


def masks_of(mask: "torch.Tensor", letterboxed: npt.NDArray[np.bool_], dtype: MaskDType) -> "torch.Tensor":
    """Masks of the given dtype.

    Args:
        mask: uint8 [B, S, S] as drawn: 0 and 1, or 0 to 255 for letterboxed photos in float32.
        letterboxed: bool [B].
    """
    if dtype == "int64":
        return mask.long()
    if dtype == "uint8":
        return mask
    mask = mask.float()
    if letterboxed.any():
        mask /= beside(np.where(letterboxed, 255, 1).astype(np.float32), mask)[:, None, None]
    return mask


def beside(array: npt.NDArray[Any], tensor: "torch.Tensor") -> "torch.Tensor":
    """A copy of a small array on a tensor's device; the host does not wait for a GPU."""
    import torch

    return gpu.send(array, tensor.device.index) if tensor.is_cuda else torch.from_numpy(array)


@dataclass(frozen=True, eq=False)
class Instances:
    """What ReLA's model reads of detectron2's class of that name; its loss does not use it.

    Attributes:
        image_size: height and width in pixels.
        gt_masks: uint8 [n, S, S], the merged mask; n is 1, or 0 where there is no target.
        gt_classes: int64 [n], the publisher's category ids, as detectron2 takes them from the annotations; -1 where the
            targets have several.
    """

    image_size: tuple[int, int]
    gt_masks: "torch.Tensor"
    gt_classes: "torch.Tensor"

    def __len__(self) -> int:
        return len(self.gt_masks)

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """The same with its tensors on a device, as ``torch.Tensor.to`` puts them there."""
        masks, classes = (tensor.to(*args, **kwargs) for tensor in (self.gt_masks, self.gt_classes))
        return replace(self, gt_masks=masks, gt_classes=classes)


def _dali(batch: Batch) -> Any:
    names = ("image", "mask", "tokens", "attention_mask")
    return [{name: getattr(batch, name) for name in names}]


def _lavt(batch: Batch) -> Any:
    return batch.image, batch.mask, batch.tokens[:, None], batch.attention_mask[:, None]


def _cris(batch: Batch) -> Any:
    return batch.image, batch.tokens, batch.mask


def _targets(batch: Batch) -> Any:
    return {"mask": batch.mask, "cls": beside(np.array(batch.categories, np.int64), batch.tokens)}


def _caris(batch: Batch) -> Any:
    return [batch.image, _targets(batch), batch.tokens[:, None], batch.attention_mask[:, None]]


def _maskris(batch: Batch) -> Any:
    return [batch.image, _targets(batch), batch.tokens[:, None], _masked(batch)[:, None], batch.attention_mask[:, None]]


def _cgformer(batch: Batch) -> Any:
    parts = (batch.image, batch.tokens[:, None], batch.mask, batch.attention_mask[:, None])
    return tuple(part.unbind(0) for part in parts)


def _rela(batch: Batch) -> Any:
    size = (batch.image.shape[-2], batch.image.shape[-1])
    categories = beside(np.array(batch.category_ids, np.int64), batch.tokens)
    empty = batch.empty.tolist()
    samples = []
    for row, sentence in enumerate(batch.sentences):
        mask, shown = batch.mask[row][None], slice(0 if empty[row] else 1)
        samples.append(
            {
                "image": batch.image[row],
                "height": size[0],
                "width": size[1],
                "image_id": batch.image_ids[row],
                "ref_id": batch.ref_ids[row],
                "sentence": sentence,
                "instances": Instances(size, mask[shown].byte(), categories[row : row + 1][shown]),
                "gt_mask_merged": mask,
                "empty": empty[row],
                "lang_tokens": batch.tokens[row][None],
                "lang_mask": batch.attention_mask[row][None],
            }
        )
    return samples


def _dmmi(batch: Batch) -> Any:
    text = (batch.tokens[:, None], _masked(batch)[:, None], batch.attention_mask[:, None])
    return batch.image, batch.mask, [source or "one" for source in batch.sources], *text


def _dmmi_zom(batch: Batch) -> Any:
    image, mask, source, *text = _dmmi(batch)
    return image, mask, source, *(part[:, 0] for part in text)


def _masked(batch: Batch) -> "torch.Tensor":
    return batch.tokens if batch.masked_tokens is None else batch.masked_tokens


STYLES: dict[str, Callable[[Batch], Any]] = {
    "batch": lambda batch: batch,
    "dali": _dali,
    "lavt": _lavt,
    "caris": _caris,
    "maskris": _maskris,
    "cgformer": _cgformer,
    "cris": _cris,
    "rela": _rela,
    "dmmi": _dmmi,
    "dmmi-zom": _dmmi_zom,
}
