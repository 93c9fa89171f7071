"""Photos with an EXIF orientation, and a custom data set with every orientation."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from nemo_dali._choices import Exif
from nemo_dali.data.annotations import read_json_lines
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from tests.helpers.files import Files
from tests.helpers.tables import write_random_table

BACK = {  # how Pillow undoes what its exif_transpose does
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def tagged(orientation: int) -> Image.Exif:
    """EXIF of this orientation."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def save_turned(path: Path, upright: Image.Image, orientation: int, **options: Any) -> None:
    """Save a photo so that viewers show it as given."""
    stored = upright.transpose(BACK[orientation]) if orientation in BACK else upright
    stored.save(path, exif=tagged(orientation), **options)


class Turned(NamedTuple):
    """A data set in JSON lines, its boxes drawn on the photos as viewers show them.

    Attributes:
        lines: the file.
        photos: a JPEG and a PNG of every orientation, whose number ends their names.
        upright: PNGs of the same names without EXIF, as viewers show the others.
        boxes: x, y, width, height in whole pixels, by name.
    """

    lines: Path
    photos: Path
    upright: Path
    boxes: dict[str, list[int]]


def write_turned(folder: Path, orientations: Iterable[int] = range(10), *, sizes: bool = False) -> Turned:
    """Write such a data set; with ``sizes``, the lines say how large the photos are, as viewers show them."""
    rng = np.random.default_rng(0)
    made = Turned(folder / "mine.jsonl", folder / "photos", folder / "upright", {})
    made.photos.mkdir(parents=True)
    made.upright.mkdir()
    lines = []
    for orientation in orientations:
        for kind in ("jpg", "png"):
            name = f"{len(lines):02}-{orientation}.{kind}"
            width, height = (int(side) for side in rng.choice(range(34, 90), 2, replace=False))
            upright = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height))
            save_turned(made.photos / name, upright, orientation)
            with Image.open(made.photos / name) as photo:  # of a JPEG, what its decoder makes of it
                ImageOps.exif_transpose(photo).save(made.upright / name, "PNG", exif=b"")
            made.boxes[name] = [3, 5, width // 2, height // 3]
            line = {"photo": name, "expressions": [f"thing {len(lines)}", "the other"], "box": made.boxes[name]}
            lines.append(line | ({"width": width, "height": height} if sizes else {}))
    made.lines.write_text("\n".join(map(json.dumps, lines)))
    return made


def index_turned(made: Turned, exif: Exif, *, upright: bool = False) -> Files:
    """Index such a data set, with a table of random similarities that depends on the number of photos only."""
    photos = made.upright if upright else made.photos
    name = f"{exif}-{photos.name}"
    files = Files(made.lines.with_name(f"{name}.ris.h5"), made.lines.with_name(f"{name}.neg.h5"), photos)
    index_dataset(read_json_lines(made.lines, images=photos, exif=exif), images=photos, output=files.dataset)
    write_random_table(files.negatives, Dataset.open(files.dataset))
    return files
