"""Records from strangers' files: read within bounds, every value checked before it is used.

Values are never printed: the ``repr`` of a hostile one may be endless.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_dali.data.columns import MAX_SIDE, is_inside, is_storable
from nemo_dali.errors import AnnotationError
from nemo_dali.io.files import read_regular

logger = logging.getLogger("nemo_dali")

MAX_NAME = 1000  # characters of a photo's file name; a path may have 4,095 bytes
MAX_TEXT = 10_000  # characters of an expression or another text; the longest published expression has a few hundred
# Run lengths of all masks together, 4 bytes each and twice in memory for a moment; RefCOCO has 12 million. A polygon of
# a few bytes in a photo said to be huge has as many as that photo has columns.
FREE_RUNS, RUNS_PER_BYTE = 100_000_000, 1
MAX_FILE_BYTES = 4 << 30  # the largest published annotation file has under 0.5 GB


def read_bytes(path: Path) -> bytes:
    """The content of an annotation file.

    Raises:
        AnnotationError: it cannot be read, is not a regular file, or is far too large to be an annotation file.
    """
    try:
        return read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


class RunBudget:
    """How many run lengths the masks of annotation files may still have; the files' size in bytes sets the total."""

    def __init__(self, size: int) -> None:
        self._left = FREE_RUNS + RUNS_PER_BYTE * size

    def take(self, runs: int, where: str) -> None:
        """Count the run lengths of a mask, or of one that is merged into a mask.

        Raises:
            AnnotationError: there are too many.
        """
        self._left -= runs
        if self._left < 0:
            raise AnnotationError(
                f"The masks up to {where} take far more memory than the file's size explains. Check the photos' sizes "
                "in it, or index it in parts."
            )


def field(record: Any, key: str, kind: type, where: str) -> Any:
    """Return ``record[key]``, which must be exactly of ``kind``; an int must fit 64 bits, a str must be storable."""
    if type(record) is not dict:
        raise AnnotationError(f"{where} is a {type(record).__name__}, not a record of named values. Check the file.")
    if key not in record:
        raise AnnotationError(f"{where} has no '{key}'. Check the file.")
    return checked(record[key], kind, f"'{key}' of {where}")


def checked(value: Any, kind: type, what: str) -> Any:
    """Return ``value``, which must be exactly of ``kind``; an int must fit 64 bits, a str must be storable."""
    if type(value) is not kind:
        raise AnnotationError(f"{what} is a {type(value).__name__}, not a {kind.__name__}. Check the file.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise AnnotationError(f"{what} does not fit 64 bits. Check the file.")
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise AnnotationError(f"{what} has more than {MAX_TEXT:,} characters. Check the file.")
    if isinstance(value, str) and not is_storable(value):
        raise AnnotationError(f"{what} holds a null character or half a surrogate pair. Check the file.")
    return value


def photo_size(record: Any, where: str) -> tuple[int, int]:
    """``width`` and ``height`` of a record, in pixels."""
    width, height = field(record, "width", int, where), field(record, "height", int, where)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise AnnotationError(f"{where} is {width}x{height} pixels; a side has 1 to {MAX_SIDE}. Check the file.")
    return width, height


def photo_name(record: Any, key: str, where: str) -> str:
    """A photo's file name in its normal form, which must not leave the folder of photos."""
    name: str = field(record, key, str, where)
    if len(name) > MAX_NAME:
        raise AnnotationError(f"{where} has a file name of more than {MAX_NAME} characters. Check the file.")
    if not is_inside(normal_name(name)):
        raise AnnotationError(
            f"{where} has the file name {name!r}, which leaves the folder of photos, or names no file. Check it."
        )
    return normal_name(name)


def normal_name(name: str) -> str:
    """A file name with one slash between its parts, even if Windows wrote it; unchanged if it cannot be one.

    Parts without meaning are left out, as in ``./a.jpg`` and ``a//b.jpg``.
    """
    parts = name.replace("\\", "/").split("/")
    if not parts[0] or parts[-1] in ("", "."):  # not relative; not a file
        return name
    return "/".join(part for part in parts if part not in ("", "."))


class EmptyTexts:
    """Sentences without text, and refs without a sentence: refused, or skipped and counted.

    Args:
        skip: skip them.
        remedy: what to do about them in the file, as a sentence.
    """

    def __init__(self, *, skip: bool, remedy: str) -> None:
        self._skip, self._remedy = skip, remedy
        self.sentences = self.refs = 0

    def has_text(self, text: str, where: str) -> bool:
        """Whether a sentence has text.

        Raises:
            AnnotationError: it has none, and must not be skipped.
        """
        if text.strip():
            return True
        if not self._skip:
            raise AnnotationError(f"{where} is empty. {self._remedy} Or skip all such with --skip-empty.")
        self.sentences += 1
        return False

    def skip_ref(self, where: str, *, always: bool = False) -> None:
        """Count a ref that has no sentence.

        Args:
            always: its publisher says that such refs are to be skipped.

        Raises:
            AnnotationError: it must not be skipped.
        """
        if not (self._skip or always):
            raise AnnotationError(f"{where} has no sentence. {self._remedy} Or skip all such with --skip-empty.")
        self.refs += 1

    def report(self, path: Path) -> None:
        """Say what was skipped, if anything was."""
        if self.sentences or self.refs:
            logger.warning(
                "%s: %d sentences without text and %d refs without a sentence were skipped",
                path,
                self.sentences,
                self.refs,
            )


def no_split(path: Path, split: str, found: Iterable[str], unit: str) -> AnnotationError:
    """The error for a file that lacks a split; it names those that the file has."""
    counts = [f"{repr(name[:40])[1:-1]} ({count} {unit})" for name, count in sorted(Counter(found).items())[:12]]
    return AnnotationError(f"{path} has no split '{split}'; it has {named(counts)}. Choose with --split.")


def named(names: Iterable[str]) -> str:
    """Names for an error message."""
    return ", ".join(names) or "none"
