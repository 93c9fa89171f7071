"""Annotation files of referring image segmentation ▸ columns in memory; the readers, and what they make."""

from nemo_dali.columns import MAX_SIDE, Annotations, Images, Refs, Sentences, begins, is_inside
from nemo_dali.refer_layout import read_refer

__all__ = ["MAX_SIDE", "Annotations", "Images", "Refs", "Sentences", "begins", "is_inside", "read_refer"]
