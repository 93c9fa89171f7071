"""From plan rows to tile records, as far as they are known before the frames have memory."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.plan.layout import by_sample, describe
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.kernels.tile import CV2_LETTERBOX, TILE, TileRecords
from nemo_dali.loader._frames import Frames
from nemo_dali.loader.options import LoaderOptions
from nemo_dali.loader.sources import Corpus
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.tiles.placement import ResidentTiles

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of plan rows.

    Attributes:
        tiles: dtype ``TILE`` [cells], complete but for the frames' and masks' addresses and, where it is not resident,
            the photo's; where the CPU reads resident tiles [B, most cells], each sample's cells followed by empty
            records.
        sample: int64 [cells], the sample of each.
        photo: int64 [cells], row in /images.
        begin: int64 [B + 1], each sample's first cell, and the end.
        letterboxed: bool [B], whether a sample is a photo on a border; its mask is then as ``soft_mask`` says.
        tile: int64 [cells], the resident tile that each shows; None: photos are decoded.
    """

    tiles: TileRecords
    sample: I64
    photo: I64
    begin: I64
    letterboxed: npt.NDArray[np.bool_]
    tile: I64 | None

    def of(self, first: int, end: int) -> "Cells":
        """The cells of samples ``first`` to ``end``, counted from ``first``; the records are a copy."""
        begin, stop = self.begin[first], self.begin[end]
        tiles = self.tiles[begin:stop] if self.tiles.ndim == 1 else self.tiles[first:end]
        return Cells(
            tiles=tiles.view(np.uint8).copy().view(TILE),  # as bytes: NumPy copies records field by field
            sample=self.sample[begin:stop] - first,
            photo=self.photo[begin:stop],
            begin=self.begin[first : end + 1] - begin,
            letterboxed=self.letterboxed[first:end],
            tile=None if self.tile is None else self.tile[begin:stop],
        )


class CellLayout:
    """Lays out the cells of plan rows for one loader.

    Args:
        frames: what the records are to describe.
        resident: tiles to be shown in place of the photos.
    """

    def __init__(
        self, corpus: Corpus, options: LoaderOptions, frames: Frames, *, resident: ResidentTiles | None
    ) -> None:
        self._corpus, self._format, self._resident = corpus, options.format, resident
        self._frames = frames  # the records hold its addresses
        self._most_cells = options.policy.largest_grid**2
        self._by_sample = resident is not None and options.resources.device_id is None

    def lay_out(self, rows: PlanRows) -> Cells:
        """The cells of plan rows, dtype ``plan.PLAN`` [B]."""
        format, corpus = self._format, self._corpus
        tiles, sample, photo = lay_out(rows, format.size, **self._frames.description)
        runs, run_count = corpus.runs_at(rows["ref"])
        describe(tiles, sample, photo, run_count, runs, corpus.photo_height, corpus.photo_width)
        # Only this line says that CRIS's letterbox is for single photos.
        letterboxed = (rows["grid"] == 1) & (format.fit == "letterbox")
        if letterboxed.any():
            boxed = letterboxed[sample]
            tiles["resample"][boxed], tiles["border"][boxed] = CV2_LETTERBOX, format.border
            tiles["soft_mask"][boxed] = format.mask_dtype == "float32"
        tile = None
        if self._resident is not None:
            tile = self._resident.find(tiles["y1"] - tiles["y0"], tiles["x1"] - tiles["x0"], photo)
            tiles["photo"] = self._resident.addresses[tile]
        begin = np.searchsorted(sample, np.arange(len(rows) + 1))
        if self._by_sample:
            table = np.zeros((len(rows), self._most_cells), tiles.dtype)
            by_sample(tiles, sample, table)
            tiles = table
        return Cells(tiles, sample, photo, begin, letterboxed, tile)
