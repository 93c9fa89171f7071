"""Photos by the names that annotations give them ▸ files below one image root.

Photos of one data set may be in several folders, and COCO's may be there under the names of another release. Each
folder is listed once: asking for each photo in each folder would take minutes on a network disk.
"""

import filecmp
import os
from collections.abc import Sequence
from typing import NamedTuple

from nemo_dali._checks import PathLike, as_list
from nemo_dali.data.columns import coco_id, is_inside, other_coco_names
from nemo_dali.data.photos import listed
from nemo_dali.data.s3 import check_names, image_root, is_remote
from nemo_dali.errors import PhotoError

MOST_SUBFOLDERS = 100  # looked into for the sake of a message


class Located(NamedTuple):
    """Where photos are."""

    root: str  # the image root: the folder or address, or what all folders are in
    file_names: list[str]  # relative to it, in the order of the names asked for
    renamed: int  # photos of COCO that were found under their names of another release


def locate(images: PathLike | Sequence[PathLike], names: Sequence[str]) -> Located:
    """Find photos.

    A photo of COCO that is not there under its own name may be there under its name in the release of 2014 or 2017. In
    several folders a name must mean one photo: COCO's names do, and files with other names are compared.

    Args:
        images: a folder, several, or the address s3://bucket/prefix, where nothing is looked for: names are taken as
            they are.
        names: relative to one of the folders, with forward slashes.

    Raises:
        ValueError: an address that is not s3://bucket/prefix, or is given with something else.
        PhotoError: a folder or a photo is not there, photos that differ have one name, or one photo has two.
    """
    folders = list(dict.fromkeys(map(image_root, as_list(images))))
    if any(map(is_remote, folders)):
        if len(folders) > 1:
            raise ValueError("images must be local folders, or else one address below which all photos lie")
        check_names(folders[0], names)
        return Located(folders[0], list(names), 0)
    for folder in folders:
        if not os.path.isdir(folder):
            raise PhotoError(f"{folder} is not a folder of photos. Say where they are with --images.")
    root = os.path.commonpath(folders)
    prefixes = {folder: folder[len(root) :].strip("/") for folder in folders}
    for folder, prefix in prefixes.items():
        if prefix and not is_inside(prefix):
            raise PhotoError(f"The name of the folder {folder} does not fit into a data set file. Rename it.")
    listings, found, missing = _Listings(), list[str](), list[str]()
    renamed = 0
    for name in names:
        if (place := _place(name, folders, listings)) is None:
            missing.append(name)
            continue
        folder, actual = place
        renamed += actual != name
        found.append(f"{prefixes[folder]}/{actual}" if prefixes[folder] else actual)
    if missing:
        raise _lacking(missing, len(names), folders)
    called: dict[str, str] = {}
    for file_name, name in zip(found, names, strict=True):
        if (other := called.setdefault(file_name, name)) != name:  # it would be a negative of itself
            raise PhotoError(
                f"{other} and {name} in the annotations are one photo, {root}/{file_name}. Use one name for it."
            )
    return Located(root, found, renamed)


class _Listings:
    """What is in folders, each read when it is first asked about."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str] | None] = {}

    def has(self, folder: str, name: str) -> bool:
        inner, _, last = name.rpartition("/")
        path = f"{folder}/{inner}"
        if path not in self._names:
            try:
                self._names[path] = frozenset(os.listdir(path))
            except PermissionError:  # its files may be accessible all the same
                self._names[path] = None
            except OSError:
                self._names[path] = frozenset()
        there = self._names[path]
        return os.path.lexists(f"{path}/{last}") if there is None else last in there


def _place(name: str, folders: Sequence[str], listings: _Listings) -> tuple[str, str] | None:
    """The folder of a photo and its name there, or None.

    Raises:
        PhotoError: it is in two folders, with different content.
    """
    for actual in (name, *other_coco_names(name)):
        there = [folder for folder in folders if listings.has(folder, actual)]
        if not there:
            continue
        for folder in there[1:] if coco_id(actual) < 0 else ():
            if not _is_same(f"{there[0]}/{actual}", f"{folder}/{actual}"):
                raise PhotoError(
                    f"The photo {name} is in {there[0]} and, with different content, in {folder}. Give only the folder "
                    "that you want with --images, or rename the photo, in the annotations too."
                )
        return there[0], actual
    # A file system may accept another spelling of a name than the one it lists.
    return next(((folder, name) for folder in folders if os.path.lexists(f"{folder}/{name}")), None)


def _is_same(path: str, other: str) -> bool:
    try:
        return filecmp.cmp(path, other, shallow=False)  # False for anything but regular files
    except OSError:
        return False


def _lacking(missing: Sequence[str], total: int, folders: Sequence[str]) -> PhotoError:
    """The error for missing photos."""
    texts = listed([f"{name} (No such file or directory)" for name in missing])
    message = f"{len(missing)} of {total} photos cannot be opened in {' or '.join(folders)}: {texts}."
    first = next((name for name in missing if other_coco_names(name)), missing[0])
    if others := other_coco_names(first):
        message += (
            f" COCO's photos were looked for under their other names too ({first} as {' or '.join(others)}); its "
            "releases split them differently: give both train2017 and val2017, or both train2014 and val2014."
        )
    for folder in folders:
        for inner in _subfolders(folder):
            for name in (first, *others):
                if os.path.lexists(f"{inner}/{name}"):
                    return PhotoError(
                        f"{message} {name} is in {inner}: give that folder with --images, once for each folder."
                    )
    return PhotoError(f"{message} Check --images, which may be repeated.")


def _subfolders(folder: str) -> list[str]:
    """Some folders within a folder."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    found.append(entry.path)
                if len(found) == MOST_SUBFOLDERS:
                    break
    except OSError:
        return []
    return sorted(found)
