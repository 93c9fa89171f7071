"""Annotations and photos in, a data set file out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nemo_dali._checks import PathLike
from nemo_dali._choices import Exif
from nemo_dali.data.columns import (
    Annotations,
    PhotoFiles,
    coco_id,
    have_twins,
    shared_photos,
    twins,
    with_photos,
)
from nemo_dali.data.dataset import FORMAT, VERSION, Dataset, write_columns
from nemo_dali.data.photo_folders import locate
from nemo_dali.data.photos import check_photos
from nemo_dali.io.writer import write_h5


@dataclass(frozen=True)
class IndexReport:
    """What ``index_dataset`` wrote."""

    output: Path
    fingerprint: str
    photos: int
    refs: int
    sentences: int
    left_out: tuple[str, ...]  # file names of photos that cannot be used
    left_out_refs: int  # of these photos and of those in ``shared``
    renamed: int  # photos of COCO that were found under their names of another release
    shared: tuple[tuple[str, int], ...]  # data sets whose photos were left out, and how many photos
    copies: int  # photos whose file has the content of another's
    copy: tuple[str, ...]  # the file names of the first two such photos
    exif: Exif  # what was done about photos that viewers turn,
    turned: int  # and how many these are

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.photos} photos, {self.refs} refs, {self.sentences} sentences"]
        if self.renamed:
            lines.append(
                f"{self.renamed} photos were found under the names of COCO's other release: they are the same photos"
            )
        if self.turned or self.exif == "apply":
            done = "taken as viewers show them" if self.exif == "apply" else "taken as stored"
            lines.append(f"EXIF orientation other than 1: {self.turned} photos, {done} (--exif {self.exif})")
        for name, count in self.shared:
            lines.append(f"left out: {count} photos of {name}" + ("" if count else ": the data sets share none"))
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)} photos that cannot be used: {' '.join(self.left_out)}")
        if self.left_out_refs:
            lines.append(f"left out with them: {self.left_out_refs} refs")
        if self.copies:
            lines.append(
                f"{self.copies} photos have the same content as another, such as {' and '.join(self.copy)}: mining "
                "makes none of them a negative of another"
            )
        return "\n".join(lines)


def index_dataset(
    annotations: Annotations,
    *,
    images: PathLike | Sequence[PathLike],
    output: str | Path,
    verify: bool = False,
    skip_corrupt: bool = False,
    photos_of: Sequence[str | Path] = (),
) -> IndexReport:
    """Check every photo against its annotation and write the data set file.

    Args:
        images: the folder, or the address s3://bucket/prefix, that the file names of the photos are relative to; or
            several folders: the image root is then the one that holds them all. See ``photo_folders.locate``.
        output: the .ris.h5 file; one that exists is replaced only when the new one is complete.
        verify: decode every photo instead of only reading its header.
        skip_corrupt: leave out photos that are corrupt, too large, or decoded differently by different decoders, with
            their refs, instead of failing.
        photos_of: other data set files, whose photos are left out with their refs; see ``columns.shared_photos``.

    Raises:
        PhotoError: a photo is missing, cannot be used, has a different size than annotated, or is turned by EXIF
            although ``annotations.exif`` is "refuse".
        FileFormatError: the output cannot be written.
    """
    root, names, renamed = locate(images, annotations.images.file_name)
    annotations = replace(annotations, images=replace(annotations.images, file_name=names))
    output = Path(output)
    others = [Dataset.open(path) for path in photos_of]
    with write_h5(output, format=FORMAT, version=VERSION) as write:
        checked = check_photos(
            annotations.images, root, verify=verify, skip_corrupt=skip_corrupt, exif=annotations.exif
        )
        ids = np.array([coco_id(name) for name in annotations.images.file_name], np.int64)
        files = PhotoFiles(checked.digest, checked.orientation, ids)
        keep = np.ones(len(ids), bool)
        keep[checked.corrupt] = False
        shared = []
        for other in others:
            found = shared_photos(files, other.photo_files)
            shared.append((other.name, int(found.sum())))
            keep &= ~found
        kept = with_photos(annotations, keep)
        files = PhotoFiles(files.digest[keep], files.orientation[keep], files.coco_id[keep])
        digest = write_columns(write, kept, files, image_root=root, left_out=len(checked.corrupt))
    content = twins(files)
    copies = np.flatnonzero(have_twins(content))
    return IndexReport(
        output=output,
        fingerprint=digest,
        photos=len(kept.images.id),
        refs=len(kept.refs.ref_id),
        sentences=len(kept.sentences.sent_id),
        left_out=tuple(annotations.images.file_name[row] for row in checked.corrupt),
        left_out_refs=len(annotations.refs.ref_id) - len(kept.refs.ref_id),
        renamed=renamed,
        shared=tuple(shared),
        copies=len(copies),
        copy=tuple(kept.images.file_name[row] for row in np.flatnonzero(np.isin(content, content[copies[:1]]))[:2]),
        exif=annotations.exif,
        turned=int((files.orientation > 1).sum()),
    )
