"""The package's version, for setuptools, for files that say what wrote them, and for ``nemo_dali.__version__``."""

__version__ = "0.2.0"
