"""The Loader: plan, pipeline and text as one iterator of batches, in the style that a training repository expects.

style       what a step yields; B samples, frames of S x S pixels, L tokens; tensors unless said otherwise
batch       Batch
dali        [{"image": ..., "mask": ..., "tokens": ..., "attention_mask": ...}], as DALI's PyTorch iterators
lavt        image, mask [B, S, S], tokens [B, 1, L], attention mask [B, 1, L]      LAVT data/dataset_refer_bert.py
caris       [image, {"mask": mask, "cls": category [B]}, tokens [B, 1, L], attention mask [B, 1, L]]
                                                                 CARIS data/dataset_refer_bert.py, utils.py
maskris     as caris, with masked tokens [B, 1, L] before the attention mask         MaskRIS, the same files
cgformer    tuples of B: images, tokens [1, L], masks, attention masks [1, L]        CGFormer utils/dataset.py
cris        image, tokens [B, L], mask [B, S, S]                       CRIS, ETRIS, DETRIS utils/dataset.py
rela        a list of B dicts                          ReLA gres_model/data/dataset_mappers/refcoco_mapper.py
dmmi        image, mask, source (list of str), tokens [B, 1, L], masked tokens [B, 1, L], attention mask [B, 1, L]
                                                                                       DMMI data/dataset.py
dmmi-zom    the same with [B, L]                                                   DMMI data/dataset_zom.py
"""

from typing import TYPE_CHECKING

from nemo_dali._lazy import lazy_names

if TYPE_CHECKING:
    from nemo_dali.loader.batch import Batch as Batch
    from nemo_dali.loader.format import BatchFormat as BatchFormat
    from nemo_dali.loader.loader import Loader as Loader

__all__ = ["Batch", "BatchFormat", "Loader"]

__getattr__, __dir__ = lazy_names(__name__, {"Batch": "batch", "BatchFormat": "format", "Loader": "loader"})
