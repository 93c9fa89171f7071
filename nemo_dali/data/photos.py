"""Photo files against their annotations: there, readable, and of the size that the masks were drawn on."""

import errno
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL.ImageFile import ImageFile

from nemo_dali.data.columns import Images
from nemo_dali.data.decoding import is_decodable
from nemo_dali.data.orientation import Exif, turned_size
from nemo_dali.data.photo_file import (
    MOST_BYTES,
    MOST_PIXELS,
    TOO_LONG,
    TOO_MANY_FILES,
    open_file,
    open_photo,
    orientation_of,
)
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.io.progress import progress

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # DALI's CPU decoder and Pillow agree on these, not on 16 bits
MAX_NAMED = 50  # photos named in one message
PASSING = frozenset(  # of a disk, a network file system or the network, none of a photo
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO"),
        *("ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOMEM", "ENOTCONN", "EREMOTEIO", "ESTALE", "ETIMEDOUT"),
    )
)


class Problem(NamedTuple):
    """Why a photo cannot be used."""

    kind: str  # "missing", "size" or "corrupt"
    text: str  # which photo, and what is the matter in brackets
    passing: bool = False  # whether another try may succeed
    fits: bool = False  # of another size: whether EXIF's orientation makes the difference

    def sentence(self) -> str:
        """What is the matter, as a sentence without its full stop."""
        what = {"missing": "cannot be opened", "size": "has another size than annotated", "corrupt": "is corrupt"}
        return f"A photo {what[self.kind]}: {self.text}"

    def remedy(self) -> str:
        """What to do, as a sentence."""
        return {
            "missing": "Restore it, or say where the photos are with images=...",
            "size": "Restore the photo that the annotations were made on.",
            "corrupt": "Restore it, or index with --verify --skip-corrupt and mine anew.",
        }[self.kind]


@dataclass(frozen=True, eq=False)
class CheckedPhotos:
    """What ``check_photos`` found, of M photos.

    Attributes:
        corrupt: rows of the photos to leave out.
        digest: uint8 [M, 32], sha256 of each file's bytes; 0 where it could not be read.
        orientation: uint8 [M], by EXIF 1 to 8; 0 where the file does not say or cannot be read.
    """

    corrupt: list[int]
    digest: npt.NDArray[np.uint8]
    orientation: npt.NDArray[np.uint8]


class _Looked(NamedTuple):
    problem: Problem | None
    digest: bytes = bytes(32)
    orientation: int = 0


def check_photos(
    images: Images, root: str, *, verify: bool, skip_corrupt: bool, exif: Exif = "ignore"
) -> CheckedPhotos:
    """Look at every photo. Each file is opened once, and read as a whole.

    A verified photo decodes to the same pixels in Pillow and DALI's CPU decoder, unless it is CMYK: then they may
    differ by a level, and DALI's are inverted where Adobe's marker is missing.

    Args:
        verify: decode the whole photo, by Pillow and by DALI, instead of reading its header only.
        skip_corrupt: give the rows of corrupt photos instead of failing.
        exif: what is done about EXIF's orientations, one of ``EXIF``.

    Raises:
        PhotoError: a photo is missing, has another size than annotated, or is turned by EXIF though none may be; or it
            is corrupt, unless skipped.
    """
    total = len(images.id)
    look = partial(_look, root, verify, True, None if exif == "apply" else 1)
    digest, orientation = np.zeros((total, 32), np.uint8), np.zeros(total, np.uint8)
    problems: dict[int, Problem] = {}
    with ThreadPoolExecutor() as pool:  # reading waits for the disk, hashing and decoding release the GIL
        found = pool.map(look, images.file_name, images.width.tolist(), images.height.tolist())
        what = "decoding photos" if verify else "reading photos"
        for row, looked in enumerate(progress(found, total=total, what=what, unit="photo")):
            digest[row], orientation[row] = np.frombuffer(looked.digest, np.uint8), looked.orientation
            if looked.problem is not None:
                problems[row] = looked.problem
    refusal = refused_orientations(images.file_name, orientation.tolist()) if exif == "refuse" else None
    fitting = sum(problem.fits for problem in problems.values())
    for kind, what, remedy in (
        ("missing", f"cannot be opened in {root}", "Check --images."),
        ("size", "have another size than annotated", _size_remedy(fitting, exif)),
        ("corrupt", "are corrupt", "Replace them, or leave them out with --skip-corrupt."),
    ):
        if kind == "size" and refusal is not None:  # before sizes are told, which differ by it
            raise refusal
        texts = [problem.text for problem in problems.values() if problem.kind == kind]
        if texts and not (kind == "corrupt" and skip_corrupt):
            more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
            raise PhotoError(f"{len(texts)} of {total} photos {what}: {', '.join(texts[:MAX_NAMED])}{more}. {remedy}")
    return CheckedPhotos(list(problems), digest, orientation)


def refused_orientations(names: Sequence[str], orientation: Sequence[int]) -> PhotoError | None:
    """The error where one of these photos must not be turned by EXIF, but is; None where none is.

    Args:
        names: file names.
        orientation: EXIF's of each; 0 where a file does not say.
    """
    turned = [(name, number) for name, number in zip(names, orientation, strict=True) if number > 1]
    if not turned:
        return None
    (name, number), *_ = turned
    return PhotoError(
        f"{len(turned)} of {len(names)} photos have an EXIF orientation other than 1, by which viewers turn them; the "
        f"first is {name} ({number}). Use --exif apply if they were annotated as viewers show them, or --exif ignore "
        "if they were annotated as stored."
    )


def _size_remedy(fitting: int, exif: Exif) -> str:
    """What to do about photos of another size; so many have the right one if EXIF is gone by, or is not."""
    remedy = "Use the photos that the annotations were made on"
    if not fitting:
        return f"{remedy}."
    if exif == "apply":
        return f"{remedy}; or --exif ignore, by which {fitting} have the annotated size as they are stored."
    return f"{remedy}; or --exif apply, by which {fitting} have the annotated size as viewers show them."


def photo_problem(path: str, width: int, height: int, orientation: int = 1) -> str | None:
    """Why this photo cannot be decoded to its annotated size, and what to do; None where it can.

    Args:
        path: of its file, or its address.
        width, height: in pixels as annotated.
        orientation: how it is to be turned after decoding, as EXIF numbers it.

    Raises:
        NemoError: nothing can be read at its address.
    """
    problem = find_problem(path, width, height, orientation)
    return None if problem is None else f"{problem.sentence()}. {problem.remedy()}"


def find_problem(path: str, width: int, height: int, orientation: int = 1, *, decode: bool = True) -> Problem | None:
    """The same for a program. One decode by Pillow, or else its header is all that is looked at."""
    return _look("", decode, False, orientation, path, width, height).problem


def batch_error(
    paths: Sequence[str],
    width: Sequence[int],
    height: Sequence[int],
    orientation: Sequence[int],
    error: object,
) -> NemoError:
    """Why a batch of photos could not be decoded, for work that can go on later: DALI itself does not tell which photo.

    Args:
        paths, width, height, orientation: of the photos, as ``photo_problem`` takes them.
        error: DALI's.
    """
    for photo in zip(paths, width, height, orientation, strict=True):
        if problem := photo_problem(*photo):
            return PhotoError(f"{problem} The same command then goes on where it stopped.")
    return NemoError(f"The DALI pipeline failed, though every local photo of the batch can be read: {error}")


class Header(NamedTuple):
    """What a photo's header says."""

    width: int  # in pixels as stored
    height: int
    orientation: int  # EXIF's, 1 to 8; 0 where the file does not say


def read_header(root: str, name: str) -> Header:
    """Size and orientation of a photo by its header.

    Raises:
        PhotoError: it is missing, neither JPEG nor PNG, or larger than any photo that is read.
        NemoError: nothing can be read at its address.
    """
    try:
        with open_file(os.path.join(root, name)) as file:
            photo = open_photo(file)
            header = Header(*photo.size, orientation_of(photo))
    except NemoError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PhotoError(f"The size of {name} cannot be read in {root} ({why}). Check --images.") from error
    if (many := _too_many_pixels(header.width, header.height)) is not None:
        raise PhotoError(f"The photo {name} in {root} has {many}. Replace it by a smaller one.")
    return header


def _look(root: str, decode: bool, hashed: bool, turn: int | None, name: str, width: int, height: int) -> _Looked:
    """See what is wrong with a photo; with ``hashed``, also for DALI, and its file's digest and orientation.

    ``turn`` is how the photo as stored is turned, as EXIF numbers it; None: as its file says.
    """
    digest, orientation = bytes(32), 0
    try:
        with open_file(os.path.join(root, name)) as file:
            if hashed:
                digest = _sha256(file)
            photo = open_photo(file)
            orientation = orientation_of(photo)
            problem = _mismatch(photo, name, width, height, orientation if turn is None else turn)
            if decode and problem is None:
                photo.load()
                file.seek(0)
                if hashed and not is_decodable(file.read(), *photo.size):
                    problem = Problem("corrupt", f"{name} (DALI cannot decode it, though Pillow can)")
    except Exception as error:  # a decoder may raise anything on damaged bytes
        problem = _problem_of(error, name)
    return _Looked(problem, digest, orientation)


def _sha256(file: BinaryIO) -> bytes:
    """Of all bytes of a file, which is at its beginning before and after."""
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
        if file.tell() > MOST_BYTES:  # it grows
            raise OSError(errno.EFBIG, TOO_LONG)
    file.seek(0)
    return digest.digest()


def _mismatch(photo: ImageFile, name: str, width: int, height: int, orientation: int) -> Problem | None:
    """What a photo's header says against it, which is to be turned as this orientation says."""
    found_width, found_height = turned_size(*photo.size, orientation)
    if (found_width, found_height) != (width, height):
        other = photo.size if orientation > 1 else turned_size(*photo.size, orientation_of(photo))
        fits = other == (width, height)
        return Problem("size", f"{name} ({found_width}x{found_height} pixels, not {width}x{height})", fits=fits)
    if (why := _too_many_pixels(width, height)) is not None:
        return Problem("corrupt", f"{name} ({why})")
    if photo.mode not in MODES:
        return Problem("corrupt", f"{name} (16 bits a channel)")
    return None


def _too_many_pixels(width: int, height: int) -> str | None:
    if width * height <= MOST_PIXELS:
        return None
    return f"{width}x{height} pixels, more than the {MOST_PIXELS:,} that are read"


def _problem_of(error: Exception, name: str) -> Problem:
    """The problem that an error means.

    Raises:
        NemoError: it is of no photo alone: credentials, memory, the limits of the process.
    """
    if isinstance(error, NemoError):
        raise error
    if isinstance(error, MemoryError):
        raise NemoError(f"There is no memory left to decode {name}. Lower batch_size or prefetch.") from error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise NemoError(TOO_MANY_FILES) from error
    if isinstance(error, OSError) and error.errno is not None:
        return Problem("missing", f"{name} ({error.strerror or os.strerror(error.errno)})", error.errno in PASSING)
    return Problem("corrupt", f"{name} ({error})")
