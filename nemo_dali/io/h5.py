"""HDF5 files of ours: written whole or not at all, opened only when they are what they claim to be."""

import errno
import fcntl
import hashlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from nemo_dali._version import __version__
from nemo_dali.errors import FileFormatError

DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)


@contextmanager
def write_h5(path: str | Path, *, format: str, version: int) -> Iterator[h5py.File]:
    """Open an HDF5 file to be filled; it appears under its name only when the block ends without an exception.

    The block fills the file and must set ``file.attrs["fingerprint"]``. A killed run leaves ``<name>.partial``,
    which the next run writes anew.

    Raises:
        FileFormatError: something else than such a file has that name, the folder is missing or not writable, the disk
            is full, or another run is writing the file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    check_target(path, format)
    try:
        lock = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FileFormatError(f"Cannot write {path}: {error.strerror}. Choose another place with -o.") from error
    if not locked(lock, partial):
        os.close(lock)
        raise FileFormatError(f"Cannot write {path}: another run is writing it. Wait for it or end it.")
    try:
        file = _create_h5(partial)
        try:
            yield file
            file.attrs["format"] = format
            file.attrs["version"] = version
            file.attrs["made_by"] = f"nemo-dali {__version__}"
        finally:
            file.close()
        os.fsync(lock)
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name itself survives a power cut
        os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink()
        # HDF5 gives the number in the text only. Other errors are the block's own, of a photo say, and go on.
        number = next(
            (n for n in DISK_ERRORS if n == getattr(error, "errno", 0) or f"errno = {n}," in str(error)), None
        )
        if number is None:
            raise
        raise FileFormatError(
            f"Cannot write {path}: {os.strerror(number)}. Nothing was changed; free some space or choose another "
            "place with -o."
        ) from error
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(lock)


def check_target(path: Path, format: str) -> None:
    """Only a file of the same format may be replaced: whatever else has that name was given by mistake."""
    found = None
    try:
        if path.is_dir():
            raise FileFormatError(f"Cannot write {path}: it is a folder. Choose another place with -o.")
        if not path.exists():
            return
        found = read_attributes(path, remedy="Choose another place with -o.").get("format")
    except OSError as error:
        raise FileFormatError(f"Cannot write {path}: {error.strerror}. Choose another place with -o.") from error
    if found != format:
        raise FileFormatError(
            f"Cannot write {path}: it exists and is no file of format '{format}'. Choose another place with -o."
        )


def locked(lock: int, partial: Path) -> bool:
    """Take the lock on the open partial file; False if another run has it, or has just renamed or removed that file."""
    with suppress(OSError):  # other than being held: a file system without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    try:
        return os.path.samestat(os.fstat(lock), partial.stat())
    except FileNotFoundError:
        return False


def _create_h5(path: Path) -> h5py.File:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_file_locking(False, True)  # HDF5's own lock would collide with ours: both are flock
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    # Unbuffered: a failed write is raised where it happens. Buffered, it fails in a destructor, which only prints it.
    access.set_sieve_buf_size(0)
    creation = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    creation.set_obj_track_times(False)  # the same content gives the same bytes
    return h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, fcpl=creation, fapl=access))


def _open(path: Path, remedy: str) -> h5py.File:
    """Open any HDF5 file read-only, without HDF5's own lock: network mounts may have none, and ours never change."""
    try:
        try:
            return h5py.File(path, "r", locking=False)
        except OSError as error:
            if "file locking flag" not in str(error):
                raise
            return h5py.File(path, "r")  # this process has it open already, with the lock: HDF5 wants them alike
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist. {remedy}") from error
    except OSError as error:
        what = "is a folder" if path.is_dir() else "is not an HDF5 file or has been cut short"
        if isinstance(error, PermissionError):
            what = "may not be read by this user"
        raise FileFormatError(f"{path} {what}. {remedy}") from error


def read_attributes(path: str | Path, *, remedy: str) -> dict[str, Any]:
    """The attributes of an HDF5 file, whatever its format; {} where they cannot be read.

    Raises:
        FileFormatError: missing, cut short or not HDF5.
    """
    with _open(Path(path), remedy) as file:
        try:
            return dict(file.attrs)
        except (OSError, RuntimeError, KeyError):
            return {}


def open_h5(path: str | Path, *, format: str, version: int, remedy: str) -> h5py.File:
    """Open one of our files read-only after checking what it is.

    Args:
        remedy: how to make such a file, put at the end of every message.

    Raises:
        FileFormatError: missing, cut short, not HDF5, another format, another version, or external links inside.
    """
    path = Path(path)
    file = _open(path, remedy)
    try:
        found = str(file.attrs.get("format", "unknown"))
        if found != format:
            if found.startswith("nemo-dali/"):  # the remedy would tell to write over it
                remedy = f"Give a '{format}' file in its place."
            raise FileFormatError(f"{path} is of format '{found}', not '{format}'. {remedy}")
        if (number := str(file.attrs.get("version", "unknown"))) != str(version):
            raise FileFormatError(f"{path} is version {number}; this nemo-dali reads version {version}. {remedy}")
        if "fingerprint" not in file.attrs:
            raise FileFormatError(f"{path} carries no fingerprint. {remedy}")
        if _leads_elsewhere(file, depth=2):
            raise FileFormatError(f"{path} links to other files, which is refused. {remedy}")
    except (OSError, RuntimeError, KeyError) as error:
        file.close()
        raise FileFormatError(f"{path} is damaged ({error}). {remedy}") from error
    except BaseException:
        file.close()
        raise
    return file


def _leads_elsewhere(group: h5py.Group, depth: int) -> bool:
    """Whether a member down to this depth (that of our files) is a link or keeps its data in another file."""
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            return True
        member = group[name]
        if isinstance(member, h5py.Group):
            if depth > 1 and _leads_elsewhere(member, depth - 1):
                return True
        elif isinstance(member, h5py.Dataset) and (member.is_virtual or member.external):
            return True
    return False


def write_array(group: h5py.Group, name: str, array: npt.ArrayLike) -> None:
    """Write one numeric dataset, contiguous and unfiltered, so that ``map_array`` can map it."""
    _parent(group, name).create_dataset(name.rpartition("/")[2], data=np.asarray(array))


def write_strings(group: h5py.Group, name: str, strings: Iterable[str]) -> None:
    """Write UTF-8 strings of any length as one dataset."""
    kind = h5py.string_dtype("utf-8")
    _parent(group, name).create_dataset(name.rpartition("/")[2], data=list(strings), dtype=kind)


def _parent(group: h5py.Group, name: str) -> h5py.Group:
    """The group that a dataset of this name lies in, made without the times that HDF5 would put into it by itself."""
    above = name.rpartition("/")[0]
    if not above:
        return group
    return group[above] if above in group else group.create_group(above, track_times=False)


def read_strings(dataset: h5py.Dataset) -> list[str]:
    """Read what ``write_strings`` wrote.

    Raises:
        FileFormatError: not a column of strings, more of them than the file has room for, or not UTF-8.
    """
    path = dataset.file.filename
    string = h5py.check_string_dtype(dataset.dtype)
    if string is None or string.length is not None or dataset.ndim != 1:
        raise FileFormatError(f"{path}: {dataset.name} is not a column of strings. Write the file with nemo-dali.")
    if dataset.size * 16 > dataset.file.id.get_filesize():  # HDF5 takes 16 bytes to say where a string is
        raise FileFormatError(f"{path} is too short for the strings of {dataset.name}. Make it again.")
    try:
        return [s.decode("utf-8") for s in dataset[:]]
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: {dataset.name} is not UTF-8. Make it again.") from error


class MappedFile:
    """A file whose arrays are mapped, held open: replaced or removed under its name it lives on here as it was.

    Cut short, it does not: whoever touches what lay behind the new end is ended by SIGBUS. Nothing catches that, so
    ``check`` before work that reads the arrays: it leaves the moment between the two.

    Args:
        file: while it is open.
        path: for messages.
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self.path = path
        self._descriptor = os.dup(file.id.get_vfd_handle())
        self._length = os.fstat(self._descriptor).st_size
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    @property
    def still(self) -> str:
        """A path that leads to this file, whatever has its name by now, as long as this object lives."""
        return f"/proc/self/fd/{self._descriptor}"

    def check(self) -> None:
        """Look whether the file is as long as it was; a microsecond.

        Raises:
            FileFormatError: it is not, or it is gone from a network file system.
        """
        try:
            length = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise FileFormatError(
                f"{self.path} went away while it was in use ({error.strerror}). Give each version a name of its own on "
                "a network file system, and start again."
            ) from error
        if length < self._length:
            raise FileFormatError(
                f"{self.path} was cut short while it was in use, from {self._length} to {length} bytes. Make it again "
                "or copy it anew, under another name that is then renamed, and start again."
            )


def map_array(dataset: h5py.Dataset) -> npt.NDArray[Any]:
    """Map a contiguous dataset read-only; ranks on a node share its pages. It outlives the h5py file.

    Raises:
        FileFormatError: the dataset is chunked or filtered, or the file is shorter than the dataset, or was replaced.
    """
    path = dataset.file.filename
    if dataset.size == 0:
        return np.empty(dataset.shape, dataset.dtype)
    offset = dataset.id.get_offset()
    if offset is None or dataset.external:
        raise FileFormatError(f"{path}: {dataset.name} is not contiguous. Write the file with nemo-dali.")
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        if not os.path.samestat(status, os.fstat(dataset.file.id.get_vfd_handle())):
            raise FileFormatError(f"{path} was replaced while it was opened. Start again.")
        if offset + dataset.nbytes > status.st_size:
            raise FileFormatError(f"{path} has been cut short. Make it again.")
        return np.memmap(file, dataset.dtype, "r", offset, dataset.shape)


def fingerprint(parts: Mapping[str, npt.NDArray[Any] | list[str] | str | int]) -> str:
    """sha256 over named arrays, string lists and scalars, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        digest.update(name.encode() + b"\0")
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        elif isinstance(part, list):
            for text in part:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        else:
            digest.update(str(part).encode())
        digest.update(b"\1")
    return digest.hexdigest()
