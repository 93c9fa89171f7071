"""Resident tiles: the file of resampled photos, how it is made, and where its tiles are kept."""

from typing import TYPE_CHECKING

from nemo_dali._lazy import lazy_names

if TYPE_CHECKING:
    from nemo_dali.tiles.build import make_tiles as make_tiles
    from nemo_dali.tiles.file import TileFile as TileFile

__all__ = ["TileFile", "make_tiles"]

__getattr__, __dir__ = lazy_names(__name__, {"TileFile": "file", "make_tiles": "build"})
