"""Photo files against their annotations: there, readable, and of the size that the masks were drawn on."""

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL.ImageFile import ImageFile

from nemo_dali._choices import Exif
from nemo_dali.data.columns import Images, other_coco_names
from nemo_dali.data.decoding import is_decodable
from nemo_dali.data.orientation import turned_size
from nemo_dali.data.photo_file import (
    MOST_BYTES,
    TOO_LONG,
    TOO_MANY_FILES,
    is_deep,
    open_file,
    open_photo,
    orientation_of,
    too_many_pixels,
)
from nemo_dali.data.s3 import is_remote
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.io.progress import progress

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # DALI's CPU decoder and Pillow agree on these
MAX_NAMED = 50  # photos named in one message
PASSING = frozenset(  # errors of a disk, a network file system or the network, not of a photo
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EINTR", "EIO"),
        *("ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOMEM", "ENOTCONN", "EREMOTEIO", "ESTALE", "ETIMEDOUT"),
    )
)


class _Words(NamedTuple):
    """What to say about one photo with a problem and about several, and what to do about one and, in index, several."""

    one: str
    several: str
    remedy: str
    at_index: str


OR_WITHOUT = "or index with --verify --skip-corrupt and mine again."
OR_SKIP = "or leave them out with --skip-corrupt."
WORDS = {  # by Problem.kind, in the order in which index reports them
    "missing": _Words(
        one="cannot be opened",
        several="cannot be opened",
        remedy="Restore it, or say where the photos are with images=...",
        at_index="Check --images.",
    ),
    "size": _Words(
        one="has a different size than annotated",
        several="have a different size than annotated",
        remedy="Restore the photo that the annotations were made on.",
        at_index="Use the photos that the annotations were made on.",
    ),
    "large": _Words(
        one="is too large",
        several="are too large",
        remedy=f"Make it and its annotations smaller, {OR_WITHOUT}",
        at_index=f"Make them and their annotations smaller, {OR_SKIP}",
    ),
    "deep": _Words(
        one="has more than 8 bits a channel, which decoders round differently",
        several="have more than 8 bits a channel, which decoders round differently",
        remedy=f"Store it with 8, {OR_WITHOUT}",
        at_index=f"Store them with 8, {OR_SKIP}",
    ),
    "cmyk": _Words(
        one="is in CMYK without Adobe's marker, so that decoders differ on what is black",
        several="are in CMYK without Adobe's marker, so that decoders differ on what is black",
        remedy=f"Store it in RGB (Pillow: convert('RGB')), {OR_WITHOUT}",
        at_index=f"Store them in RGB (Pillow: convert('RGB')), {OR_SKIP}",
    ),
    "corrupt": _Words(
        one="is corrupt",
        several="are corrupt",
        remedy=f"Restore it, {OR_WITHOUT}",
        at_index=f"Replace them, {OR_SKIP}",
    ),
}
NEVER_SKIPPED = ("missing", "size")  # these mean that the folder is not the annotations'


class Problem(NamedTuple):
    """Why a photo cannot be used."""

    kind: str  # one of WORDS
    text: str  # which photo and, in brackets, what is the matter
    passing: bool = False  # whether another try may succeed
    fits: bool = False  # for a wrong size: whether EXIF's orientation makes the difference

    def sentence(self) -> str:
        """What is the matter, as a sentence without its full stop."""
        return f"A photo {WORDS[self.kind].one}: {self.text}"

    def remedy(self) -> str:
        """What to do, as a sentence."""
        return WORDS[self.kind].remedy


@dataclass(frozen=True, eq=False)
class CheckedPhotos:
    """What ``check_photos`` found for M photos.

    Attributes:
        corrupt: rows of the photos to leave out, for whatever reason.
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

    A verified photo decodes to the same pixels in Pillow and DALI's CPU decoder, unless it is in CMYK: then they may
    differ by a level. Those in CMYK without Adobe's marker, which DALI inverts, and those of more than 8 bits a channel
    are refused.

    Args:
        verify: decode the whole photo, with Pillow and with DALI, instead of only reading its header.
        skip_corrupt: return the rows of photos that are corrupt, too large or decoded differently by decoders, instead
            of failing.
        exif: what is done about EXIF's orientations, one of ``EXIF``.

    Raises:
        PhotoError: a photo is missing, has another size than annotated, or is turned by EXIF though none may be; or has
            a problem that ``skip_corrupt`` would skip.
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
    for kind, words in WORDS.items():
        if kind == "size" and refusal is not None:  # before wrong sizes are reported, which follow from it
            raise refusal
        rows = [row for row, problem in problems.items() if problem.kind == kind]
        if not rows or (skip_corrupt and kind not in NEVER_SKIPPED):
            continue
        where, more = "", ""
        if kind == "missing":
            where = f" in {root}"
            if is_remote(root) and any(other_coco_names(images.file_name[row]) for row in rows):
                more = (
                    " COCO's photos are found under the names of its other release in folders only, not at an address."
                )
        texts, remedy = listed([problems[row].text for row in rows]), words.at_index
        if kind == "size" and fitting:
            remedy = _size_remedy(fitting, exif)
        raise PhotoError(f"{len(rows)} of {total} photos {words.several}{where}: {texts}. {remedy}{more}")
    return CheckedPhotos(list(problems), digest, orientation)


def listed(texts: Sequence[str]) -> str:
    """Photos for a message: the first of them, and how many more there are."""
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    return f"{', '.join(texts[:MAX_NAMED])}{more}"


def refused_orientations(names: Sequence[str], orientation: Sequence[int]) -> PhotoError | None:
    """The error if some of these photos, which EXIF must not turn, are turned; None if none is.

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
    """What to do about photos of a wrong size, ``fitting`` of which have the right one with EXIF, or without it."""
    remedy = "Use the photos that the annotations were made on"
    if exif == "apply":
        return f"{remedy}; or --exif ignore, under which {fitting} have the annotated size as stored."
    return f"{remedy}; or --exif apply, under which {fitting} have the annotated size as viewers show them."


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
    """The same for a program. The photo is decoded once, by Pillow, or else only its header is read."""
    return _look("", decode, False, orientation, path, width, height).problem


def batch_error(
    paths: Sequence[str],
    width: Sequence[int],
    height: Sequence[int],
    orientation: Sequence[int],
    error: object,
) -> NemoError:
    """Why a batch of photos could not be decoded, for work that can be resumed: DALI itself does not say which photo.

    Args:
        paths, width, height, orientation: of the photos, as ``photo_problem`` takes them.
        error: DALI's.
    """
    for photo in zip(paths, width, height, orientation, strict=True):
        if problem := photo_problem(*photo):
            return PhotoError(f"{problem} The same command then continues where it stopped.")
    return NemoError(f"The DALI pipeline failed, though every local photo of the batch can be read: {error}")


class Header(NamedTuple):
    """What a photo's header says."""

    width: int  # in pixels as stored
    height: int
    orientation: int  # EXIF's, 1 to 8; 0 where the file does not say


def read_header(root: str, name: str) -> Header:
    """Size and orientation of a photo by its header.

    Raises:
        PhotoError: it is missing, neither JPEG nor PNG, or too large to be read.
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
    if (many := too_many_pixels(header.width, header.height)) is not None:
        raise PhotoError(f"The photo {name} in {root} has {many}. Replace it with a smaller one.")
    return header


def _look(root: str, decode: bool, hashed: bool, turn: int | None, name: str, width: int, height: int) -> _Looked:
    """Find what is wrong with a photo, and its orientation; with ``hashed``, also for DALI, and its file's digest.

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
    """The digest of a whole file, which is at its beginning before and after."""
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
        if file.tell() > MOST_BYTES:  # it grows
            raise OSError(errno.EFBIG, TOO_LONG)
    file.seek(0)
    return digest.digest()


def _mismatch(photo: ImageFile, name: str, width: int, height: int, orientation: int) -> Problem | None:
    """What a photo's header says against it; the photo is to be turned as this orientation says."""
    found_width, found_height = turned_size(*photo.size, orientation)
    if (found_width, found_height) != (width, height):
        other = photo.size if orientation > 1 else turned_size(*photo.size, orientation_of(photo))
        fits = other == (width, height)
        return Problem("size", f"{name} ({found_width}x{found_height} pixels, not {width}x{height})", fits=fits)
    if (why := too_many_pixels(width, height)) is not None:
        return Problem("large", f"{name} ({why})")
    if is_deep(photo):
        return Problem("deep", f"{name} (16 bits a channel)")
    if photo.mode == "CMYK" and "adobe" not in photo.info:
        return Problem("cmyk", f"{name} (4 channels)")
    if photo.mode not in MODES:
        return Problem("corrupt", f"{name} (Pillow's mode {photo.mode} is not supported)")
    return None


def _problem_of(error: Exception, name: str) -> Problem:
    """The problem that an error means.

    Raises:
        NemoError: it is not about one photo: credentials, memory, the limits of the process.
    """
    if isinstance(error, NemoError):
        raise error
    if isinstance(error, MemoryError):
        raise NemoError(f"No memory is left to decode {name}. Lower batch_size or prefetch.") from error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise NemoError(TOO_MANY_FILES) from error
    if isinstance(error, OSError) and error.errno is not None:
        return Problem("missing", f"{name} ({error.strerror or os.strerror(error.errno)})", error.errno in PASSING)
    deep = re.search(r"1[26]-bit layers", str(error)) is not None  # of a JPEG, at which Pillow stops
    return Problem("deep" if deep else "corrupt", f"{name} ({error})")
