"""Making a tile file: photos are decoded once, into the mapped file, and their digests say which of them are done.

    tile_decoding ──▶ /tiles/480x480, /tiles/240x240 ──▶ fsync ──▶ /digest

Until all photos are done the file is called F.tiles.h5.partial. Its length and everything in it but the pixels, the
digests and the fingerprint are there from the start. A photo's digest is written after its tiles are on the disk, so
that a run that was killed goes on behind the last digest; the fingerprint is written last, in place.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np

from nemo_dali import __version__, cuda
from nemo_dali.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.kernels.tile import RESAMPLE
from nemo_dali.progress import progress
from nemo_dali.sharding import thread_count
from nemo_dali.storage import DISK_ERRORS, check_target, locked
from nemo_dali.tile_decoding import decode_tiles
from nemo_dali.tiles import (
    FORMAT,
    GRIDS,
    U8,
    UNFINISHED,
    VERSION,
    Shape,
    TileFile,
    cell_shapes,
    digests,
    read_tiles,
    tiles_fingerprint,
)

logger = logging.getLogger("nemo_dali")

PAGE = 4096  # bytes; where arrays begin, so that no digest lies across two pages, of which a kill may leave one
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
            f"{self.output}: {self.photos} photos as {_listed(self.shapes)}, {_amount(self.nbytes)}; "
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

    A run that was interrupted goes on where it stood, if it is asked for the same; asked for anything else it refuses.

    Args:
        dataset_path: a .ris.h5 file.
        size: height and width in pixels of the frames that the tiles are for.
        output: the tile file; one that exists is replaced only when the new one is complete.
        resample: "cv2-linear" or "pillow-bilinear".
        grids: 1 for the whole frame, as single photos need it, 2 for 2x2, 3 for 3x3.
        images: where the photos are, if not where they were when the data set file was made.
        num_threads: of DALI; None: one per core.
        device: "cpu", "cuda" or "cuda:1": what decodes and resamples. A GPU's decoder gives slightly other pixels than
            the CPU's; the file says which it was. No GPU has run this yet.
        announce: told beforehand how large the file will be.

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
    device_id = cuda.cuda_device(device)
    if not grids or not set(grids) <= set(GRIDS):
        raise ValueError(f"grids ({', '.join(map(str, grids))}) must be some of {GRIDS}")
    from nvidia.dali import __version__ as dali_version

    dataset = Dataset.open(dataset_path, images=images)
    dataset.photo_path(0)  # a folder that is not there is told before anything is written
    wanted = {
        "dataset_fingerprint": dataset.fingerprint,
        "dataset_name": dataset.name,
        "size": size,
        "resample": resample,
        "grids": tuple(sorted(set(grids))),
        "decoder": f"DALI {dali_version} {'cpu' if device_id is None else 'mixed'}",
    }
    output = Path(output).absolute()
    start = time.monotonic()
    with _unfinished(output, wanted, len(dataset.images.id)) as (tiles, file):
        pending = np.flatnonzero(~tiles.digest.any(axis=1)).tolist()
        _announce(output, tiles, pending, announce)
        writable = {
            shape: np.memmap(tiles.path, np.uint8, "r+", _offset(array), array.shape)
            for shape, array in tiles.arrays.items()
        }
        with ThreadPoolExecutor(num_threads + 1) as pool, _Record(file, tiles, pool) as record:
            made = decode_tiles(dataset, resample, writable, pending, num_threads=num_threads, device_id=device_id)
            with closing(made) as batches:
                for _ in progress(record.each(batches), total=len(pending), what="making tiles", unit="photo"):
                    pass
        digest = tiles_fingerprint(tiles, tiles.digest)
        # In place, as HDF5 may leave a file unreadable that is killed while it is changed.
        head = os.pread(file, min(map(_offset, writable.values())), 0)
        os.pwrite(file, digest.encode(), head.index(tiles.fingerprint.encode()))
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
    text = f"{output}: {photos} photos as {_listed(tiles.arrays)}, {_amount(needed)}"
    announce(text + (f"; {photos - len(pending)} photos are done already" if len(pending) < photos else ""))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        logger.warning(
            "%s will be larger than this machine's memory (%s): a Loader that maps it will read from the disk.",
            output,
            _amount(memory),
        )


def _listed(shapes: Iterable[Shape]) -> str:
    return ", ".join(f"{h}x{w}" for h, w in shapes)


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _nbytes(shapes: Iterable[Shape], photos: int) -> int:
    """How large the file is, to a few pages."""
    return photos * (32 + sum(3 * h * w for h, w in shapes)) + 16 * PAGE


def _offset(array: U8) -> int:
    """Where in its file a mapped array begins."""
    return cast("np.memmap[Any, Any]", array).offset


@contextmanager
def _unfinished(output: Path, wanted: dict[str, Any], photos: int) -> Iterator[tuple[TileFile, int]]:
    """The file in the making, with its descriptor; it gets its name when the block ends without an exception.

    After an exception it is left for the next run, if any photo is done.
    """
    check_target(output, FORMAT)
    partial = output.with_name(output.name + ".partial")
    try:
        file = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FileFormatError(f"Cannot write {output}: {error.strerror}. Choose another place with -o.") from error
    tiles = None
    try:
        if not locked(file, partial):
            raise FileFormatError(f"Cannot write {output}: another run is writing it. Wait for it or end it.")
        tiles = _begun(partial)
        try:
            if tiles is None:
                shapes = cell_shapes(wanted["size"], wanted["grids"])
                _check_room(output, file, _nbytes(shapes, photos))
                os.ftruncate(file, _nbytes(shapes, photos))  # fails here, and not in HDF5, where files may not be large
                _create(partial, wanted, shapes, photos)
                tiles = read_tiles(partial)
            else:
                _check_options(output, partial, tiles, wanted)
                _check_room(output, file, os.fstat(file).st_size)
            # All of it now: where the disk is full a mapped page cannot be written, and the process is killed.
            os.posix_fallocate(file, 0, os.fstat(file).st_size)
            yield tiles, file
            os.fsync(file)
            partial.replace(output)
            folder = os.open(output.parent, os.O_RDONLY)
            os.fsync(folder)  # the new name itself survives a power cut
            os.close(folder)
        except BaseException:
            if tiles is None or not tiles.digest.any():
                with suppress(OSError):
                    partial.unlink()
            raise
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise FileFormatError(
            f"Cannot write {output}: {error.strerror}. Free some space or choose another place with -o."
        ) from error
    finally:
        os.close(file)


def _begun(partial: Path) -> TileFile | None:
    """What an earlier run left, if any photo is done."""
    try:
        tiles = read_tiles(partial)
    except FileFormatError:  # killed before the first photo, when the file itself was being made
        return None
    return tiles if tiles.digest.any() else None


def _check_options(output: Path, partial: Path, tiles: TileFile, wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if (found := getattr(tiles, name)) != value:
            raise FileFormatError(
                f"Cannot write {output}: {tiles.digest.any(axis=1).sum()} of {len(tiles.digest)} photos are done for "
                f"{name.replace('_', ' ')} {found!s:.20}, not {value!s:.20}. To go on give the "
                f"same options again; to start anew remove {partial}, or choose another place with -o."
            )


def _check_room(output: Path, file: int, needed: int) -> None:
    there, free = os.fstat(file).st_blocks * 512, shutil.disk_usage(output.parent).free
    if needed - there > free:
        raise FileFormatError(
            f"Cannot write {output}: it takes {_amount(needed)}, and the disk has {_amount(free + there)} for it. Free "
            "some space or choose another place with -o."
        )


def _create(partial: Path, attributes: dict[str, Any], shapes: list[Shape], photos: int) -> None:
    """Everything but pixels, digests and fingerprint; the same arguments give the same bytes."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_file_locking(False, True)  # HDF5's own lock would collide with ours: both are flock
    access.set_alignment(1, PAGE)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    array = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    array.set_layout(h5py.h5d.CONTIGUOUS)
    array.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # now, but nothing is written: the file is as long as it will be
    array.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    array.set_obj_track_times(False)
    created = h5py.h5f.create(os.fsencode(partial), h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    with h5py.File(created) as file:
        file.attrs["fingerprint"] = UNFINISHED
        file.attrs.update(attributes | {"grids": json.dumps(attributes["grids"])})
        file.attrs["format"], file.attrs["version"] = FORMAT, VERSION
        file.attrs["made_by"] = f"nemo-dali {__version__}"
        file.create_group("tiles", track_times=False)
        arrays: dict[str, tuple[int, ...]] = {f"tiles/{h}x{w}": (photos, 3, h, w) for h, w in shapes}
        for name, shape in (arrays | {"digest": (photos, 32)}).items():
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.STD_U8LE, space, array)


class _Record:
    """Writes down which photos are done: the digest of their tiles, once these are on the disk."""

    def __init__(self, file: int, tiles: TileFile, pool: Executor) -> None:
        self._file, self._tiles, self._pool = file, tiles, pool
        self._digests_at = _offset(tiles.digest)
        self._written: list[tuple[int, bytes]] = []  # row and digest of what nobody has asked the disk for yet,
        self._syncing: list[tuple[int, bytes]] = []  # and of what was written when the disk was last waited for
        self._sync: Future[None] = pool.submit(os.fsync, file)
        self._began = time.monotonic()

    def each(self, batches: Iterable[list[int]]) -> Iterator[int]:
        """The rows of batches whose tiles are written."""
        for rows in batches:
            self._written += zip(rows, digests(self._tiles.arrays, rows, self._pool), strict=True)
            if self._sync.done() and time.monotonic() - self._began >= SYNC_INTERVAL_S:
                self._turn()
            yield from rows

    def _turn(self) -> None:
        """Write down what the disk has by now, and wait for the rest, in the background."""
        self._sync.result()
        for row, digest in self._syncing:
            os.pwrite(self._file, digest, self._digests_at + len(digest) * row)
        self._syncing, self._written = self._written, []
        self._sync, self._began = self._pool.submit(os.fsync, self._file), time.monotonic()

    def __enter__(self) -> "_Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._turn()
        self._turn()
