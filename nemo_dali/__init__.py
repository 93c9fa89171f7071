"""NeMo mosaics for referring image segmentation, made inside a DALI pipeline.

The public API is what ``__all__`` lists here and in ``nemo_dali.fn`` (operators for your own DALI pipelines),
``presets``, ``metrics``, ``loader``, ``plan``, ``text``, ``data``, ``tiles``, ``mining`` and ``synthetic``; the rest
may change. Names are imported when first used, so that ``import nemo_dali`` is quick.
"""

from typing import TYPE_CHECKING

from nemo_dali._lazy import lazy_names
from nemo_dali._version import __version__ as __version__

if TYPE_CHECKING:
    from nemo_dali import data as data
    from nemo_dali import fn as fn
    from nemo_dali import loader as loader
    from nemo_dali import metrics as metrics
    from nemo_dali import mining as mining
    from nemo_dali import plan as plan
    from nemo_dali import presets as presets
    from nemo_dali import synthetic as synthetic
    from nemo_dali import text as text
    from nemo_dali import tiles as tiles
    from nemo_dali.data.dataset import Dataset
    from nemo_dali.errors import AnnotationError, FileFormatError, NemoError, PhotoError, StateError
    from nemo_dali.loader.batch import Batch
    from nemo_dali.loader.contact_sheet import preview
    from nemo_dali.loader.loader import Loader
    from nemo_dali.mining.table import NegativeTable
    from nemo_dali.plan.by_epoch import ByEpoch
    from nemo_dali.plan.policy import MosaicPolicy, read_policy

__all__ = [
    "AnnotationError",
    "Batch",
    "ByEpoch",
    "Dataset",
    "FileFormatError",
    "Loader",
    "MosaicPolicy",
    "NegativeTable",
    "NemoError",
    "PhotoError",
    "StateError",
    "preview",
    "read_policy",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AnnotationError": "errors",
        "Batch": "loader.batch",
        "ByEpoch": "plan.by_epoch",
        "Dataset": "data.dataset",
        "FileFormatError": "errors",
        "Loader": "loader.loader",
        "MosaicPolicy": "plan.policy",
        "NegativeTable": "mining.table",
        "NemoError": "errors",
        "PhotoError": "errors",
        "StateError": "errors",
        "data": "",
        "fn": "",
        "loader": "",
        "metrics": "",
        "mining": "",
        "plan": "",
        "presets": "",
        "preview": "loader.contact_sheet",
        "read_policy": "plan.policy",
        "synthetic": "",
        "text": "",
        "tiles": "",
    },
)
