"""What index takes for a sound photo, DALI's CPU decoder decodes later, and to Pillow's pixels."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from nemo_dali.data import photo_file
from nemo_dali.data.columns import Images
from nemo_dali.data.photos import MODES, CheckedPhotos, check_photos, find_problem
from nemo_dali.errors import PhotoError
from tests.helpers.hostile_photos import png


def decode_with_dali(path: Path) -> np.ndarray | None:
    """uint8 [H, W, 3], or None where DALI refuses the photo."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode() -> Any:
        encoded, _ = fn.readers.file(files=[str(path)])
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)

    try:
        (decoded,) = decode().run()
    except RuntimeError:
        return None
    return np.array(decoded.at(0))


def check(path: Path, size: tuple[int, int], *, verify: bool = True, skip_corrupt: bool = False) -> CheckedPhotos:
    one, numbers = np.ones(1, np.int64), np.array([size], np.int32)
    images = Images(one, numbers[:, 0], numbers[:, 1], [path.name], one, numbers[:, 0])
    return check_photos(images, str(path.parent), verify=verify, skip_corrupt=skip_corrupt)


def is_sound(path: Path, size: tuple[int, int]) -> bool:
    try:
        check(path, size)
    except PhotoError:
        return False
    return True


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *((mode, {"format": "PNG"}) for mode in MODES if mode != "CMYK"),
        *((mode, {"format": "JPEG"}) for mode in ("L", "RGB", "CMYK")),
        ("RGB", {"format": "JPEG", "progressive": True, "subsampling": 0}),
        ("RGB", {"format": "JPEG", "restart_marker_rows": 1}),
    ],
)
def test_sound_photos_have_the_same_pixels_in_dali(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 4), np.uint8)
    photo = Image.fromarray(pixels).resize((83, 61)).convert("RGB" if mode in ("P", "CMYK") else "RGBA")
    path = tmp_path / "photo"
    photo.convert(mode).save(path, **options)
    assert is_sound(path, photo.size)
    with Image.open(path) as stored:
        np.testing.assert_array_equal(decode_with_dali(path), np.asarray(stored.convert("RGB")))


def write_unlike(path: Path, what: str) -> None:
    """A sound photo of 83 x 61 that is not read: "of 48 bits", say."""
    pixels = np.random.default_rng(0).integers(0, 2**16, (61, 83, 4), np.uint16)
    kind, _, options = what.partition(", ")
    channels = {"of 16 bits": 1, "of 48 bits": 3, "of 64 bits": 4}
    if kind in channels:
        cv2.imwrite(str(path.with_suffix(".png")), pixels[..., : channels[kind]])
        path.with_suffix(".png").rename(path)
    elif kind == "of 12 bits":
        Image.fromarray((pixels[..., :3] >> 8).astype(np.uint8)).save(path, format="JPEG")
        jpeg = bytearray(path.read_bytes())
        jpeg[jpeg.index(b"\xff\xc0") + 4] = 12
        path.write_bytes(jpeg)
    elif kind == "in CMYK":
        Image.fromarray((pixels >> 8).astype(np.uint8), "CMYK").save(path, format="JPEG", quality=95)
        if options:  # Adobe's marker, 14 bytes long with its length
            jpeg = path.read_bytes()
            begin = jpeg.index(b"\xff\xee")
            path.write_bytes(jpeg[:begin] + jpeg[begin + 16 :])
    else:
        path.write_bytes(png(20000, 20000))


UNLIKE = {
    "of 16 bits": ("have more than 8 bits a channel, .*: photo \\(16 bits", "Store them with 8, "),
    "of 48 bits": ("have more than 8 bits a channel, .*: photo \\(16 bits", "Store them with 8, "),
    "of 64 bits": ("have more than 8 bits a channel, .*: photo \\(16 bits", "Store them with 8, "),
    "of 12 bits": ("have more than 8 bits a channel, .*: photo \\(.*12-bit layers", "Store them with 8, "),
    "in CMYK, without Adobe's marker": ("are in CMYK without .*: photo \\(4 channels\\)", "Store them in RGB"),
    "of 400 million pixels": (
        "are too large: photo \\(20000x20000 pixels, more than",
        "Make them and their annotations sma",
    ),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_photos_that_are_sound_and_not_read_have_their_own_reason_and_remedy(tmp_path: Path, what: str) -> None:
    path, (reason, remedy) = tmp_path / "photo", UNLIKE[what]
    write_unlike(path, what)
    side = (20000, 20000) if "pixels" in what else (83, 61)
    for verify in (False, True):
        with pytest.raises(PhotoError, match=rf"1 of 1 photos {reason}.* {re.escape(remedy)}.* with --skip-corrupt\."):
            check(path, side, verify=verify)
        assert check(path, side, verify=verify, skip_corrupt=True).corrupt == [0]
    problem = find_problem(str(path), *side)
    assert problem is not None and problem.kind != "corrupt" and "corrupt:" not in problem.sentence()
    assert problem.remedy().split()[0] == remedy.split()[0]


@pytest.mark.parametrize("what", ["of 48 bits", "in CMYK, without Adobe's marker"])
def test_that_is_because_dali_decodes_them_to_other_pixels(tmp_path: Path, what: str) -> None:
    write_unlike(tmp_path / "photo", what)
    with Image.open(tmp_path / "photo") as stored:
        assert not np.array_equal(decode_with_dali(tmp_path / "photo"), np.asarray(stored.convert("RGB")))


def test_every_files_digest_and_orientation_are_given(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    photo = Image.new("RGB", (8, 6), (90, 60, 30))
    photo.save(tmp_path / "a.jpg", exif=exif)
    photo.save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes(b"not a photo")
    names = ["a.jpg", "b.png", "c.jpg"]
    row = np.arange(3)
    images = Images(row, np.full(3, 8, np.int32), np.full(3, 6, np.int32), names, row, row.astype(np.int32))
    for verify in (False, True):
        found = check_photos(images, str(tmp_path), verify=verify, skip_corrupt=True)
        assert found.corrupt == [2]
        assert found.orientation.tolist() == [6, 0, 0] and found.orientation.dtype == np.uint8
        digests = [hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in names]
        assert found.digest.shape == (3, 32) and list(map(bytes, found.digest)) == digests


def test_each_file_is_opened_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    opened, real = [], os.open
    monkeypatch.setattr(photo_file.os, "open", lambda path, flags: opened.append(path) or real(path, flags))
    assert is_sound(tmp_path / "a.png", (8, 6))
    assert opened == [str(tmp_path / "a.png")]


def test_photos_that_dali_refuses_are_not_sound(tmp_path: Path) -> None:
    path, random = tmp_path / "photo.jpg", np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (61, 83, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    refused = 0
    for trial in range(12):
        data = bytearray(whole)
        if trial % 2:
            del data[-int(random.integers(1, len(data) // 2)) :]
        else:  # a byte anywhere, the header included
            data[int(random.integers(0, len(data)))] ^= int(random.integers(1, 255))
        path.write_bytes(data)
        in_dali = decode_with_dali(path)
        refused += in_dali is None
        assert in_dali is not None or not is_sound(path, (83, 61))
    assert refused >= 6
