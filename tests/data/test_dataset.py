"""The data set file: what index writes is what opens; wrong photos and damaged files are told; nothing half-written."""

import hashlib
import os
import pickle
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.columns import Annotations, PhotoFiles, coco_id, have_twins, twins
from nemo_dali.data.dataset import COLUMNS, OTHER_COLUMNS, PHOTO_COLUMNS, RUN_CHECKSUMS, Dataset
from nemo_dali.data.indexing import IndexReport, index_dataset
from nemo_dali.errors import FileFormatError, PhotoError
from tests.helpers import fork_server
from tests.helpers.forged import Parts, forge
from tests.helpers.h5_files import assert_views_agree
from tests.helpers.refer import ReferFiles, write_refer


def read(files: ReferFiles) -> Annotations:
    return read_refer(files.root, dataset="refcoco", split_by="unc", split="train")


def index(files: ReferFiles, output: Path, **options: bool) -> IndexReport:
    return index_dataset(read(files), images=files.photos, output=output, **options)


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> ReferFiles:
    return write_refer(tmp_path)


@pytest.fixture(name="output")
def _output(tmp_path: Path) -> Path:
    return tmp_path / "a.ris.h5"


def columns(of: Annotations | Dataset) -> dict[str, Any]:
    found = {
        f"{table}/{f.name}": getattr(getattr(of, table), f.name)
        for table in ("images", "refs", "sentences")
        for f in fields(getattr(of, table))
    }
    return found | {
        name: getattr(of, name) for name in ("image_categories", "category_id", "category_name", "rle_counts")
    }


def assert_same(found: Annotations | Dataset, expected: Annotations | Dataset) -> None:
    for (name, column), (_, other) in zip(columns(found).items(), columns(expected).items(), strict=True):
        if isinstance(column, np.ndarray):
            np.testing.assert_array_equal(column, other, err_msg=name)
            assert column.dtype == other.dtype
        else:
            assert list(column) == list(other), name


def test_what_is_indexed_is_opened(files: ReferFiles, output: Path) -> None:
    report = index(files, output)
    found = Dataset.open(output)
    assert_same(found, read(files))
    assert (report.photos, report.refs, report.left_out, report.left_out_refs) == (6, 12, (), 0)
    assert report.sentences == len(found.sentences.text) == len(found.sentences.ref)
    assert report.fingerprint == found.fingerprint
    assert (found.path, found.name, found.left_out) == (output, "refcoco-unc-train", 0)
    assert found.image_root == str(files.photos)
    assert Path(found.photo_path(2)) == files.photos / found.images.file_name[2]
    photos = [Path(found.photo_path(row)).read_bytes() for row in range(6)]
    assert list(map(bytes, found.photo_files.digest)) == [hashlib.sha256(photo).digest() for photo in photos]
    assert found.photo_files.coco_id.tolist() == found.images.id.tolist()
    assert (found.exif, found.box_format, found.refs.no_target.tolist()) == ("ignore", "", [-1] * 12)
    assert found.sentences.text[1:3] == [found.sentences.text[1], found.sentences.text[2]]


def test_the_file_opens_in_plain_h5py_and_its_numbers_can_be_mapped(files: ReferFiles, output: Path) -> None:
    index(files, output)
    names: list[str] = []
    with h5py.File(output) as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert file.attrs["format"].decode() == "nemo-dali/ris"
        assert file.attrs["version"] == 2
        assert file["refs/ref_id"][:].tolist() == [ref["ref_id"] for ref in files.refs]
        begin, end = file["sentences/text_offsets"][:2]
        assert file["sentences/text"][begin:end].tobytes().decode() == files.refs[0]["sentences"][0]["sent"]
        assert all(file[name].id.get_offset() is not None for name in names)
    columns = {f"{g}/{n}": COLUMNS[g][n] for g in COLUMNS for n in COLUMNS[g]} | OTHER_COLUMNS | PHOTO_COLUMNS
    offsets = [f"{name}_offsets" for name, dtype in columns.items() if not dtype]
    assert sorted(names) == sorted([*columns, *offsets, "images/digest", RUN_CHECKSUMS])
    assert_views_agree(output)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path, output: Path) -> None:
    one = write_refer(tmp_path / "one")
    same = write_refer(tmp_path / "elsewhere", protocol=4)
    other = write_refer(tmp_path / "other", edit=lambda refs, _: refs[0]["sentences"][0].update(raw="x"))
    prints = [index(files, output).fingerprint for files in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_twins_are_photos_of_one_known_content() -> None:
    digest = np.random.default_rng(0).integers(0, 256, (500, 32), np.uint8)
    digest[[7, 90]] = digest[3]
    digest[400] = digest[399]
    digest[20:25] = 0  # not known
    digest[30, :31], digest[31, 1:] = digest[32, :31], digest[32, 1:]
    digest[30, 31] ^= digest[32, 31] == digest[30, 31]
    nothing = np.zeros(500, np.int64)
    found = twins(PhotoFiles(digest, nothing.astype(np.uint8), nothing))
    alone = np.arange(500, dtype=np.int32)
    np.testing.assert_array_equal(found, np.where(np.isin(alone, [7, 90]), 3, np.where(alone == 400, 399, alone)))
    assert found.dtype == np.int32 and np.flatnonzero(have_twins(found)).tolist() == [3, 7, 90, 399, 400]
    assert (twins(PhotoFiles(digest[:1].repeat(9, 0), nothing.astype(np.uint8), nothing)) == 0).all()


def test_index_tells_photos_of_one_content(tmp_path: Path, output: Path) -> None:
    def same_size(_: Any, instances: Any) -> None:
        first, _, _, last = instances["images"][:4]
        last.update(width=first["width"], height=first["height"])
        for annotation in instances["annotations"]:
            if annotation["image_id"] == last["id"]:
                annotation["segmentation"] = [[1, 1, 20, 1, 1, 20]]

    files = write_refer(tmp_path, edit=same_size)
    one, _, _, other = files.instances["images"][:4]
    (files.photos / other["file_name"]).write_bytes((files.photos / one["file_name"]).read_bytes())
    report = index(files, output)
    names = sorted([one["file_name"], other["file_name"]])
    assert report.copies == 2 and sorted(report.copy) == names
    assert f"2 photos have the same content as another, such as {' and '.join(names)}: mining makes" in str(report)
    assert index(write_refer(tmp_path / "none"), tmp_path / "none.ris.h5").copies == 0


@pytest.mark.parametrize("remove", [False, True])
def test_a_file_replaced_or_removed_meanwhile_stays_what_it_was(
    tmp_path: Path, files: ReferFiles, output: Path, remove: bool
) -> None:
    index(files, output)
    found, expected = Dataset.open(output), Dataset.open(output)
    texts = list(expected.sentences.text)
    if remove:
        output.unlink()
    else:
        index(write_refer(tmp_path / "other", seed=1), output)
    assert found.refs.ref_id[0] == 70
    assert list(found.sentences.text) == texts
    assert found.content_fingerprint() == found.fingerprint
    found.mapped.check()


def test_text_of_a_file_cut_short_meanwhile_is_refused(files: ReferFiles, output: Path) -> None:
    index(files, output)
    found = Dataset.open(output)
    os.truncate(output, 2000)
    with pytest.raises(FileFormatError, match=r"a\.ris\.h5 was truncated while it was in use, from \d+ to 2000 bytes"):
        found.sentences.text[0]


def test_a_data_set_pickles_as_its_path(tmp_path: Path, files: ReferFiles, output: Path) -> None:
    index(files, output)
    (tmp_path / "other").mkdir()
    found = Dataset.open(output, images=tmp_path / "other")
    data = pickle.dumps(found)
    assert len(data) < 500
    assert_same(pickle.loads(data), found)
    assert pickle.loads(data).image_root == str(tmp_path / "other")


def test_the_folder_of_photos_can_be_another_one(
    tmp_path: Path, files: ReferFiles, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(files, output)
    moved = files.photos.rename(tmp_path / "moved")
    found = Dataset.open(output)  # can be inspected without photos
    with pytest.raises(
        PhotoError, match=r"photos of a\.ris\.h5 are not in .*photos, .* with images=\.\.\. or --images"
    ):
        found.photo_path(0)
    with pytest.raises(PhotoError, match="nowhere"):
        Dataset.open(output, images=tmp_path / "nowhere")
    name = found.images.file_name[0]
    assert Dataset.open(output, images=moved).photo_path(0) == f"{moved}/{name}"
    monkeypatch.chdir(tmp_path)
    assert Dataset.open("a.ris.h5", images="moved").photo_path(0) == f"{moved}/{name}"


# --- photos ----------------------------------------------------------------------------------------------------------


def save_again(path: Path, mode: str, **options: Any) -> None:
    with Image.open(path) as photo:
        photo.convert(mode).save(path, **options)


def test_grey_cmyk_png_and_rotated_photos_are_taken_as_stored(files: ReferFiles, output: Path) -> None:
    photos = sorted(files.photos.iterdir())
    save_again(photos[0], "L")
    save_again(photos[1], "CMYK")
    save_again(photos[2], "P", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    save_again(photos[3], "RGB", exif=exif)
    assert index(files, output, verify=True).photos == 6
    found = Dataset.open(output)
    of = dict(zip(found.images.file_name, found.photo_files.orientation.tolist(), strict=True))
    assert [of[photo.name] for photo in photos] == [0, 0, 0, 6, 0, 0]


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def larger(path: Path) -> None:
    Image.new("RGB", (500, 400)).save(path)


def turned(path: Path) -> None:
    with Image.open(path) as photo:
        photo.transpose(Image.Transpose.ROTATE_90).save(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


def gif(path: Path) -> None:
    save_again(path, "L", format="GIF")


def sixteen_bit(path: Path) -> None:
    with Image.open(path) as photo:
        pixels = np.asarray(photo.convert("L")).astype(np.uint16)
    Image.fromarray(pixels * 257).save(path, format="PNG")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def endless_scan(path: Path) -> None:
    data = path.read_bytes()
    middle = data.rindex(b"\xff\xda") + 20
    path.write_bytes(data[:middle] + b"\xff\xc0" + data[middle:])


HEADER = [
    (missing, r"1 of 6 photos cannot be opened in .*photos: {} \(No such file or directory\)\. .* Check --images"),
    (folder, r"1 of 6 photos cannot be opened in .*photos: {} \(Is a directory\)"),
    (larger, r"1 of 6 photos have a different size than annotated: {} \(500x400 pixels, not \d+x\d+\)\. "),
    (turned, r"1 of 6 photos have a different size than annotated: {}"),
]
CORRUPT = [
    (empty, r"1 of 6 photos are corrupt: {} \(neither JPEG nor PNG\)\. .* --skip-corrupt\."),
    (text, r"1 of 6 photos are corrupt: {} \(neither JPEG nor PNG\)"),
    (gif, r"1 of 6 photos are corrupt: {} \(neither JPEG nor PNG\)"),
    (sixteen_bit, r"1 of 6 photos have more than 8 bits a channel, .*: {} \(16 bits a channel\)"),
]
VERIFIED = [
    (cut, r"1 of 6 photos are corrupt: {} \(image file is truncated .*\)"),
    (endless_scan, r"1 of 6 photos are corrupt: {}"),
]


@pytest.mark.parametrize(("damage", "reason"), HEADER + CORRUPT + VERIFIED)
def test_photos_that_cannot_be_used_are_named_and_nothing_is_written(
    files: ReferFiles, output: Path, damage: Any, reason: str
) -> None:
    index(files, output)
    old = output.read_bytes()
    photo = sorted(files.photos.iterdir())[1]
    damage(photo)
    with pytest.raises(PhotoError, match=reason.format(photo.name)) as caught:
        index(files, output, verify=(damage, reason) in VERIFIED)
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == old
    assert not list(output.parent.glob("*.partial"))


def test_only_decoding_finds_a_cut_photo(files: ReferFiles, output: Path) -> None:
    cut(sorted(files.photos.iterdir())[1])
    assert index(files, output).photos == 6


@pytest.mark.parametrize("damage", [damage for damage, _ in HEADER])
def test_a_wrong_folder_is_not_skipped_as_corrupt(files: ReferFiles, output: Path, damage: Any) -> None:
    damage(sorted(files.photos.iterdir())[1])
    with pytest.raises(PhotoError):
        index(files, output, verify=True, skip_corrupt=True)


def test_corrupt_photos_are_left_out_on_request(files: ReferFiles, output: Path) -> None:
    photos = sorted(files.photos.iterdir())
    cut(photos[0])
    empty(photos[4])
    report = index(files, output, verify=True, skip_corrupt=True)
    gone = {photos[0].name, photos[4].name}
    assert set(report.left_out) == gone
    assert (report.photos, report.refs, report.left_out_refs) == (4, 8, 4)
    found, whole = Dataset.open(output), read(files)
    assert found.left_out == 2
    row_of = {ref_id: row for row, ref_id in enumerate(whole.refs.ref_id.tolist())}
    kept_names = []
    for row, ref_id in enumerate(found.refs.ref_id.tolist()):
        old = row_of[ref_id]
        for name in ("ann_id", "category", "sentence_count", "rle_count"):
            assert getattr(found.refs, name)[row] == getattr(whole.refs, name)[old]
        image, old_image = found.refs.image[row], whole.refs.image[old]
        kept_names.append(found.images.file_name[image])
        for name in ("file_name", "id", "width", "height"):
            assert getattr(found.images, name)[image] == getattr(whole.images, name)[old_image]
        its, its_old = (
            d.image_categories[d.images.category_begin[i] :][: d.images.category_count[i]]
            for d, i in ((found, image), (whole, old_image))
        )
        np.testing.assert_array_equal(its, its_old)
        runs, old_runs = (
            d.rle_counts[d.refs.rle_begin[r] :][: d.refs.rle_count[r]] for d, r in ((found, row), (whole, old))
        )
        np.testing.assert_array_equal(runs, old_runs)
        texts, old_texts = (
            list(d.sentences.text)[d.refs.sentence_begin[r] :][: d.refs.sentence_count[r]]
            for d, r in ((found, row), (whole, old))
        )
        assert texts == old_texts
    assert len(set(kept_names)) == 4
    assert not gone & set(kept_names)
    assert not gone & set(found.images.file_name)


def test_the_photos_of_other_data_sets_are_left_out_with_their_refs(
    tmp_path: Path, files: ReferFiles, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index(files, output)
    other = tmp_path / "other.ris.h5"

    def keep_two(parts: Parts) -> None:
        parts.arrays["images/coco_id"][2:] = -1
        parts.arrays["images/digest"][2:] = 0

    forge(output, keep_two, other)
    words = ["index", files.root, "--dataset", "refcoco", "--split-by", "unc", "--split", "train"]
    words += ["--images", files.photos, "--leave-out", other, "-o", tmp_path / "b.ris.h5"]
    assert main([str(word) for word in words]) == 0
    assert "left out: 2 photos of refcoco-unc-train\nleft out with them: 4 refs\n" in capsys.readouterr().out
    whole, rest = Dataset.open(output), Dataset.open(tmp_path / "b.ris.h5")
    assert rest.images.id.tolist() == whole.images.id.tolist()[2:]
    np.testing.assert_array_equal(rest.photo_files.digest, whole.photo_files.digest[2:])
    assert main([str(word) for word in [*words[:-3], output, "-o", tmp_path / "c.ris.h5"]]) == 1
    assert "No photo is left" in capsys.readouterr().err


def test_nothing_to_index_is_an_error(files: ReferFiles, output: Path) -> None:
    for photo in files.photos.iterdir():
        empty(photo)
    with pytest.raises(PhotoError, match="No photo is left"):
        index(files, output, skip_corrupt=True)
    with pytest.raises(PhotoError, match=r"6 of 6 photos are corrupt: COCO_.*, COCO_.* --skip-corrupt\."):
        index(files, output)
    with pytest.raises(PhotoError, match=r"nowhere is not a folder of photos\. .*--images"):
        index_dataset(read(files), images=files.photos / "nowhere", output=output)
    assert not output.exists()


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "value", "reason"),
    [
        ("refs/image", 3, 6, "/refs/image has a value out of range"),
        ("refs/image", 3, -1, "/refs/image has a value out of range"),
        ("refs/category", 3, 3, "/refs/category has a value out of range"),
        ("refs/category", 3, -2, "/refs/category has a value out of range"),
        ("refs/empty", 3, 2, "/refs/empty has a value out of range"),
        ("refs/no_target", 3, -2, "/refs/no_target has a value out of range"),
        ("refs/distractors", 3, -2, "/refs/distractors has a value out of range"),
        ("images/orientation", 3, 9, "/images/orientation has a value out of range"),
        ("images/coco_id", 3, -2, "/images/coco_id has a value out of range"),
        ("image_categories", 0, 3, "/image_categories has a value out of range"),
        ("images/width", 0, 0, "/images/width has a value out of range"),
        ("images/height", 0, 65536, "/images/height has a value out of range"),
        ("images/width", 0, 9, "run lengths of a ref do not add up"),
        ("images/category_begin", 1, 0, "ranges of /images/category_begin and _count are not contiguous"),
        ("images/category_count", 1, -5, "ranges of /images/category"),
        ("refs/sentence_count", 0, 99, "ranges of /refs/sentence"),
        ("refs/sentence_begin", 11, 2**62, "ranges of /refs/sentence"),
        ("refs/rle_begin", 4, -1, "ranges of /refs/rle"),
        ("refs/rle_count", 11, 2**31 - 1, "ranges of /refs/rle"),
        ("sentences/ref", 0, 5, "/sentences/ref does not fit the refs' ranges"),
        ("rle/counts", 0, 2**32 - 1, "run lengths of a ref do not add up"),
        ("images/file_name", 0, "../../etc/passwd", "name that leaves the image root"),
        ("images/file_name", 0, "/etc/passwd", "name that leaves the image root"),
    ],
)
def test_rows_that_point_nowhere_are_refused(
    files: ReferFiles, output: Path, name: str, row: int, value: Any, reason: str
) -> None:
    index(files, output)

    def edit(parts: Parts) -> None:
        if isinstance(value, str):
            parts.set_strings(name, [*parts.strings(name)[:row], value, *parts.strings(name)[row + 1 :]])
        else:
            parts.arrays[name][row] = value

    forge(output, edit)
    whole = rf"a\.ris\.h5 is damaged: .*{reason}.*Make it with: nemo-dali index"
    if reason not in ("run lengths of a ref do not add up", "name that leaves the image root"):
        with pytest.raises(FileFormatError, match=whole):
            Dataset.open(output)
        return
    dataset = Dataset.open(output)  # these are looked at when they are used
    refs = np.arange(len(dataset.refs.image))
    for use in (
        lambda: dataset.check_masks(refs) if "run lengths" in reason else dataset.photo_path(0),
        lambda: [dataset.mask(ref) for ref in refs] if "run lengths" in reason else list(dataset.images.file_name),
        dataset.content_fingerprint,
    ):
        with pytest.raises(FileFormatError, match=whole):
            use()


def test_run_lengths_and_strings_are_looked_at_when_they_are_used(files: ReferFiles, output: Path) -> None:
    """A changed byte of one ref's run lengths, or of a column of strings, spoils nothing else."""
    index(files, output)
    whole, arrays = output.read_bytes(), Dataset.open(output).mapped.index.arrays

    def damaged(place: int) -> Dataset:
        output.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        return Dataset.open(output)

    dataset = Dataset.open(output)
    refs = np.arange(len(dataset.refs.image))
    dataset.check_masks(refs)
    ref = int(refs[-1])
    dataset = damaged(arrays["rle/counts"].offset + 4 * int(dataset.refs.rle_begin[ref]))
    dataset.check_masks(refs[:-1])
    photo = dataset.refs.image[0]
    assert dataset.mask(0).shape == (dataset.images.height[photo], dataset.images.width[photo])
    for use in (dataset.mask, dataset.runs_of, lambda ref: dataset.check_masks(refs)):
        for _ in range(2):
            with pytest.raises(
                FileFormatError, match=rf"run lengths of ref {ref} do not match their checksum.*Make it"
            ):
                use(ref)
    for name in ("sentences/text", "sentences/raw", "refs/source", "images/file_name"):
        if arrays[f"{name}_offsets"].nbytes and arrays[name].nbytes:
            dataset = damaged(arrays[name].offset)
            group, column = name.split("/")
            strings = getattr(getattr(dataset, group), column)
            assert len(strings) == arrays[f"{name}_offsets"].shape[0] - 1
            with pytest.raises(FileFormatError, match=rf"/{name} does not match its checksum"):
                strings[0]


def test_run_lengths_of_an_older_file_are_compared_as_a_whole(files: ReferFiles, output: Path) -> None:
    index(files, output)
    forge(output, lambda parts: parts.arrays.pop(RUN_CHECKSUMS))
    dataset = Dataset.open(output)
    last = len(dataset.refs.image) - 1
    dataset.mask(last)
    place, whole = dataset.mapped.index.arrays["rle/counts"].offset, output.read_bytes()
    output.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    dataset = Dataset.open(output)
    with pytest.raises(FileFormatError, match="/rle/counts does not match its checksum"):
        dataset.mask(last)


ALL_COLUMNS = [*(f"{g}/{n}" for g in COLUMNS for n in COLUMNS[g]), *OTHER_COLUMNS, *PHOTO_COLUMNS, "images/digest"]


@pytest.mark.parametrize("name", ALL_COLUMNS)
def test_columns_that_are_missing_or_of_another_kind_are_refused(files: ReferFiles, output: Path, name: str) -> None:
    for other in [None, np.zeros((3, 2), "<i8"), np.zeros(2, "<f4"), np.zeros((6, 31), "|u1")]:
        index(files, output)

        def edit(parts: Parts, other: Any = other) -> None:
            del parts.arrays[name]
            parts.arrays |= {} if other is None else {name: other}

        forge(output, edit)
        with pytest.raises(FileFormatError, match=rf"a\.ris\.h5 is damaged: .*/{name}"):
            Dataset.open(output)


@pytest.mark.parametrize("name", ["refs/empty", "images/digest", "images/coco_id", "categories/id"])
def test_columns_of_unequal_length_are_refused(files: ReferFiles, output: Path, name: str) -> None:
    index(files, output)
    forge(output, lambda parts: parts.arrays.update({name: parts.arrays[name][:-1]}))
    with pytest.raises(FileFormatError, match=rf"the columns of /{name.split('/')[0]} are not equally long"):
        Dataset.open(output)


@pytest.mark.parametrize("name", ["sentences/text", "images/file_name", "categories/name", "refs/source"])
def test_columns_of_fewer_strings_are_refused(files: ReferFiles, output: Path, name: str) -> None:
    index(files, output)
    forge(output, lambda parts: parts.set_strings(name, parts.strings(name)[:-1]))
    with pytest.raises(FileFormatError, match=rf"the columns of /{name.split('/')[0]} are not equally long"):
        Dataset.open(output)


@pytest.mark.parametrize("attribute", ["name", "image_root", "left_out", "exif", "box_format"])
def test_attributes_that_are_missing_or_of_another_kind_are_refused(
    files: ReferFiles, output: Path, attribute: str
) -> None:
    for value in (None, 1.5, [1], "s3://", -1):
        index(files, output)
        if isinstance(value, str) and attribute in ("name", "box_format"):
            continue

        def edit(parts: Parts, value: Any = value) -> None:
            parts.attributes |= {attribute: value}
            if value is None:
                del parts.attributes[attribute]

        forge(output, edit)
        with pytest.raises(FileFormatError, match=r"is damaged: its"):
            Dataset.open(output)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("COCO_train2014_000000005802.jpg", 5802),
        ("train2017/000000005802.jpg", 5802),
        ("a/COCO_val2014_000000000042.jpg", 42),
        ("COCO_train2014_000000098304_2.jpg", -1),
        ("000000005802.png", -1),
        ("5802.jpg", -1),
        ("xCOCO_train2014_000000005802.jpg", -1),
    ],
)
def test_photos_of_coco_are_known_by_their_names(name: str, expected: int) -> None:
    assert coco_id(name) == expected


def test_a_file_cut_short_anywhere_is_refused(files: ReferFiles, output: Path) -> None:
    index(files, output)
    whole = output.read_bytes()
    for length in [*range(0, len(whole), 1009), len(whole) - 1]:
        output.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"(truncated|checksum)\. Make it with: nemo-dali index"):
            Dataset.open(output)


INDEX = """
import sys
from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.indexing import index_dataset
annotations = read_refer(sys.argv[1], dataset="refcoco", split_by="unc", split="train")
index_dataset(annotations, images=sys.argv[2], output=sys.argv[3])
"""


WAITING = """
import time
from nemo_dali.data import photos
photos.open_file = lambda path: time.sleep(600)  # as a disk may
"""


@pytest.mark.process
def test_a_run_killed_while_indexing_leaves_the_old_file(files: ReferFiles, output: Path) -> None:
    index(files, output)
    old = output.read_bytes()
    process = fork_server.start(WAITING + INDEX, files.root, files.photos, output)
    partial = output.with_name("a.ris.h5.partial")
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert partial.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert output.read_bytes() == old
    index(files, output)
    assert not partial.exists()
    Dataset.open(output)


FULL_DISK = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
    "from nemo_dali.errors import FileFormatError\n"
    "try:\n" + "".join(f"    {line}\n" for line in INDEX.strip().split("\n")) + "except FileFormatError as error:\n"
    "    print(error)\n"
)


@pytest.mark.process
def test_a_full_disk_leaves_the_old_file(files: ReferFiles, output: Path) -> None:
    index(files, output)
    old = output.read_bytes()
    run = fork_server.run(FULL_DISK, files.root, files.photos, output)
    assert run.stdout.startswith(f"Cannot write {output}: File too large. Free some space")
    assert run.stderr == ""
    assert output.read_bytes() == old
