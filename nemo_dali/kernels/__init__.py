"""Pixel kernels: the NumPy reference (the oracle), Numba for the CPU.

The sources lie in ``kernels/`` at the top of the repository. An installed wheel holds them in this folder; in a
checkout this package looks there too. They are never a top-level package: that name belongs to another project.
"""

import logging
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "tile.py").exists():  # a checkout, not a wheel
    _sources = _here.parents[1] / "kernels"
    __path__.append(str(_sources))
    # Numba's cache notices a change of a function's own file, not of the files whose functions it calls.
    _newest = max(file.stat().st_mtime for file in _sources.glob("*.py"))
    for _index in (_sources / "__pycache__").glob("*.nbi"):
        with suppress(OSError):  # another process may be doing the same
            if _index.stat().st_mtime < _newest:
                _index.unlink()
else:
    _sources = _here

if "NUMBA_CACHE_DIR" not in os.environ:
    # Where Numba would look: beside the sources, then in the user's cache. With neither it raises at the first import.
    _user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    _places = (_sources / "__pycache__", _sources, _user, *_user.parents)
    _beside = next(place for place in _places[:2] if place.exists())
    _nearest = next(place for place in _places[2:] if place.exists())
    if not any(os.access(place, os.W_OK | os.X_OK) for place in (_beside, _nearest)):
        _temporary = tempfile.mkdtemp(prefix="nemo-dali-numba-")  # private: Numba runs what it finds in its cache
        os.environ["NUMBA_CACHE_DIR"] = _temporary
        if "numba" in sys.modules:
            sys.modules["numba"].config.CACHE_DIR = _temporary
        logging.getLogger("nemo_dali").warning(
            "Kernels are compiled anew, for some 20 s: neither %s nor %s can be written. Set NUMBA_CACHE_DIR to a "
            "folder of yours that lasts.",
            _sources,
            _user,
        )
