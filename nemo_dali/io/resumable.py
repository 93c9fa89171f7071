"""HDF5 files that take long to fill: as long as they will be from the start, filled in place, renamed when complete.

    F.partial ──▶ created, all of its room taken ──▶ rows ──▶ fsync ──▶ which rows are done ──▶ fingerprint ──▶ F

A run that was killed goes on behind what was written down as done. The fingerprint is written last, in place, as HDF5
may leave a file unreadable that is killed while it changes it.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import h5py
import numpy as np
import numpy.typing as npt

from nemo_dali._checks import shorten
from nemo_dali._version import __version__
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import DISK_ERRORS, check_target, locked

UNFINISHED = "unfinished".ljust(64, "-")  # in place of the fingerprint, and as long
PAGE = 4096  # bytes; where arrays begin, so that no small record lies across two pages, of which a kill may leave one

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # type and shape of each array, by name


class HasFingerprint(Protocol):
    """What is read of a file."""

    @property
    def fingerprint(self) -> str:
        """That of the content, or UNFINISHED."""
        ...


T = TypeVar("T", bound=HasFingerprint)


def amount(nbytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def offset(array: npt.NDArray[Any]) -> int:
    """Where in its file a mapped array begins."""
    return cast("np.memmap[Any, Any]", array).offset


class Unfinished(Generic[T]):
    """A file that is being written.

    Attributes:
        file: what ``read`` made of it: mapped, read-only arrays that show what is written.
        path: its name until it is finished.
        descriptor: open for reading and writing.
    """

    def __init__(self, file: T, path: Path, descriptor: int) -> None:
        self.file, self.path, self.descriptor = file, path, descriptor

    def writable(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The same array, to be written into."""
        return np.memmap(self.path, array.dtype, "r+", offset(array), array.shape)

    def record(self, array: npt.NDArray[Any], row: int, content: bytes) -> None:
        """Write a small record that says what is done, in place."""
        os.pwrite(self.descriptor, content, offset(array) + len(content) * row)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        os.fsync(self.descriptor)

    def finish(self, fingerprint: str, first: int) -> None:
        """Put the fingerprint in place.

        Args:
            first: where the first array begins; the place lies before it.
        """
        head = os.pread(self.descriptor, first, 0)
        os.pwrite(self.descriptor, fingerprint.encode(), head.index(self.file.fingerprint.encode()))


@contextmanager
def unfinished(
    output: Path,
    *,
    format: str,
    version: int,
    attributes: Mapping[str, Any],
    arrays: Shapes,
    read: Callable[[Path], T],
    done: Callable[[T], str],
) -> Iterator[Unfinished[T]]:
    """Begin a file or go on with one; it gets its name when the block ends without an exception.

    After an exception it is left for the next run, if anything in it is done.

    Args:
        output: its name when it is complete; one that exists is replaced only then.
        attributes: what the file is made of and how; a file that was begun with others is refused. Lists are stored as
            JSON.
        arrays: all of its datasets.
        read: opens a file, finished or not; the result has the attributes as attributes.
        done: says how much of a file is done ("12 of 24 photos are done"); "" where nothing is.

    Raises:
        FileFormatError: something else has that name, the file cannot be written, the disk has no room for it, another
            run is writing it, or an unfinished one was begun with other attributes.
    """
    check_target(output, format)
    partial = output.with_name(output.name + ".partial")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FileFormatError(f"Cannot write {output}: {error.strerror}. Choose another place with -o.") from error
    file = None
    try:
        if not locked(descriptor, partial):
            raise FileFormatError(f"Cannot write {output}: another run is writing it. Wait for it or end it.")
        file = _begun(partial, read, done)
        try:
            if file is None:
                nbytes = _nbytes(arrays)
                _check_room(output, descriptor, nbytes)
                os.ftruncate(descriptor, nbytes)  # fails here, and not in HDF5, where files may not be large
                _create(partial, format=format, version=version, attributes=attributes, arrays=arrays)
                file = read(partial)
            else:
                _check_attributes(output, partial, file, attributes, done(file))
                _check_room(output, descriptor, os.fstat(descriptor).st_size)
            # All of it now: where the disk is full a mapped page cannot be written, and the process is killed.
            os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
            yield Unfinished(file, partial, descriptor)
            os.fsync(descriptor)
            partial.replace(output)
            folder = os.open(output.parent, os.O_RDONLY)
            os.fsync(folder)  # the new name itself survives a power cut
            os.close(folder)
        except BaseException:
            if file is None or not done(file):
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
        os.close(descriptor)


def _begun(partial: Path, read: Callable[[Path], T], done: Callable[[T], str]) -> T | None:
    """What an earlier run left, if anything in it is done."""
    try:
        file = read(partial)
    except FileFormatError:  # killed when the file itself was being made
        return None
    return file if done(file) else None


def _check_attributes(output: Path, partial: Path, file: Any, wanted: Mapping[str, Any], done: str) -> None:
    for name, value in wanted.items():
        if (found := getattr(file, name)) != value:
            here, there = shorten(str(found), str(value))
            raise FileFormatError(
                f"Cannot write {output}: {done} for {name.replace('_', ' ')} {here}, not {there}. To go on give the "
                f"same options again; to start anew remove {partial}, or choose another place with -o."
            )


def _nbytes(arrays: Shapes) -> int:
    """How large the file is, to a few pages."""
    sizes = [np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in arrays.values()]
    return sum(sizes) + (16 + len(sizes)) * PAGE


def _check_room(output: Path, descriptor: int, needed: int) -> None:
    there, free = os.fstat(descriptor).st_blocks * 512, shutil.disk_usage(output.parent).free
    if needed - there > free:
        raise FileFormatError(
            f"Cannot write {output}: it takes {amount(needed)}, and the disk has {amount(free + there)} for it. Free "
            "some space or choose another place with -o."
        )


def _create(partial: Path, *, format: str, version: int, attributes: Mapping[str, Any], arrays: Shapes) -> None:
    """Everything but rows and fingerprint; the same arguments give the same bytes."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_file_locking(False, True)  # HDF5's own lock would collide with ours: both are flock
    access.set_alignment(1, PAGE)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # now, but nothing is written: the file is as long as it will be
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    created = h5py.h5f.create(os.fsencode(partial), h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access)
    with h5py.File(created) as file:
        file.attrs["fingerprint"] = UNFINISHED
        for name, value in attributes.items():
            file.attrs[name] = json.dumps(value) if isinstance(value, list | tuple) else value
        file.attrs["format"], file.attrs["version"] = format, version
        file.attrs["made_by"] = f"nemo-dali {__version__}"
        for name, (dtype, shape) in arrays.items():
            group = file
            if above := name.rpartition("/")[0]:
                group = file[above] if above in file else file.create_group(above, track_times=False)
            kind = h5py.h5t.py_create(np.dtype(dtype))
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, layout)
