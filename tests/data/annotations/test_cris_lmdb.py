"""An LMDB as CRIS's folder2lmdb.py writes it ▸ photos as files and columns, against what was written."""

import io
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import read_annotations
from nemo_dali.data.annotations.cris_lmdb import read_cris_lmdb
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import AnnotationError, NemoError
from nemo_dali.io.lmdb import Lmdb
from tests.helpers.bounds import fuzz, mutate_bytes
from tests.helpers.counts import examples
from tests.helpers.hostile_photos import png
from tests.helpers.refer import stored_mask
from tests.helpers.turned import tagged

# The number 5, written by pyarrow 11's serialize.
PYARROW_5 = bytes(16) + b"\xff\xff\xff\xff\xf0\0\0\0\x10\0\0\0\0\0\n\0\x0c\0\6\0\5\0\x08\0\n\0\0\0\0\1\4\0"


def encoded(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def records(count: int = 6) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Values, two on each photo, and their masks."""
    random = np.random.default_rng(1)
    values, masks = [], []
    for number in range(count):
        if number % 2 == 0:
            height, width = random.integers(20, 60, 2)
            jpeg = encoded(random.integers(0, 255, (height, width, 3), np.uint8), format="JPEG")
        masks.append(random.random((height, width)) < 0.3)
        mask = np.where(masks[-1], 255 - (random.random((height, width)) < 0.1), 0)  # 254: parts that overlap
        values.append(
            {
                "img": jpeg,
                "mask": encoded(mask.astype(np.uint8), format="PNG"),
                "cat": int(random.integers(0, 4)),
                "seg_id": 100 - number,
                "img_name": f"COCO_train2014_{number // 2:012d}.jpg",
                "num_sents": 1 + number % 3,
                "sents": [f"thing {number} {i}" for i in range(1 + number % 3)],
            }
        )
    return values, masks


def write(path: Path, values: list[Any], *, subdir: bool = False, protocol: int = 4, extra: Any = None) -> Path:
    """An LMDB; what is bytes already is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [str(number).encode() for number in range(len(values))]
    content = dict(zip(keys, values, strict=True)) | {b"__keys__": keys, b"__len__": len(keys)} | (extra or {})
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for key, value in content.items():
            transaction.put(key, value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize(("subdir", "protocol"), [(False, 4), (True, 2), (False, 5)])
def test_columns_and_photos_are_what_was_written(tmp_path: Path, subdir: bool, protocol: int) -> None:
    values, masks = records()
    path = write(tmp_path / "lmdb" / "refcoco" / "train.lmdb", values, subdir=subdir, protocol=protocol)
    photos = tmp_path / "deep" / "photos"
    found = read_annotations(path, images=photos, split="train")
    assert found.name == "refcoco-train"
    assert found.images.id.tolist() == [1, 2, 3]
    assert sorted(os.listdir(photos)) == [f"COCO_train2014_{i:012d}.jpg" for i in range(3)]
    assert found.refs.ref_id.tolist() == [value["seg_id"] for value in values]
    assert set(found.refs.ann_id.tolist()) == {-1} and not found.refs.empty.any()
    for row, (value, mask) in enumerate(zip(values, masks, strict=True)):
        photo = found.images.file_name[found.refs.image[row]]
        assert photo == value["img_name"] and (photos / photo).read_bytes() == value["img"]
        np.testing.assert_array_equal(stored_mask(found, row), mask)
        mine = slice(found.refs.sentence_begin[row], found.refs.sentence_begin[row] + found.refs.sentence_count[row])
        assert list(found.sentences.text[mine]) == list(found.sentences.raw[mine]) == value["sents"]
        assert found.category_id[found.refs.category[row]] == value["cat"]
    assert set(found.sentences.sent_id.tolist()) == {-1}
    for image, categories in enumerate(np.split(found.image_categories, found.images.category_begin[1:])):
        own = {value["cat"] for value in values[2 * image : 2 * image + 2]}
        assert set(found.category_id[categories].tolist()) == own


def test_orientations_are_ignored_unless_asked(tmp_path: Path) -> None:
    values, masks = records(4)
    for value in values:
        with Image.open(io.BytesIO(value["img"])) as photo:
            photo.save(buffer := io.BytesIO(), "JPEG", exif=tagged(6))
        value["img"] = buffer.getvalue()
    stored = write(tmp_path / "stored.lmdb", values)
    for value, mask in zip(values, masks, strict=True):
        value["mask"] = encoded(np.rot90(mask, -1).astype(np.uint8), format="PNG")
    shown = write(tmp_path / "shown.lmdb", values)
    for path, exif in ((stored, None), (stored, "ignore"), (shown, "apply")):
        found = read_annotations(path, images=tmp_path / "photos", exif=exif)  # type: ignore[arg-type]
        assert found.exif == (exif or "ignore")
        for row, mask in enumerate(masks):
            expected = np.rot90(mask, -1) if exif == "apply" else mask
            np.testing.assert_array_equal(stored_mask(found, row), expected)
        index_dataset(found, images=tmp_path / "photos", output=tmp_path / "a.ris.h5")
        assert Dataset.open(tmp_path / "a.ris.h5").exif == found.exif
    for path, exif in ((stored, "apply"), (shown, "ignore")):
        with pytest.raises(AnnotationError, match=r"The mask of value 0 .* is \d+x\d+ pixels, but its photo "):
            read_annotations(path, images=tmp_path / "photos", exif=exif)  # type: ignore[arg-type]


def test_names_taken_by_other_content_get_a_part_of_its_hash(tmp_path: Path) -> None:
    values, _ = records()
    for value in values[2:4]:
        value["img_name"] = values[0]["img_name"]
    path, photos = write(tmp_path / "train.lmdb", values), tmp_path / "photos"
    photos.mkdir()
    (photos / values[4]["img_name"]).write_text("mine")
    found = read_cris_lmdb(path, images=photos)
    assert (photos / values[4]["img_name"]).read_text() == "mine"
    assert len(set(found.images.file_name)) == 3 and len(os.listdir(photos)) == 4
    for row, value in enumerate(values):
        assert (photos / found.images.file_name[found.refs.image[row]]).read_bytes() == value["img"]
    before = {name: (photos / name).stat().st_mtime_ns for name in os.listdir(photos)}
    again = read_cris_lmdb(path, images=photos)
    assert list(again.images.file_name) == list(found.images.file_name)
    assert {name: (photos / name).stat().st_mtime_ns for name in os.listdir(photos)} == before


def test_links_under_the_photos_names_are_neither_followed_nor_replaced(tmp_path: Path) -> None:
    values, _ = records()
    path, photos = write(tmp_path / "train.lmdb", values), tmp_path / "photos"
    photos.mkdir()
    (tmp_path / "same").write_bytes(values[0]["img"])  # even to the same content, which its owner may change
    (photos / values[0]["img_name"]).symlink_to(tmp_path / "same")
    (photos / values[2]["img_name"]).symlink_to(tmp_path / "nowhere")
    found = read_cris_lmdb(path, images=photos)
    taken = {values[0]["img_name"], values[2]["img_name"]}
    assert not taken & set(found.images.file_name) and not (tmp_path / "nowhere").exists()
    assert {name for name in os.listdir(photos) if (photos / name).is_symlink()} == taken


def test_what_an_interrupted_run_left_of_a_photo_is_taken_over_and_nothing_else(tmp_path: Path) -> None:
    values, _ = records()
    path, photos = write(tmp_path / "train.lmdb", values), tmp_path / "photos"
    photos.mkdir()
    partial = photos / f"{values[0]['img_name']}.partial"
    partial.write_bytes(values[0]["img"][:100])
    read_cris_lmdb(path, images=photos)
    assert len(os.listdir(photos)) == 3 and not partial.exists()
    (photos / values[0]["img_name"]).unlink()
    partial.symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_bytes(b"")
    with pytest.raises(NemoError, match=r"partial is a symbolic link\. Remove it, .* with --images\."):
        read_cris_lmdb(path, images=photos)
    assert (tmp_path / "victim").read_bytes() == b""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, masks = records()
    path = write(tmp_path / "val.lmdb", values)
    words = ["index", path, "--images", tmp_path / "photos", "--verify", "-o", tmp_path / "a.ris.h5"]
    assert main([str(word) for word in words]) == 0
    assert "3 photos, 6 refs, 12 sentences" in capsys.readouterr().out
    np.testing.assert_array_equal(Dataset.open(tmp_path / "a.ris.h5").mask(3), masks[3])
    with pytest.raises(ValueError, match=r"images must be one folder with val\.lmdb, whose photos are extracted"):
        read_annotations(path, images=[tmp_path / "photos", tmp_path])
    with pytest.raises(ValueError, match=r"images \(s3://bucket/photos\) must be a folder"):
        read_cris_lmdb(path, images="s3://bucket/photos")


def test_empty_sentences_are_skipped_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given, _ = records()
    given[0].update(sents=["", " "], num_sents=2)
    path = write(tmp_path / "train.lmdb", given)
    found = read_cris_lmdb(path, images=tmp_path / "photos", skip_empty=True)
    assert found.refs.ref_id.tolist() == [record["seg_id"] for record in given[1:]]
    assert "2 sentences without text and 1 refs without a sentence were skipped" in caplog.text


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"img": "text"}, "'img' of value 0 of .*train.lmdb is a str, not a bytes"),
        ({"img": b"GIF89a"}, r"The photo of value 0 of .* cannot be read \(neither JPEG nor PNG\)"),
        (
            {"img": png(20000, 20000)},
            "The photo of value 0 of .* has 20000x20000 pixels, more than the limit of 178,956,970",
        ),
        ({"mask": png(20000, 20000)}, r"mask of value 0 of .* is 20000x20000 pixels, but its"),
        (
            {"mask": encoded(np.zeros((5, 7), np.uint8), format="JPEG")},
            "The mask of value 0 of .* is not a PNG that can",
        ),
        ({"mask": b"\x89PNG\r\n\x1a\n"}, "The mask of value 0 of .* is not a PNG that can be read"),
        (
            {"mask": encoded(np.zeros((5, 7), np.uint8), format="PNG")},
            r"mask of value 0 of .* is 7x5 pixels, but its",
        ),
        ({"img_name": "../a.jpg"}, "value 0 of .* has the file name '../a.jpg', which leaves the folder of photos"),
        ({"seg_id": 99}, "train.lmdb has ref 99 twice"),
        ({"seg_id": "5"}, "'seg_id' of value 0 of .* is a str, not a int"),
        ({"cat": None}, "'cat' of value 0 of .* is a NoneType, not a int"),
        ({"sents": [], "num_sents": 0}, "value 0 of .* has no sentence.* --skip-empty"),
        ({"num_sents": 2}, "value 0 of .* has 1 sentences, but says 2"),
        ({"sents": [" "]}, "a sentence of value 0 of .* is empty.* --skip-empty"),
        ({"sents": [5]}, "a sentence of value 0 of .* is a int, not a str"),
        ({"sents": Hostile()}, r"value 0 of .*train.lmdb wants to use 'posix.system', which no annotation file needs"),
        ({"cat": np.int64(3)}, r"value 0 of .*train.lmdb wants to use 'numpy.*'"),
    ],
)
def test_values_that_do_not_fit_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given, _ = records()
    given[0].update(values)
    with pytest.raises(AnnotationError, match=reason) as caught:
        read_cris_lmdb(write(tmp_path / "train.lmdb", given), images=tmp_path / "photos")
    assert "\n" not in str(caught.value) and not (tmp_path / "hacked").exists()
    assert os.listdir(tmp_path / "photos") == [] or "img_name" not in values


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({b"__keys__": 5}, "'__keys__' of .*train.lmdb is a int, not a list"),
        ({b"__keys__": ["0"], b"__len__": 1}, "a key of .*train.lmdb is a str, not a bytes"),
        ({b"__keys__": [b"7"], b"__len__": 1}, "value 0 of .*train.lmdb is missing"),
        ({b"__keys__": [b""], b"__len__": 1}, "value 0 of .*train.lmdb is missing"),
        ({b"__keys__": [b"7" * 600], b"__len__": 1}, "value 0 of .*train.lmdb is missing"),
        ({b"__len__": 7}, "train.lmdb lists 6 keys, but says it has 7"),
        ({b"__keys__": [], b"__len__": 0}, "train.lmdb lists 0 keys, but says it has 0"),
        ({b"0": pickle.dumps([1])}, "value 0 of .*train.lmdb is a list, not a record"),
        ({b"0": b"\x80\x04"}, "value 0 of .*train.lmdb is not a pickle, or is damaged or truncated"),
        ({b"__keys__": PYARROW_5}, r"'__keys__' of .* is not pickled: .*ETRIS, DETRIS and CGFormer.*datasets\.md"),
        ({b"0": PYARROW_5}, r"value 0 of .* is not pickled: .*early ones of CRIS, write pyarrow's own"),
    ],
)  # fmt: skip
def test_files_that_are_not_as_cris_writes_them(tmp_path: Path, extra: Any, reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason):
        read_cris_lmdb(write(tmp_path / "train.lmdb", records()[0], extra=extra), images=tmp_path / "photos")


def test_a_mask_without_pixels_is_refused(tmp_path: Path) -> None:
    values, masks = records()
    values[1]["mask"] = encoded(np.zeros(masks[1].shape, np.uint8), format="PNG")
    with pytest.raises(AnnotationError, match=r"The mask of value 1 of .* has no pixel"):
        read_cris_lmdb(write(tmp_path / "train.lmdb", values), images=tmp_path / "photos")


def test_a_wrong_path_another_file_or_one_cut_short(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"nowhere\.lmdb cannot be read: No such file.*Check the path"):
        read_cris_lmdb(tmp_path / "nowhere.lmdb", images=tmp_path / "photos")
    assert not (tmp_path / "nowhere.lmdb").exists()
    (tmp_path / "text.lmdb").write_text("no database" * 1000)
    with pytest.raises(AnnotationError, match=r"text\.lmdb cannot be read as an LMDB"):
        read_cris_lmdb(tmp_path / "text.lmdb", images=tmp_path / "photos")
    path = write(tmp_path / "train.lmdb", records(40)[0])
    with open(path, "r+b") as file:
        file.truncate(3 * 4096)
    with pytest.raises(AnnotationError, match=r"train\.lmdb .*it is truncated"):
        read_cris_lmdb(path, images=tmp_path / "photos")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NemoError, match=r"cannot be written to .*file.*Check --images"):
        read_cris_lmdb(write(tmp_path / "train.lmdb", records()[0]), images=tmp_path / "file" / "below")


# --- hostile files ---------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@given(st.integers(0, 2**32), st.sampled_from([1, 30, 3000]), st.sampled_from([20, 3000, 30_000]))
@settings(max_examples=examples(60), deadline=None)
def test_values_are_those_that_the_library_reads(seed: int, count: int, longest: int) -> None:
    random = Random(seed)
    names = [random.randbytes(random.randint(1, 40)) for _ in range(count)]
    content = {name: random.randbytes(random.randint(0, longest)) for name in names}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.lmdb"
        with lmdb.open(str(path), subdir=False, map_size=1 << 28) as database:
            for part in range(3):  # pages are used again
                with database.begin(write=True) as transaction:
                    for key in [key for number, key in enumerate(content) if number % 3 == part]:
                        transaction.put(key, b"old" * 100)
                        transaction.put(key, content[key])
                    for key in random.sample(sorted(content), len(content) // 20):
                        transaction.delete(key)
            with database.begin() as transaction:
                expected = {key: transaction.get(key) for key in [*content, b"absent", b"\xff" * 9]}
        with Lmdb(path) as ours:
            assert {key: ours.get(key) for key in expected} == expected


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.lmdb")
    (tmp_path / "data.lmdb").mkdir()
    os.mkfifo(tmp_path / "data.lmdb" / "data.mdb")
    (tmp_path / "zero.lmdb").symlink_to("/dev/zero")
    for name in ("train.lmdb", "data.lmdb", "zero.lmdb"):
        with pytest.raises(AnnotationError, match="it is not a regular file"):
            read_cris_lmdb(tmp_path / name, images=tmp_path / "photos")


def test_the_same_bytes_are_not_read_again_and_again(tmp_path: Path) -> None:
    values, _ = records(2)
    path = write(tmp_path / "train.lmdb", values, extra={b"__keys__": [b"0"] * 1000, b"__len__": 1000})
    with pytest.raises(AnnotationError, match="lists a key twice"):
        read_cris_lmdb(path, images=tmp_path / "photos")


def _read(path: Path) -> object:
    return read_cris_lmdb(path, images=path.parent / "photos")


def _mutate(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Bytes of the first words of pages and of anything."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.randint(1, 4)):
        begin = 4096 * random.randrange(len(data) // 4096)
        place = begin + random.randrange(random.choice((20, 160, 4096)))
        data[place : place + 1] = random.choice((b"\0", b"\1", b"\2", b"\xff", random.randbytes(1)))
    if random.random() < 0.1:
        del data[random.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.fuzz
def test_any_damage_to_a_file_is_read_or_refused(tmp_path: Path) -> None:
    seeds = [write(tmp_path / f"{count}.lmdb", records(count)[0]).read_bytes() for count in (2, 60)]
    assert fuzz(_read, seeds, _mutate, tmp_path / "x.lmdb", examples(1000)) > 0


def _read_value(path: Path) -> object:
    """Read an LMDB of one ref, whose pickled value is the file."""
    folder = path.parent / "lmdb"
    shutil.rmtree(folder, ignore_errors=True)
    write(folder / "x.lmdb", [path.read_bytes()])
    return read_cris_lmdb(folder / "x.lmdb", images=path.parent / "photos")


def _mutate_value(random: Random, seeds: Sequence[bytes]) -> bytes:
    pieces = [bytes([code]) for code in range(256)] + [b"2\x86", b"h\0", b"K\5", b"\x8a\1\xff", b"]", b"}", b"\x8f"]
    return mutate_bytes(random, seeds, pieces=pieces)


@pytest.mark.fuzz
def test_any_value_is_read_or_refused(tmp_path: Path) -> None:
    seeds = [pickle.dumps(records(2)[0][1], protocol) for protocol in (2, 4)]
    assert fuzz(_read_value, seeds, _mutate_value, tmp_path / "value", examples(2000)) > 0
