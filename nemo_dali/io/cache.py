"""Where things are kept that can be made again: tokens, compiled kernels."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """The folder; it need not exist yet."""
    if folder := os.environ.get("NEMO_DALI_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "nemo-dali"


def keep(path: Path, write: Callable[[Any], object]) -> None:
    """Make a file by ``write(file)``, whole or not at all: many ranks may come here at once.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the name must not survive a power cut without the content
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
