"""The tile file (.tiles.h5): every photo decoded and resampled once, for each size of cell that the grids need.

    grid 1            grid 2            grid 3
    ┌───────────┐     ┌─────┬─────┐     ┌───┬───┬───┐     a frame of 50 pixels has one, one and four sizes of cells:
    │           │     │     │     │     ├───┼───┼───┤     50x50, 25x25, and 16x16, 16x17, 17x16 and 17x17
    │           │     ├─────┼─────┤     ├───┼───┼───┤
    │           │     │     │     │     │   │   │   │     /tiles/{h}x{w}  uint8 [photos, 3, h, w]
    └───────────┘     └─────┴─────┘     └───┴───┴───┘     /digest         uint8 [photos, 32], of a photo's tiles

A photo's row is its row in the data set's /images. ``make_tiles`` makes such files.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import GRIDS
from nemo_dali.data.columns import MAX_SIDE
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import CheckedRows, MappedFile, fingerprint
from nemo_dali.io.index import UNFINISHED
from nemo_dali.io.progress import progress
from nemo_dali.io.threads import thread_count
from nemo_dali.kernels.tile import RESAMPLE

FORMAT = "nemo-dali/tiles"
VERSION = 2
BLOCK = 1024  # photos whose digests are computed at once

U8 = npt.NDArray[np.uint8]
Shape = tuple[int, int]  # height and width of a cell in pixels


def cell_shapes(size: int, grids: Iterable[int]) -> list[Shape]:
    """The different sizes of the cells of these grids in a frame of ``size`` pixels, largest first."""
    sides = [np.unique(np.diff(size * np.arange(grid + 1) // grid)).tolist() for grid in grids]
    return sorted({(h, w) for lengths in sides for h in lengths for w in lengths if h and w}, reverse=True)


@dataclass(frozen=True, eq=False, repr=False)
class TileFile:
    """An open tile file of M photos: mapped arrays. It pickles as its path.

    A photo's tiles are checked against their checksums when they are first used: before reading some, call
    ``rows[h, w].check(photos)``.

    Attributes:
        size: height and width in pixels of the frames that the tiles are made for.
        grids: 1 for a single photo, 2 for 2x2, 3 for 3x3.
        decoder: what decoded the photos.
        arrays: uint8 [M, 3, h, w], planar RGB, by (h, w); rows are those of the data set's photos.
        digest: uint8 [M, 32], sha256 of the tiles of a photo, largest first.
    """

    path: Path
    mapped: MappedFile
    fingerprint: str
    dataset_fingerprint: str
    dataset_name: str
    size: int
    resample: str
    grids: tuple[int, ...]
    decoder: str
    arrays: Mapping[Shape, U8]
    digest: U8

    @staticmethod
    def open(path: str | Path) -> "TileFile":
        """Open a tile file in milliseconds, whatever its size.

        Raises:
            FileFormatError: not a tile file, truncated, half built, or damaged.
        """
        found = read_tiles(path)
        if found.fingerprint == UNFINISHED:
            output = found.path.with_name(found.path.name.removesuffix(".partial"))
            raise FileFormatError(
                f"{found.path} is half built: {found.digest.any(axis=1).sum()} of {len(found.digest)} photos are done. "
                f"Continue with: {_command(found.size, found.resample, found.grids, output)}"
            )
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return TileFile.open, (self.path,)  # a mapped array would pickle as its bytes

    @cached_property
    def rows(self) -> dict[Shape, CheckedRows]:
        """For each size, which photos' tiles have matched their checksums."""
        return {(h, w): self.mapped.rows(array_name(h, w)) for h, w in self.arrays}

    def content_fingerprint(self) -> str:
        """The fingerprint of what the file holds now; reads all of it."""
        digest = np.empty_like(self.digest)
        begins = range(0, len(digest), BLOCK)
        with ThreadPoolExecutor(thread_count()) as pool:
            for begin in progress(begins, total=len(begins), what="reading tiles", unit=f"{BLOCK} photos"):
                rows = range(begin, min(begin + BLOCK, len(digest)))
                digest[rows] = [np.frombuffer(one, np.uint8) for one in digests(self.arrays, rows, pool)]
        return tiles_fingerprint(self, digest)

    def check_dataset(self, dataset: Dataset) -> None:
        """Refuse a data set other than the one that these tiles were made from.

        Raises:
            FileFormatError: naming both fingerprints.
        """
        if self.dataset_fingerprint != dataset.fingerprint:
            raise FileFormatError(
                f"{self.path} was made from a different data set ({self.dataset_name}, "
                f"{self.dataset_fingerprint[:12]}) than {dataset.path} ({dataset.name}, {dataset.fingerprint[:12]}). "
                "Make one of this with: " + _command(self.size, self.resample, self.grids, self.path, dataset.path)
            )
        if len(self.digest) != len(dataset.images.id):
            raise FileFormatError(
                f"{self.path} is damaged: it has {len(self.digest)} photos, unlike {dataset.path}. Make it again."
            )

    def check(self, *, size: int, resample: str, grids: Iterable[int]) -> None:
        """Refuse frames that these tiles were not made for.

        Args:
            grids: those wanted; 1 for single photos.

        Raises:
            FileFormatError: a different size, a different resampling, or a grid that there are no tiles for.
        """
        wanted_grids = set(grids)
        missing = sorted(wanted_grids - set(self.grids))
        for what, found, wanted in (("size", self.size, size), ("resample", self.resample, resample)):
            if found != wanted:
                problem = f"was made for {what} {found}, not {wanted}"
                break
        else:
            if not missing:
                return
            problem = f"has no tiles for grid {' and '.join(map(str, missing))}"
        command = _command(size, resample, sorted(wanted_grids.union(self.grids)), self.path)
        raise FileFormatError(f"{self.path} {problem}. Make it with: {command}")


def _command(size: int, resample: str, grids: Sequence[int], output: Path, dataset: Path | str = "F.ris.h5") -> str:
    listed = " ".join(map(str, grids))
    return f"nemo-dali tiles {dataset} --size {size} --grids {listed} --resample {resample} -o {output}"


def read_tiles(path: str | Path) -> TileFile:
    """Open a tile file, finished or not.

    Raises:
        FileFormatError: not a tile file, cut short, or damaged.
    """
    path = Path(path).absolute()
    remedy = f"Make it with: nemo-dali tiles F.ris.h5 --size SIZE -o {path}"
    file = MappedFile(path, format=FORMAT, version=VERSION, remedy=remedy, unfinished=True)
    size, grids = file.integer("size", least=1, most=MAX_SIDE), file.integers("grids", least=1, most=max(GRIDS))
    resample, digest = file.text("resample"), file.array("digest", "|u1", (None, 32))
    if not grids or resample not in RESAMPLE or not len(digest):
        raise file.damage("its grids or resampling are unknown, or it has no photos")
    return TileFile(
        path=path,
        mapped=file,
        fingerprint=file.index.fingerprint,
        dataset_fingerprint=file.text("dataset_fingerprint"),
        dataset_name=file.text("dataset_name"),
        size=size,
        resample=resample,
        grids=grids,
        decoder=file.text("decoder"),
        arrays={
            (h, w): file.array(array_name(h, w), "|u1", (len(digest), 3, h, w)) for h, w in cell_shapes(size, grids)
        },
        digest=digest,
    )


def array_name(height: int, width: int) -> str:
    """The name of the array of tiles of this size."""
    return f"tiles/{height}x{width}"


def tiles_fingerprint(tiles: TileFile, digest: U8) -> str:
    """The fingerprint of a file whose photos' tiles have these digests, uint8 [M, 32]."""
    return fingerprint(
        {
            "digest": digest,
            "dataset_fingerprint": tiles.dataset_fingerprint,
            "size": tiles.size,
            "resample": tiles.resample,
            "grids": json.dumps(list(tiles.grids)),
        }
    )


def digests(arrays: Mapping[Shape, U8], rows: Sequence[int], pool: Executor) -> Iterator[bytes]:
    """sha256 over the tiles of each of these photos, largest first."""

    def digest(row: int) -> bytes:
        made = hashlib.sha256()
        for array in arrays.values():
            made.update(array[row].data)
        return made.digest()

    return pool.map(digest, rows)
