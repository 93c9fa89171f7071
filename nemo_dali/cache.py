"""Where things are kept that can be made again: tokens, compiled kernels."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder; it need not exist yet."""
    if folder := os.environ.get("NEMO_DALI_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nemo-dali"
