"""Making a tile file: photos are decoded once, into the mapped file, and their digests say which of them are done.

    _decode ──▶ /tiles/480x480, /tiles/240x240 ──▶ fsync ──▶ /digest

A photo's digest is written after its tiles are on disk, so a run that was killed continues after the last digest.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali._choices import GRIDS
from nemo_dali.data.dataset import Dataset
from nemo_dali.io.layout import Layout
from nemo_dali.io.progress import progress
from nemo_dali.io.threads import thread_count
from nemo_dali.io.writer import Unfinished, amount, unfinished
from nemo_dali.kernels.tile import RESAMPLE
from nemo_dali.pipeline import gpu
from nemo_dali.tiles._decode import decode_tiles
from nemo_dali.tiles.file import (
    FORMAT,
    VERSION,
    Shape,
    TileFile,
    array_name,
    cell_shapes,
    digests,
    read_tiles,
    tiles_fingerprint,
)

logger = logging.getLogger("nemo_dali")

SYNC_INTERVAL_S = 2.0  # at least, between two waits for the disk


@dataclass(frozen=True)
class TilesReport:
    """What ``make_tiles`` wrote."""

    output: Path
    fingerprint: str
    photos: int
    decoded: int  # photos, in this run; the others were there already
    shapes: tuple[Shape, ...]
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.photos} photos as {_shapes_text(self.shapes)}, {amount(self.nbytes)}; "
            f"{self.decoded} decoded in {self.seconds:.1f} s"
        )


def make_tiles(
    dataset_path: str | Path,
    *,
    size: int,
    output: str | Path,
    resample: str = "cv2-linear",
    grids: Sequence[int] = (1, 2),
    images: str | Path | None = None,
    num_threads: int | None = None,
    device: str = "cpu",
    announce: Callable[[str], None] = logger.info,
) -> TilesReport:
    """Decode all photos of a data set once and write them, resampled to the cells of some grids, into a tile file.

    Called again with the same arguments, it continues an interrupted run; with different ones it refuses.

    Args:
        dataset_path: a .ris.h5 file.
        size: height and width in pixels of the frames that the tiles are for.
        output: the tile file; an existing one is replaced only when the new one is complete.
        resample: "cv2-linear" or "pillow-bilinear".
        grids: 1 for the whole frame, for single photos, 2 for 2x2, 3 for 3x3.
        images: where the photos are, if not where they were when the data set file was made.
        num_threads: DALI's; None: one per core.
        device: "cpu", "cuda" or "cuda:1": what decodes and resamples. A GPU's decoder gives slightly different pixels
            than the CPU's; the file records which was used.
        announce: called beforehand with a line on how large the file will be.

    Raises:
        PhotoError: a photo is missing, cannot be decoded or has changed; what is done is kept.
        FileFormatError: the data set cannot be read, the file cannot be written, the disk has no room for it, another
            run is writing it, or an unfinished one was begun with other options.
    """
    num_threads = thread_count() if num_threads is None else num_threads
    for name, value in (("size", size), ("num_threads", num_threads)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    if resample not in RESAMPLE:
        raise ValueError(f"resample ({resample!r}) must be one of {tuple(RESAMPLE)}")
    device_id = gpu.cuda_device(device)
    if not grids or not set(grids) <= set(GRIDS):
        raise ValueError(f"grids ({', '.join(map(str, grids))}) must be some of {GRIDS}")
    from nvidia.dali import __version__ as dali_version

    dataset = Dataset.open(dataset_path, images=images)
    dataset.photo_path(0)  # reports a missing folder before anything is written
    wanted: dict[str, Any] = {
        "dataset_fingerprint": dataset.fingerprint,
        "dataset_name": dataset.name,
        "size": size,
        "resample": resample,
        "grids": sorted(set(grids)),
        "decoder": f"DALI {dali_version} {'cpu' if device_id is None else 'mixed'}",
    }
    output = Path(output).absolute()
    start = time.monotonic()
    photos = len(dataset.images.id)
    shapes = cell_shapes(size, wanted["grids"])
    arrays = {array_name(h, w): Layout("|u1", (photos, 3, h, w), by_row=True) for h, w in shapes}
    with unfinished(
        output,
        format=FORMAT,
        version=VERSION,
        attributes=wanted,
        arrays=arrays | {"digest": Layout("|u1", (photos, 32))},
        read=read_tiles,
        done=_done,
    ) as made:
        tiles = made.file
        pending = np.flatnonzero(~tiles.digest.any(axis=1)).tolist()
        _announce(output, tiles, pending, announce)
        writable = {shape: made.writable(array_name(*shape)) for shape in shapes}
        with ThreadPoolExecutor(num_threads + 1) as pool, _Record(made, pool) as record:
            decoded = decode_tiles(dataset, resample, writable, pending, num_threads=num_threads, device_id=device_id)
            with closing(decoded) as batches:
                for _ in progress(record.each(batches), total=len(pending), what="making tiles", unit="photo"):
                    pass
        digest = tiles_fingerprint(tiles, tiles.digest)
        made.finish(digest)
    return TilesReport(
        output=output,
        fingerprint=digest,
        photos=len(tiles.digest),
        decoded=len(pending),
        shapes=tuple(tiles.arrays),
        nbytes=output.stat().st_size,
        seconds=time.monotonic() - start,
    )


def _announce(output: Path, tiles: TileFile, pending: list[int], announce: Callable[[str], None]) -> None:
    photos, needed = len(tiles.digest), tiles.path.stat().st_size
    text = f"{output}: {photos} photos as {_shapes_text(tiles.arrays)}, {amount(needed)}"
    announce(text + (f"; {photos - len(pending)} photos are done already" if len(pending) < photos else ""))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        logger.warning(
            "%s will be larger than this machine's memory (%s): a Loader that maps it will read from the disk.",
            output,
            amount(memory),
        )


def _done(tiles: TileFile) -> str:
    done = tiles.digest.any(axis=1).sum()
    return f"{done} of {len(tiles.digest)} photos are done" if done else ""


def _shapes_text(shapes: Iterable[Shape]) -> str:
    return ", ".join(f"{h}x{w}" for h, w in shapes)


class _Record:
    """Records which photos are done: the digests of their tiles, once the tiles are on disk."""

    def __init__(self, made: Unfinished[TileFile], pool: Executor) -> None:
        self._made, self._tiles, self._pool = made, made.file, pool
        self._written: list[tuple[int, bytes]] = []  # rows and digests of tiles that no sync covers yet,
        self._syncing: list[tuple[int, bytes]] = []  # and of those that the latest sync covers
        self._sync: Future[None] = pool.submit(made.sync)
        self._began = time.monotonic()

    def each(self, batches: Iterable[list[int]]) -> Iterator[int]:
        """The rows of batches whose tiles are written."""
        for rows in batches:
            for shape in self._tiles.arrays:
                self._made.seal(array_name(*shape), rows)
            self._written += zip(rows, digests(self._tiles.arrays, rows, self._pool), strict=True)
            if self._sync.done() and time.monotonic() - self._began >= SYNC_INTERVAL_S:
                self._turn()
            yield from rows

    def _turn(self) -> None:
        """Record what is on disk by now, and sync the rest in the background."""
        self._sync.result()
        for row, digest in self._syncing:
            self._made.record("digest", row, digest)
        self._syncing, self._written = self._written, []
        self._sync, self._began = self._pool.submit(self._made.sync), time.monotonic()

    def __enter__(self) -> "_Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._turn()
        self._turn()
