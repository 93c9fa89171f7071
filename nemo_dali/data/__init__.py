"""The data set file: annotations read, checked and stored in columns; photos and run lengths."""

from typing import TYPE_CHECKING

from nemo_dali._lazy import lazy_names

if TYPE_CHECKING:
    from nemo_dali.data.annotations import read_annotations as read_annotations
    from nemo_dali.data.dataset import Dataset as Dataset
    from nemo_dali.data.indexing import index_dataset as index_dataset

__all__ = ["Dataset", "index_dataset", "read_annotations"]

__getattr__, __dir__ = lazy_names(
    __name__, {"Dataset": "dataset", "index_dataset": "indexing", "read_annotations": "annotations"}
)
