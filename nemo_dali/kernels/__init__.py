"""Pixel kernels: the NumPy reference (the oracle), Numba for the CPU.

The sources lie in ``kernels/`` at the top of the repository. An installed wheel holds them in this folder; in a
checkout this package looks there too. They are never a top-level package: that name belongs to another project.
"""

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
