"""NeMo mosaics for referring image segmentation, made inside a DALI pipeline.

See README.md; the public names are in ``__all__`` and are imported when first used.
"""

__version__ = "0.1.0"
