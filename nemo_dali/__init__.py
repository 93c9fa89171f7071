"""NeMo mosaics for referring image segmentation, made inside a DALI pipeline.

The public names are those in ``__all__``, and the modules ``fn`` (operators for DALI pipelines of one's own),
``presets`` and ``metrics``. Each is imported when first used, so that ``import nemo_dali`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nemo_dali._version import __version__ as __version__

if TYPE_CHECKING:
    from nemo_dali import fn as fn
    from nemo_dali import metrics as metrics
    from nemo_dali import presets as presets
    from nemo_dali.batch import Batch
    from nemo_dali.data.dataset import Dataset
    from nemo_dali.errors import AnnotationError, FileFormatError, NemoError, PhotoError, StateError
    from nemo_dali.loader import Loader
    from nemo_dali.mining.table import NegativeTable
    from nemo_dali.plan.policy import MosaicPolicy

_HOMES = {
    "AnnotationError": "errors",
    "Batch": "batch",
    "Dataset": "data.dataset",
    "FileFormatError": "errors",
    "Loader": "loader",
    "MosaicPolicy": "plan.policy",
    "NegativeTable": "mining.table",
    "NemoError": "errors",
    "PhotoError": "errors",
    "StateError": "errors",
}

__all__ = [
    "AnnotationError",
    "Batch",
    "Dataset",
    "FileFormatError",
    "Loader",
    "MosaicPolicy",
    "NegativeTable",
    "NemoError",
    "PhotoError",
    "StateError",
]


def __getattr__(name: str) -> Any:
    if name in ("fn", "metrics", "presets"):
        return import_module(f"nemo_dali.{name}")
    if name in _HOMES:
        return getattr(import_module(f"nemo_dali.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nemo_dali' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
