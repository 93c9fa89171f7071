"""Pixel kernels: the NumPy reference (the oracle), Numba for the CPU.

The sources lie in ``kernels/`` at the top of the repository. An installed wheel holds them in this folder; in a
checkout this package looks there too. They are never a top-level package: that name belongs to another project.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "tile.py").exists():  # a checkout, not a wheel
    __path__.append(str(_here.parents[1] / "kernels"))
