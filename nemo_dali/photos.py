"""Photo files against their annotations: there, readable, and of the size that the masks were drawn on."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from nemo_dali.annotations import Images
from nemo_dali.errors import NemoError, PhotoError
from nemo_dali.progress import progress

FORMATS = ("JPEG", "PNG")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # DALI's CPU decoder and Pillow agree on these, not on 16 bits
MAX_NAMED = 50  # photos named in one message


class _Problem(NamedTuple):
    kind: str  # "missing", "size" or "corrupt"
    text: str


def check_photos(images: Images, root: Path, *, verify: bool, skip_corrupt: bool) -> list[int]:
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
    """Why the photo at this local path cannot be decoded to its annotated size, and what to do; None where it can."""
    problem = None if "://" in path else _problem(Path(), True, path, width, height)
    if problem is None:
        return None
    what, remedy = {
        "missing": ("cannot be opened", "Restore it, or say where the photos are with images=..."),
        "size": ("has another size than annotated", "Restore the photo that the annotations were made on."),
        "corrupt": ("is corrupt", "Restore it, or index with --verify --skip-corrupt and mine anew."),
    }[problem.kind]
    return f"A photo {what}: {problem.text}. {remedy}"


def _problem(root: Path, verify: bool, name: str, width: int, height: int) -> _Problem | None:
    try:
        with Image.open(root / name, formats=FORMATS) as photo:
            if photo.size != (width, height):
                found_width, found_height = photo.size
                return _Problem("size", f"{name} ({found_width}x{found_height} pixels, not {width}x{height})")
            if photo.mode not in MODES:
                return _Problem("corrupt", f"{name} (16 bits a channel)")
            if verify:
                photo.load()
    except UnidentifiedImageError:
        return _Problem("corrupt", f"{name} (neither JPEG nor PNG)")
    except Exception as error:  # a decoder may raise anything on damaged bytes
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise NemoError("Too many files are open at once. Raise the limit (ulimit -n).") from error
        if isinstance(error, OSError) and error.errno is not None:
            return _Problem("missing", f"{name} ({os.strerror(error.errno)})")
        return _Problem("corrupt", f"{name} ({error})")
    return None
