"""Assembler: turns a planned step into what a pipeline needs, and that into a batch once the pixels are written."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.plan.layout import place
from nemo_dali.kernels.tile import TileRecords
from nemo_dali.loader._frames import Frames
from nemo_dali.loader._sentences import SentenceTokens, Text
from nemo_dali.loader._steps import PlannedStep
from nemo_dali.loader.batch import Batch
from nemo_dali.loader.options import LoaderOptions
from nemo_dali.loader.sources import Corpus
from nemo_dali.loader.styles import masks_of
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.device_batch import DeviceBatch, device_batch
from nemo_dali.pipeline.paths import NOTHING, encode_path
from nemo_dali.plan.erasing import Corners, black_squares
from nemo_dali.tiles.placement import ResidentTiles

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A batch to be drawn.

    Attributes:
        planned: what it shows.
        image: torch [B, 3, size, size] and mask: torch uint8 [B, size, size], of undefined content until it is drawn.
        text: the sentences', on the image's device; on a GPU of undefined content until then, too.
        paths: of the photo of each cell, from ``encode_path``; none with resident tiles.
        work: dtype ``TILE`` [cells], with resident tiles [B, most cells]; on a GPU a ``DeviceBatch`` either way.
        turn: uint8 [cells], how each photo is to be turned; None: none is.
        squares: per cell, float32 [squares, 2], where its photo is black; None without ``erase``.
        stream: on a GPU torch's current stream when the memory was allocated.
    """

    planned: PlannedStep
    image: "torch.Tensor"
    mask: "torch.Tensor"
    text: Text
    paths: list[npt.NDArray[np.uint8]]
    work: TileRecords | DeviceBatch
    turn: npt.NDArray[np.uint8] | None
    squares: list[Corners] | None
    stream: "torch.cuda.Stream | None"


class Assembler:
    """Makes batches from planned steps; a pipeline writes the pixels.

    Args:
        frames: allocates the memory.
        sentences: provides the text.
        resident: tiles to be shown in place of the photos.
    """

    def __init__(
        self,
        corpus: Corpus,
        options: LoaderOptions,
        frames: Frames,
        sentences: SentenceTokens,
        *,
        resident: ResidentTiles | None,
    ) -> None:
        self._corpus, self._frames, self._sentences, self._resident = corpus, frames, sentences, resident
        self._format, self._seed, self._device_id = options.format, options.seed, options.resources.device_id
        self._found = np.zeros(len(corpus.photo_width), bool)  # photos whose files were looked at
        if self._device_id is not None and resident is None:
            gpu.check_photo_sizes(corpus.photo_width, corpus.photo_height)

    def prepare(self, planned: PlannedStep) -> PreparedBatch:
        """Allocate a step's batch, and record where everything is.

        Raises:
            NemoError: there is no memory left, or a resident tile is damaged.
        """
        rows, cells, frames = planned.rows, planned.cells, self._frames
        image, mask = frames.take(len(rows))
        tiles, sample = cells.tiles, cells.sample
        if tiles.ndim > 1:
            sample = np.repeat(np.arange(len(tiles)), tiles.shape[1])
        place(tiles.reshape(-1), sample, image.data_ptr(), frames.image_bytes, mask.data_ptr(), frames.mask_bytes)
        paths, turn, squares = [], None, None
        if self._resident is not None and cells.tile is not None:
            self._resident.check(cells.tile)
        else:
            paths = [self._path(row) for row in cells.photo.tolist()]
            turn = None if self._corpus.photo_turn is None else self._corpus.photo_turn[cells.photo]
            squares = self._squares(planned) if self._format.erase else None
        work: TileRecords | DeviceBatch = tiles
        stream = None
        if self._device_id is None:
            text = self._sentences.text(planned.epoch, rows)
        else:
            stream = gpu.current_stream(self._device_id)
            text, launches = self._sentences.on_device(planned.epoch, rows)
            work = device_batch(tiles, sample, mask, stream, text=launches, resident=self._resident)
        return PreparedBatch(planned, image, mask, text, paths, work, turn, squares, stream)

    def finish(self, prepared: PreparedBatch) -> Batch:
        """The batch, once the pixels are written."""
        rows, image, text = prepared.planned.rows, prepared.image, prepared.text
        if self._device_id is not None:
            current = gpu.current_stream(self._device_id)
            if current != prepared.stream:  # torch must not reuse the memory before this stream is done with it
                image.record_stream(current)
                text.tokens.record_stream(current)
        mask = masks_of(prepared.mask, prepared.planned.cells.letterboxed, self._format.mask_dtype)
        return Batch(image, mask, text.tokens, text.attention_mask, rows, self._corpus, self._format, text.masked)

    def look_again(self) -> None:
        """Check every photo's file again when it is next used: something was wrong with one."""
        self._found[:] = False

    def _path(self, photo: int) -> npt.NDArray[np.uint8]:
        """A photo's path. Its file is checked only when it is first used: that may be slow over a network."""
        path = encode_path(self._corpus.photo_path(photo), looked_at=self._found[photo])
        self._found[photo] = path is not NOTHING
        return path

    def _squares(self, planned: PlannedStep) -> list[Corners]:
        """The squares of each cell: only the target's photo may have some, and a mosaic shows it once."""
        rows, cells = planned.rows, planned.cells
        target = rows["images"][np.arange(len(rows)), rows["cell"]]
        found = black_squares(
            rows["position"],
            self._corpus.photo_width[target],
            seed=self._seed,
            epoch=planned.epoch,
            share=self._format.erase,
        )
        shows = cells.photo == target[cells.sample]
        return [found[s] if its else found[s][:0] for s, its in zip(cells.sample, shows, strict=True)]
