"""Photo files against their annotations: there, readable, and of the size that the masks were drawn on."""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from nemo_dali.data.columns import Images
from nemo_dali.data.s3 import photo_file
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.io.progress import progress

FORMATS = ("JPEG", "PNG")
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


def check_photos(images: Images, root: str, *, verify: bool, skip_corrupt: bool) -> list[int]:
    """Look at every photo; return the rows of those that are corrupt, if these are to be skipped.

    Whatever Pillow decodes here, DALI's CPU decoder decodes to the same pixels; Pillow refuses a little more.

    Args:
        verify: decode the whole photo instead of reading its header only.

    Raises:
        PhotoError: a photo is missing or has another size than annotated; or is corrupt, unless skipped.
    """
    total = len(images.id)
    check = partial(_problem, root, verify)
    with ThreadPoolExecutor() as pool:  # reading waits for the disk, decoding releases the GIL
        found = pool.map(check, images.file_name, images.width.tolist(), images.height.tolist())
        what = "decoding photos" if verify else "reading photo headers"
        checked = enumerate(progress(found, total=total, what=what, unit="photo"))
        problems = {row: problem for row, problem in checked if problem is not None}
    for kind, what, remedy in (
        ("missing", f"cannot be opened in {root}", "Check --images."),
        ("size", "have another size than annotated", "Use the photos that the annotations were made on."),
        ("corrupt", "are corrupt", "Replace them, or leave them out with --skip-corrupt."),
    ):
        texts = [problem.text for problem in problems.values() if problem.kind == kind]
        if texts and not (kind == "corrupt" and skip_corrupt):
            more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
            raise PhotoError(f"{len(texts)} of {total} photos {what}: {', '.join(texts[:MAX_NAMED])}{more}. {remedy}")
    return list(problems)


def photo_problem(path: str, width: int, height: int) -> str | None:
    """Why this photo cannot be decoded to its annotated size, and what to do; None where it can.

    Raises:
        NemoError: nothing can be read at its address.
    """
    problem = find_problem(path, width, height)
    return None if problem is None else f"{problem.sentence()}. {problem.remedy()}"


def find_problem(path: str, width: int, height: int) -> Problem | None:
    """The same for a program. One decode by Pillow."""
    return _problem("", True, path, width, height)


def batch_error(paths: Sequence[str], width: Sequence[int], height: Sequence[int], error: object) -> NemoError:
    """Why a batch of photos could not be decoded, for work that can go on later: DALI itself does not tell which photo.

    Args:
        paths, width, height: of the photos, in pixels as annotated.
        error: DALI's.
    """
    for path, *size in zip(paths, width, height, strict=True):
        if problem := photo_problem(path, *size):
            return PhotoError(f"{problem} The same command then goes on where it stopped.")
    return NemoError(f"The DALI pipeline failed, though every local photo of the batch can be read: {error}")


def header_size(root: str, name: str) -> tuple[int, int]:
    """Width and height of a photo by its header.

    Raises:
        PhotoError: it is missing, or neither JPEG nor PNG.
        NemoError: nothing can be read at its address.
    """
    try:
        with Image.open(photo_file(os.path.join(root, name)), formats=FORMATS) as photo:
            return photo.size
    except NemoError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        why = error.strerror if isinstance(error, OSError) and error.strerror else "neither JPEG nor PNG"
        raise PhotoError(f"The size of {name} cannot be read in {root} ({why}). Check --images.") from error


def _problem(root: str, verify: bool, name: str, width: int, height: int) -> Problem | None:
    try:
        with Image.open(photo_file(os.path.join(root, name)), formats=FORMATS) as photo:
            if photo.size != (width, height):
                found_width, found_height = photo.size
                return Problem("size", f"{name} ({found_width}x{found_height} pixels, not {width}x{height})")
            if photo.mode not in MODES:
                return Problem("corrupt", f"{name} (16 bits a channel)")
            if verify:
                photo.load()
    except UnidentifiedImageError:
        return Problem("corrupt", f"{name} (neither JPEG nor PNG)")
    except NemoError:  # of no photo alone: credentials, say
        raise
    except MemoryError as error:
        raise NemoError(f"There is no memory left to decode {name}. Lower batch_size or prefetch.") from error
    except Exception as error:  # a decoder may raise anything on damaged bytes
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise NemoError("Too many files are open at once. Raise the limit (ulimit -n).") from error
        if isinstance(error, OSError) and error.errno is not None:
            return Problem("missing", f"{name} ({error.strerror or os.strerror(error.errno)})", error.errno in PASSING)
        return Problem("corrupt", f"{name} ({error})")
    return None
