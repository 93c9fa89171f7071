"""An LMDB of CRIS ▸ columns in memory, and its photos as files.

``folder2lmdb.py`` writes one file per split. Each of the keys ``0``, ``1``, ... has a ref, with the photo's JPEG bytes
(again for every ref), the mask as a PNG of 0 and 255, and the sentences; there are also ``__keys__`` and ``__len__``.
Values are pickled, and not trusted. Early versions, and those of ETRIS, DETRIS and CGFormer to this day, write them
with pyarrow's serialize, which may run code of the file's choice and which pyarrow has dropped: those are refused.
"""

import hashlib
import io
import os
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import Exif
from nemo_dali.data.annotations._untrusted import EmptyTexts, checked, field, photo_name
from nemo_dali.data.columns import MAX_SIDE, Annotations, PhotoRecord, RefRecord, in_columns
from nemo_dali.data.orientation import turned_size
from nemo_dali.data.photo_file import open_photo, orientation_of, too_many_pixels
from nemo_dali.data.rle import area, of_pixels
from nemo_dali.data.s3 import image_root, is_remote
from nemo_dali.errors import AnnotationError, FileFormatError, NemoError
from nemo_dali.io.lmdb import Lmdb
from nemo_dali.io.output import write_bytes
from nemo_dali.io.progress import progress
from nemo_dali.io.unpickle import unpickle_builtins

MAX_REFS = 100_000_000  # in one file; the published ones have 45,000 at most


def is_lmdb(path: Path) -> bool:
    """Whether a path looks like an LMDB: a file or folder named ``*.lmdb``, or a folder with an LMDB's data."""
    return path.suffix == ".lmdb" or (path / "data.mdb").is_file()


def read_cris_lmdb(
    path: str | Path, *, images: str | Path, skip_empty: bool = False, exif: Exif = "ignore"
) -> Annotations:
    """Read an LMDB, and extract its photos.

    Args:
        path: a file or a folder, such as ``train.lmdb``.
        images: the folder that the photos go to, made if need be. A photo is written once, under its name in the LMDB;
            where that name is taken by other content, with a part of its hash in the name. Nothing is overwritten.
        skip_empty: skip sentences without text, and refs without any, instead of refusing them.
        exif: what is done about EXIF's orientations, as in ``read_annotations``.

    Raises:
        AnnotationError: it is not such an LMDB, or is damaged, hostile, or written by pyarrow.
        NemoError: a photo cannot be written.
        ValueError: ``images`` is not a folder.
    """
    path, root = Path(path), image_root(images)
    if is_remote(root):
        raise ValueError(f"images ({images}) must be a folder, into which the photos of the LMDB are extracted")
    data = path / "data.mdb" if path.is_dir() else path
    try:
        database = Lmdb(data)
    except OSError as error:
        raise AnnotationError(f"{data} cannot be read: {error.strerror}. Check the path.") from error
    try:
        with database:
            empty = EmptyTexts(skip=skip_empty, remedy="Write the LMDB again.")
            return replace(_read(database, path, Path(root), empty, exif), exif=exif)
    except OSError as error:
        raise NemoError(
            f"The photos of {path} cannot be written to {root}: {error.strerror}. Check --images."
        ) from error


def _read(database: Lmdb, path: Path, root: Path, empty: EmptyTexts, exif: Exif) -> Annotations:
    keys = _keys(database, path)
    root.mkdir(parents=True, exist_ok=True)
    image_id_of: dict[str, int] = {}  # by the name of the extracted file
    photos: dict[int, PhotoRecord] = {}
    refs: list[RefRecord] = []
    for number, key in enumerate(progress(keys, total=len(keys), what="extracting photos", unit="ref")):
        where = f"value {number} of {path}"
        record = _value(database, key, where)
        if not (sentences := _sentences(record, where, empty)):
            continue
        content = field(record, "img", bytes, where)
        size = _size(content, where, exif)
        name = _extract(root, photo_name(record, "img_name", where), content)
        image_id = image_id_of.setdefault(name, len(image_id_of) + 1)
        photos[image_id] = PhotoRecord(*size, name)
        refs.append(
            RefRecord(
                ref_id=field(record, "seg_id", int, where),
                image_id=image_id,
                runs=_mask(field(record, "mask", bytes, where), size, where),
                sentences=sentences,
                category=field(record, "cat", int, where),
            )
        )
    empty.report(path)
    if not refs:
        raise AnnotationError(f"No ref of {path} has a sentence. Write the LMDB again.")
    twice = [ref_id for ref_id, count in Counter(ref.ref_id for ref in refs).items() if count > 1]
    if twice:
        raise AnnotationError(f"{path} has ref {twice[0]} twice. Write the LMDB again.")
    categories = sorted({ref.category for ref in refs})
    row = {category: row for row, category in enumerate(categories)}
    refs = [ref._replace(category=row[ref.category]) for ref in refs]
    return in_columns(
        f"{path.absolute().parent.name}-{path.stem}",
        refs,
        photos,
        {(ref.image_id, ref.category) for ref in refs},
        {category: f"cat {category}" for category in categories},
    )


def _keys(database: Lmdb, path: Path) -> list[bytes]:
    keys: list[bytes] = checked(_value(database, b"__keys__", f"'__keys__' of {path}"), list, f"'__keys__' of {path}")
    length = checked(_value(database, b"__len__", f"'__len__' of {path}"), int, f"'__len__' of {path}")
    if length != len(keys) or not 0 < length <= MAX_REFS:
        raise AnnotationError(f"{path} lists {len(keys)} keys, but says it has {length}. Write the LMDB again.")
    for key in keys:
        checked(key, bytes, f"a key of {path}")
    if len(set(keys)) != len(keys):
        raise AnnotationError(f"{path} lists a key twice. Write the LMDB again.")
    return keys


def _value(database: Lmdb, key: bytes, where: str) -> Any:
    value = database.get(key)
    if value is None:
        raise AnnotationError(f"{where} is missing. Check that CRIS's folder2lmdb.py wrote it, and write it again.")
    if value[:1] != b"\x80":  # pickle's protocols from 2 on; pyarrow's data begins with a count of tensors
        raise AnnotationError(
            f"{where} is not pickled: folder2lmdb.py of ETRIS, DETRIS and CGFormer, and early ones of CRIS, write "
            "pyarrow's own format, which pyarrow 15 dropped. Index REFER's files instead, or rewrite the LMDB as "
            "docs/datasets.md explains."
        )
    return unpickle_builtins(value, where)


def _sentences(record: Any, where: str, empty: EmptyTexts) -> list[tuple[int, str, str]]:
    sentences = field(record, "sents", list, where)
    for text in sentences:
        checked(text, str, f"a sentence of {where}")
    if (number := field(record, "num_sents", int, where)) != len(sentences):
        raise AnnotationError(f"{where} has {len(sentences)} sentences, but says {number}. Write the LMDB again.")
    kept = [(-1, text, text) for text in sentences if empty.has_text(text, f"a sentence of {where}")]
    if not kept:
        empty.skip_ref(where)
    return kept


def _size(content: bytes, where: str, exif: Exif) -> tuple[int, int]:
    """Width and height of a photo; its pixels are not decoded."""
    try:
        photo = open_photo(io.BytesIO(content))
        size = turned_size(*photo.size, orientation_of(photo) if exif == "apply" else 1)
    except Exception as error:  # Pillow may raise anything on damaged bytes
        raise AnnotationError(f"The photo of {where} cannot be read ({error}). Write the LMDB again.") from error
    if max(size) > MAX_SIDE:
        raise AnnotationError(f"The photo of {where} is {size[0]}x{size[1]} pixels; a side has at most {MAX_SIDE}.")
    if (many := too_many_pixels(*size)) is not None:
        raise AnnotationError(f"The photo of {where} has {many}. Write the LMDB again, with smaller photos.")
    return size


def _mask(content: bytes, size: tuple[int, int], where: str) -> npt.NDArray[np.uint32]:
    """Run lengths of what is not 0: where parts of an object overlap, CRIS's masks have 254 or less instead of 255."""
    try:
        mask = open_photo(io.BytesIO(content))
        if mask.format != "PNG":
            raise ValueError("no PNG")
        found = mask.size
        pixels = np.asarray(mask.convert("L")) > 0 if found == size else None
    except Exception as error:  # Pillow may raise anything on damaged bytes
        raise AnnotationError(f"The mask of {where} is not a PNG that can be read. Write the LMDB again.") from error
    if pixels is None:
        raise AnnotationError(
            f"The mask of {where} is {found[0]}x{found[1]} pixels, but its photo {size[0]}x{size[1]}. Write the LMDB "
            "again."
        )
    runs = of_pixels(pixels)
    if area(runs) == 0:
        raise AnnotationError(
            f"The mask of {where} has no pixel, and an LMDB cannot say why. Index the files it was made from."
        )
    return runs


def _extract(root: Path, name: str, content: bytes) -> str:
    """Write a photo unless it is there already; return the name of its file below ``root``."""
    stem, end = os.path.splitext(name)
    for candidate in (name, f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}{end}"):
        target = root / candidate
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(target):
            try:
                # What an interrupted run left of this photo is the beginning of it.
                write_bytes(target, content, is_ours=content.startswith, kind="this photo")
            except FileFormatError as error:
                raise NemoError(str(error).removesuffix("-o.") + "--images.") from error
        elif not _holds(target, content):
            continue
        return candidate
    raise NemoError(
        f"{root / name} and {candidate} next to it hold something else. Choose another folder with --images."
    )


def _holds(path: Path, content: bytes) -> bool:
    """Whether a path is a regular file, not a link to one, with this content."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        return stat.S_ISREG(status.st_mode) and status.st_size == len(content) and file.read() == content
