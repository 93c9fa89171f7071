"""EXIF's orientation: what index does about it, and photos turned as Pillow's exif_transpose turns them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from nemo_dali.commands.cli import main
from nemo_dali.commands.inspection import inspect_file
from nemo_dali.data import read_annotations
from nemo_dali.data.annotations import read_json_lines
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.decoding import DECODING
from nemo_dali.data.indexing import index_dataset
from nemo_dali.data.orientation import TURNS, turned_pixels, turned_size, turned_sizes
from nemo_dali.errors import FileFormatError, PhotoError
from nemo_dali.pipeline import operators
from tests.helpers.forged import forge
from tests.helpers.refer import write_refer
from tests.helpers.turned import index_turned, save_turned, tagged, write_turned

NUMBERS = range(10)  # there are no orientations 0 and 9, but files that say so


def test_pixels_are_turned_as_pillow_turns_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    sizes = np.array([[7, 5]] * 9, np.int32)
    swapped = turned_sizes(sizes, np.arange(9, dtype=np.uint8))
    for orientation in range(9):
        photo = Image.fromarray(pixels)
        photo.getexif()[0x112] = orientation
        upright = np.asarray(ImageOps.exif_transpose(photo))
        found = turned_pixels(pixels, orientation)
        assert np.array_equal(found, upright) and found.flags.c_contiguous
        assert turned_size(7, 5, orientation) == upright.shape[1::-1] == tuple(swapped[orientation])
        assert turned_size(*upright.shape[1::-1], orientation) == (7, 5)
    assert turned_pixels(pixels, 1) is pixels


def decode(photos: list[bytes], orientation: list[int]) -> list[np.ndarray]:
    """Photos as the package's graphs decode and turn them."""
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(batch_size=len(photos), num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        turns = fn.external_source(name="turns", ndim=1, dtype=types.INT32)
        pipe.set_outputs(operators.turned(fn.decoders.image(encoded, **DECODING), turns))
    pipe.build()
    pipe.feed_input("encoded", [np.frombuffer(photo, np.uint8) for photo in photos])
    pipe.feed_input("turns", TURNS[orientation])
    (decoded,) = pipe.run()
    return [np.array(decoded.at(i)) for i in range(len(photos))]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *((mode, {"format": "PNG"}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, {"format": "JPEG"}) for mode in ("L", "RGB", "CMYK")),
        ("RGB", {"format": "JPEG", "progressive": True, "subsampling": 0}),
    ],
)
@pytest.mark.parametrize("size", [(83, 61), (64, 48), (1, 5)])  # the first fill no whole blocks of a JPEG
@pytest.mark.parametrize("way", ["transpose", "transpose_on_gpu"])  # DALI's operators are the same ones on the CPU
def test_dalis_photos_are_turned_to_pillows_pixels(
    mode: str, options: dict[str, Any], size: tuple[int, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "transpose", getattr(operators, way))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)).resize(size)
    noise = noise.convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)
    photos, expected = [], []
    for orientation in range(9):
        buffer = io.BytesIO()
        noise.save(buffer, exif=tagged(orientation), **options)
        photos.append(buffer.getvalue())
        expected.append(np.asarray(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")))
    for batch in ([*range(9)], [0, 1], [2, 4], [6, 5], [3], [7, 1]):
        found = decode([photos[i] for i in batch], batch)
        for i, pixels in zip(batch, found, strict=True):
            np.testing.assert_array_equal(pixels, expected[i])


# --- index -----------------------------------------------------------------------------------------------------------


def index(source: Path, photos: Path, output: Path, *options: str) -> int:
    return main(["index", str(source), "--images", str(photos), "-o", str(output), *options])


REFUSED = (
    r"nemo-dali: 14 of 20 photos have an EXIF orientation other than 1, by which viewers turn them; the first is "
    r"04-2.jpg (2). Use --exif apply if they were annotated as viewers show them, or --exif ignore if they were "
    "annotated as stored.\n"
)


@pytest.mark.parametrize("options", [[], ["--exif", "refuse"], ["--verify"]])
@pytest.mark.parametrize("sizes", [False, True])
def test_photos_that_viewers_turn_are_refused(tmp_path: Path, capsys: Any, sizes: bool, options: list[str]) -> None:
    made = write_turned(tmp_path, sizes=sizes)
    assert index(made.lines, made.photos, tmp_path / "a.ris.h5", *options) == 1
    assert capsys.readouterr().err == REFUSED
    assert not (tmp_path / "a.ris.h5").exists()
    assert index(made.lines, made.upright, tmp_path / "a.ris.h5", *options) == 0
    assert "EXIF" not in capsys.readouterr().out
    assert Dataset.open(tmp_path / "a.ris.h5").exif == "refuse"


def test_a_mask_that_fits_the_turned_photo_only_does_not_hide_the_reason(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "photos").mkdir()
    save_turned(tmp_path / "photos" / "a.jpg", Image.new("RGB", (30, 40)), 6)
    Image.new("RGB", (30, 40)).save(tmp_path / "photos" / "b.jpg")
    mask = {"size": [40, 30], "counts": [10, 20, 1170]}
    lines = [{"photo": name, "expressions": ["x"], "mask": mask} for name in ("a.jpg", "b.jpg")]
    lines[1] |= {"width": 30, "height": 40}
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    paths = (tmp_path / "mine.jsonl", tmp_path / "photos", tmp_path / "a.ris.h5")
    assert index(*paths) == 1
    assert "1 of 2 photos have an EXIF orientation other than 1" in capsys.readouterr().err
    assert index(*paths, "--exif", "apply") == 0
    assert Dataset.open(tmp_path / "a.ris.h5").images.width.tolist() == [30, 30]


@pytest.mark.parametrize("sizes", [False, True])
def test_applied_orientations_are_those_of_sizes_and_masks(tmp_path: Path, capsys: Any, sizes: bool) -> None:
    made = write_turned(tmp_path, sizes=sizes)
    path = tmp_path / "a.ris.h5"
    assert index(made.lines, made.photos, path, "--exif", "apply", "--verify") == 0
    said = "EXIF orientation other than 1: 14 photos, taken as viewers show them (--exif apply)"
    assert said in capsys.readouterr().out.splitlines()
    found = Dataset.open(path)
    assert found.exif == "apply" and found.content_fingerprint() == found.fingerprint
    assert found.turn.tolist() == [max(n, 1) if n < 9 else 1 for n in NUMBERS for _ in range(2)]
    for ref, row in enumerate(found.refs.image):
        name = found.images.file_name[row]
        with Image.open(made.upright / name) as upright:
            assert upright.size == (found.images.width[row], found.images.height[row])
        x, y, width, height = made.boxes[name]
        expected = np.zeros(upright.size[::-1], np.uint8)
        expected[y : y + height, x : x + width] = 1
        np.testing.assert_array_equal(found.mask(ref), expected)
    said = inspect_file(path, pools=[])
    assert (said["exif"], said["rotated"]) == ("apply", 14)


def test_ignored_orientations_are_counted_and_photos_are_as_stored(tmp_path: Path, capsys: Any) -> None:
    made = write_turned(tmp_path)
    path = tmp_path / "a.ris.h5"
    assert index(made.lines, made.photos, path, "--exif", "ignore") == 0
    said = "EXIF orientation other than 1: 14 photos, taken as stored (--exif ignore)"
    assert said in capsys.readouterr().out.splitlines()
    found = Dataset.open(path)
    assert found.exif == "ignore" and set(found.turn.tolist()) == {1}
    for row, name in enumerate(found.images.file_name):
        with Image.open(made.photos / name) as stored:
            assert stored.size == (found.images.width[row], found.images.height[row])
    assert index(made.lines, made.photos, tmp_path / "b.ris.h5", "--exif", "apply") == 0
    assert Dataset.open(tmp_path / "b.ris.h5").fingerprint != found.fingerprint
    assert index(made.lines, made.upright, tmp_path / "c.ris.h5", "--exif", "apply") == 0
    assert "EXIF orientation other than 1: 0 photos, taken as viewers" in capsys.readouterr().out


@pytest.mark.parametrize(("exif", "other"), [("ignore", "apply"), ("apply", "ignore")])
def test_sizes_that_the_other_choice_explains_are_told_with_it(tmp_path: Path, exif: Any, other: str) -> None:
    made = write_turned(tmp_path, [1, 6, 8, 3], sizes=True)
    if exif == "apply":  # what the lines say is of the photos as stored
        lines = [json.loads(line) for line in made.lines.read_text().splitlines()]
        for line in lines:
            with Image.open(made.photos / line["photo"]) as stored:
                line["width"], line["height"] = stored.size
        made.lines.write_text("\n".join(map(json.dumps, lines)))
    annotations = read_json_lines(made.lines, images=made.photos, exif=exif)
    output = tmp_path / "a.ris.h5"
    with pytest.raises(
        PhotoError, match=rf"^4 of 8 photos have a different size.*; or --exif {other}, under which 4 have the"
    ):
        index_dataset(annotations, images=made.photos, output=output)
    Image.new("RGB", (9, 9)).save(made.photos / "02-6.jpg")
    with pytest.raises(
        PhotoError, match=rf"^4 of 8 photos have a different size.*--exif {other}, under which 3 have the"
    ):
        index_dataset(annotations, images=made.photos, output=output)


def test_refers_layouts_ignore_orientations_unless_asked(tmp_path: Path, capsys: Any) -> None:
    files = write_refer(tmp_path)
    options = ["--dataset", "refcoco", "--split-by", "unc", "--split", "train"]
    path, turned_photo = tmp_path / "a.ris.h5", sorted(files.photos.iterdir())[2]
    with Image.open(turned_photo) as photo:
        size = photo.size
        photo.save(turned_photo, exif=tagged(6), quality=95)
    assert index(files.root, files.photos, path, *options) == 0
    assert "EXIF orientation other than 1: 1 photos, taken as stored (--exif ignore)" in capsys.readouterr().out
    found = Dataset.open(path)
    row = found.images.file_name.index(turned_photo.name)
    assert found.exif == "ignore" and (found.images.width[row], found.images.height[row]) == size
    for exif, words in (
        ("refuse", f"the first is {turned_photo.name} (6). Use --exif"),
        ("apply", "or --exif ignore, under which 1 have the annotated size as stored"),
    ):
        assert index(files.root, files.photos, path, *options, "--exif", exif) == 1
        assert words in capsys.readouterr().err


def test_a_missing_photo_is_told_before_orientations(tmp_path: Path) -> None:
    made = write_turned(tmp_path, [1, 6], sizes=True)
    (made.photos / "00-1.jpg").unlink()
    annotations = read_annotations(made.lines, images=made.photos)
    with pytest.raises(PhotoError, match=r"^1 of 4 photos cannot be opened"):
        index_dataset(annotations, images=made.photos, output=tmp_path / "a.ris.h5")


def test_choices_are_checked(tmp_path: Path, capsys: Any) -> None:
    made = write_turned(tmp_path, [1])
    with pytest.raises(ValueError, match=r"^exif \('turn'\) must be one of \('ignore', 'apply', 'refuse'\)$"):
        read_annotations(made.lines, images=made.photos, exif="turn")  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="2"):
        index(made.lines, made.photos, tmp_path / "a.ris.h5", "--exif", "turn")
    assert "'--exif': 'turn' is not one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("exif", "words"),
    [
        ("refuse", "/images/orientation has values that the attribute exif excludes"),
        ("turn", "exif is not a known value"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, exif: str, words: str) -> None:
    path = index_turned(write_turned(tmp_path, [1, 6]), "ignore").dataset
    forge(path, lambda parts: parts.attributes.update(exif=exif))
    with pytest.raises(FileFormatError, match=words):
        Dataset.open(path)


def test_a_choice_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = index_turned(write_turned(tmp_path, [1, 6]), "ignore").dataset
    forge(path, lambda parts: parts.attributes.update(exif="apply"))
    with pytest.raises(FileFormatError, match="does not match its fingerprint"):
        inspect_file(path, pools=[])
