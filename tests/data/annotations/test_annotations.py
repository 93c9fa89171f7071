"""REFER's files ▸ columns, against pycocotools and against the records that were written."""

import builtins
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from nemo_dali.data.annotations import _untrusted as untrusted
from nemo_dali.data.annotations import read_refer
from nemo_dali.data.columns import Annotations
from nemo_dali.data.rle import decode_counts, run_lengths
from nemo_dali.errors import AnnotationError
from nemo_dali.io.unpickle import unpickle_builtins
from tests.helpers.counts import examples
from tests.helpers.refer import ReferFiles, stored_mask, write_refer


def read(files: ReferFiles, **options: str) -> Annotations:
    return read_refer(files.root, **({"dataset": "refcoco", "split_by": "unc", "split": "train"} | options))


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_columns_hold_what_the_files_hold(tmp_path: Path, protocol: int) -> None:
    files = write_refer(tmp_path, photos=5, protocol=protocol)
    found = read(files)
    photos = {photo["id"]: photo for photo in files.instances["images"]}
    its_annotations = {annotation["id"]: annotation for annotation in files.instances["annotations"]}
    images, refs, sentences = found.images, found.refs, found.sentences
    assert found.name == "refcoco-unc-train"
    assert images.id.tolist() == sorted(photos)
    assert list(images.file_name) == [photos[i]["file_name"] for i in images.id.tolist()]  # not the ref's own
    assert images.width.tolist() == [photos[i]["width"] for i in images.id.tolist()]
    assert images.height.tolist() == [photos[i]["height"] for i in images.id.tolist()]
    assert found.category_id.tolist() == [1, 18, 44]
    assert list(found.category_name) == ["person", "dog", "bottle"]
    assert len(refs.ref_id) == len(files.refs) == 10
    for row, ref in enumerate(files.refs):
        assert (refs.ref_id[row], refs.ann_id[row]) == (ref["ref_id"], ref["ann_id"])
        assert images.id[refs.image[row]] == ref["image_id"]
        assert found.category_id[refs.category[row]] == its_annotations[ref["ann_id"]]["category_id"]
        mine = slice(refs.sentence_begin[row], refs.sentence_begin[row] + refs.sentence_count[row])
        assert sentences.text[mine] == [sentence["sent"] for sentence in ref["sentences"]]
        assert sentences.raw[mine] == [sentence["raw"] for sentence in ref["sentences"]]
        assert sentences.sent_id[mine].tolist() == ref["sent_ids"]
        assert set(sentences.ref[mine].tolist()) == {row}
    assert refs.empty.tolist() == [0] * 10
    assert list(refs.source) == [""] * 10
    assert refs.distractors.tolist() == [-1] * 10
    for table, dtypes in ((images, "i8 i4 i4 i8 i4"), (refs, "i8 i8 i4 i4 i8 i4 i8 i4 u1 i1 i4"), (sentences, "i8 i4")):
        arrays = [column for column in vars(table).values() if isinstance(column, np.ndarray)]
        assert [array.dtype for array in arrays] == [np.dtype(dtype) for dtype in dtypes.split()]


def test_categories_of_a_photo_are_those_of_all_its_annotations(tmp_path: Path) -> None:
    def edit(refs: list[Any], instances: dict[str, list[Any]]) -> None:
        instances["annotations"][-1]["category_id"] = 777  # the last ref's: not among the categories
        instances["images"].append({"id": 5, "width": 9, "height": 9, "file_name": "no-ref.jpg"})
        instances["annotations"].append({"id": 1, "image_id": 5, "category_id": 18})  # needs no mask

    files = write_refer(tmp_path, edit=edit)
    found = read(files)
    assert 5 not in found.images.id
    for row, image_id in enumerate(found.images.id.tolist()):
        begin, count = found.images.category_begin[row], found.images.category_count[row]
        mine = found.category_id[found.image_categories[begin : begin + count]].tolist()
        of_all = {a["category_id"] for a in files.instances["annotations"] if a["image_id"] == image_id}
        assert mine == sorted(of_all - {777})
        assert 44 in mine  # the crowd
    assert found.refs.category[-1] == -1


def test_a_recorded_number_of_distractors_is_kept(tmp_path: Path) -> None:
    files = write_refer(tmp_path, edit=lambda refs, _: refs[3].update(distractors=4))
    assert read(files).refs.distractors.tolist() == [-1, -1, -1, 4] + [-1] * 8


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", [0]),
        ("val", [1]),
        ("testA", [2, 4]),
        ("testB", [3, 4]),
        ("testAB", [4]),
        ("test", [2, 3, 4, 5]),
    ],
)
def test_splits_are_matched_as_refer_does(tmp_path: Path, split: str, rows: list[int]) -> None:
    def edit(refs: list[Any], _: object) -> None:
        for ref, name in zip(refs, ("train", "val", "testA", "testB", "testAB", "test"), strict=True):
            ref["split"] = name

    files = write_refer(tmp_path, photos=3, edit=edit)
    found = read(files, split=split)
    assert found.refs.ref_id.tolist() == [files.refs[row]["ref_id"] for row in rows]
    assert sorted(set(found.images.id.tolist())) == sorted({files.refs[row]["image_id"] for row in rows})


def test_other_data_sets_and_splitters_are_found(tmp_path: Path) -> None:
    files = write_refer(tmp_path, dataset="refcocog", split_by="umd", split="val")
    assert len(read(files, dataset="refcocog", split_by="umd", split="val").refs.ref_id) == 12


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # pycocotools' decode
@pytest.mark.parametrize("form", ["polygons", "list", "compressed"])
def test_masks_equal_those_of_pycocotools(tmp_path: Path, form: str) -> None:
    random = np.random.default_rng(3)
    expected: list[np.ndarray] = []

    def edit(refs: list[Any], instances: dict[str, list[Any]]) -> None:
        sizes = {photo["id"]: (photo["height"], photo["width"]) for photo in instances["images"]}
        for annotation in instances["annotations"]:
            if annotation["iscrowd"]:
                continue
            height, width = sizes[annotation["image_id"]]
            polygons = [
                (random.uniform(-0.1, 1.1, (random.integers(3, 9), 2)) * (width, height)).ravel().tolist()
                for _ in range(random.integers(1, 5))
            ]
            parts = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width))
            union = parts.max(axis=2)  # refer.py adds the parts up, which makes 2 where they overlap
            expected.append(union)
            compressed = coco_mask.encode(np.asfortranarray(union))
            if form == "polygons":
                annotation["segmentation"] = [*polygons, [3.0, 4.0, 9.0, 9.0], []]  # fewer than three points: no pixel
            elif form == "compressed":
                annotation["segmentation"] = compressed | {"counts": compressed["counts"].decode()}
            else:
                column = np.concatenate(([0], union.T.ravel(), [2]))
                ends = np.flatnonzero(np.diff(column))
                annotation["segmentation"] = {"size": [height, width], "counts": np.diff(ends, prepend=0).tolist()}

    found = read(write_refer(tmp_path, photos=20, edit=edit))
    assert found.rle_counts.dtype == np.uint32
    assert len(expected) == 40
    assert any(mask.any() for mask in expected)
    for row, mask in enumerate(expected):
        np.testing.assert_array_equal(stored_mask(found, row), mask)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=3),
    st.lists(st.integers(0, 500), max_size=60),
)
def test_compressed_run_lengths_are_decoded_exactly(large: list[int], small: list[int]) -> None:
    counts = [*large, *small]
    compressed = coco_mask.frPyObjects({"size": [10, 10], "counts": counts}, 10, 10)["counts"]
    assert decode_counts(compressed).tolist() == counts


@given(st.binary(min_size=1, max_size=40))
def test_any_bytes_for_run_lengths_are_decoded_or_refused(data: bytes) -> None:
    try:
        counts = run_lengths({"size": [4, 5], "counts": data}, width=5, height=4)
    except ValueError:
        return
    assert counts.sum() == 20


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "neither a list of polygons nor run lengths"),
        ("abc", "neither a list of polygons nor run lengths"),
        (None, "neither a list of polygons nor run lengths"),
        ([[]], "none of its polygons has three points"),
        ([[1, 2, 3, 4]], "none of its polygons has three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "not a flat list of x and y"),
        ([[[1, 2], [3, 4], [5, 6]]], "not a flat list of x and y"),
        ([["1", "2", "3", "4", "5", "6"]], "not a flat list of x and y"),
        ([[1, 2, 3, 4, 5, None]], "not a flat list of x and y"),
        ([1, 2, 3, 4, 5, 6], "not a flat list of x and y"),
        ([[1, 2, 3, 4, 5, 10**30]], "not a flat list of x and y"),
        ([[1, 2, 3, 4, 5, 1e9]], "reaches more than a photo's size beyond"),
        ([[1, 2, 3, 4, 5, float("nan")]], "reaches more than a photo's size beyond"),
        ([[1, 2, 3, 4, 5, float("inf")]], "reaches more than a photo's size beyond"),
        ([[0, 0, 30, 20] * 200_000], "outline is longer than"),
        ({"size": [30, 20], "counts": [600]}, "not for the photo's 30x20 pixels"),
        ({"counts": [600]}, "not for the photo's 30x20 pixels"),
        ({"size": [20, 30]}, "not a list of whole numbers"),
        ({"size": [20, 30], "counts": [599]}, "do not add up to the photo's 600 pixels"),
        ({"size": [20, 30], "counts": []}, "not a list of whole numbers"),
        ({"size": [20, 30], "counts": ""}, "do not add up"),
        ({"size": [20, 30], "counts": [700, -100]}, "not a list of whole numbers"),
        ({"size": [20, 30], "counts": [2**63 - 1, 601]}, "not a list of whole numbers"),
        ({"size": [20, 30], "counts": [1.5, 598.5]}, "not a list of whole numbers"),
        ({"size": [20, 30], "counts": "\x7f"}, "damaged"),
        ({"size": [20, 30], "counts": "größer"}, "damaged"),
        ({"size": [20, 30], "counts": "oooooooooo0"}, "damaged"),
        ({"size": [20, 30], "counts": "P"}, "damaged"),
    ],
)
def test_masks_that_cannot_be_are_refused(tmp_path: Path, segmentation: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run_lengths(segmentation, width=30, height=20)


# --- mistakes --------------------------------------------------------------------------------------------------------


def first_ref(**values: Any) -> Any:
    return lambda refs, _: refs[0].update(values)


def first_sentence(**values: Any) -> Any:
    return lambda refs, _: refs[0]["sentences"][0].update(values)


def first_photo(**values: Any) -> Any:
    return lambda _, instances: instances["images"][0].update(values)


def its_annotation(**values: Any) -> Any:
    return lambda _, instances: instances["annotations"][1].update(values)


def drop(of: str, key: str) -> Any:
    def edit(refs: list[Any], instances: dict[str, list[Any]]) -> None:
        tables = {"ref": refs, "sentence": refs[0]["sentences"], **instances}
        del tables[of][1 if of == "annotations" else 0][key]

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda refs, _: refs[0].update(ann_id=5), r"ref 70 of .*refs\(unc\)\.p names annotation 5, which .* lacks"),
        (lambda refs, _: refs[0].update(image_id=5), r"ref 70 of .* names photo 5, which .*instances\.json lacks"),
        (its_annotation(image_id=1), r"ref 70 of .* is about photo \d+, but annotation 300 of .* about 1\."),
        (first_ref(sentences=[]), "ref 70 of .* has no sentence"),
        (first_sentence(sent=""), "sentence 500 of ref 70 of .* is empty"),
        (first_sentence(sent=" \t\u3000"), "sentence 500 of ref 70 of .* is empty"),
        (first_sentence(sent=b"cat"), "'sent' of sentence 500 of ref 70 of .* is a bytes, not a str"),
        (first_sentence(sent="a\0b"), "'sent' of .* holds a null character"),
        (first_sentence(raw=7), "'raw' of sentence 500 of ref 70 of .* is a int, not a str"),
        (first_ref(ann_id=[3, 4]), "'ann_id' of ref 70 of .* is a list, not a int"),
        (first_ref(ref_id=True), "'ref_id' of a ref of .* is a bool, not a int"),
        (first_ref(ref_id=2**63), "'ref_id' of a ref of .* does not fit 64 bits"),
        (first_ref(ref_id=72), "has ref 72 twice"),
        (first_ref(distractors=-2), "'distractors' of ref 70 of .* is not a number of objects"),
        (lambda refs, _: refs.__setitem__(0, 7), "ref number 0 of .* is a int, not a record"),
        (lambda refs, _: refs[0].update(sentences=["cat"]), "a sentence of ref 70 of .* is a str, not a record"),
        (lambda _, instances: instances["images"].append(instances["images"][0]), r"describes photo \d+ twice"),
        (lambda _, i: i["annotations"].append(i["annotations"][0]), r"describes annotation \d+ twice"),
        (first_photo(width=0), r"photo \d+ of .* is 0x\d+ pixels; a side has 1 to 65535"),
        (first_photo(height=70_000), "a side has 1 to 65535"),
        (first_photo(width=640.0), "'width' of photo .* is a float, not a int"),
        (first_photo(file_name="\ud800.jpg"), "half a surrogate pair"),
        (its_annotation(segmentation=[]), "The mask of annotation 300 of .* cannot be used: it is neither"),
        (its_annotation(segmentation={"size": [1, 1], "counts": [1]}), "mask of annotation 300 .* not for the photo's"),
        (drop("ref", "split"), "ref number 0 of .* has no 'split'"),
        (drop("ref", "sentences"), "ref 70 of .* has no 'sentences'"),
        (drop("sentence", "sent_id"), "a sentence of ref 70 of .* has no 'sent_id'"),
        (drop("sentence", "sent"), "sentence 500 of ref 70 of .* has no 'sent'"),
        (drop("images", "file_name"), r"photo \d+ of .* has no 'file_name'"),
        (drop("annotations", "segmentation"), "annotation 300 of .* has no 'segmentation'"),
        (drop("annotations", "category_id"), "annotation 300 of .* has no 'category_id'"),
        (drop("annotations", "id"), "annotation number 1 of .* has no 'id'"),
        (lambda _, instances: instances.pop("categories"), r"instances\.json has no 'categories'"),
        (lambda _, instances: instances.update(images={}), "'images' of .* is a dict, not a list"),
    ],
)
def test_records_that_do_not_fit_are_told_in_one_sentence(tmp_path: Path, edit: Any, reason: str) -> None:
    files = write_refer(tmp_path, edit=edit)
    with pytest.raises(AnnotationError, match=reason) as caught:
        read(files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "..\\a.jpg", "\\a.jpg", "C:a.jpg", "", ".", "//a/b", "a/", "a\nb.jpg"],
)
def test_file_names_that_leave_the_folder_of_photos_are_refused(tmp_path: Path, name: str) -> None:
    files = write_refer(tmp_path, edit=first_photo(file_name=name))
    with pytest.raises(
        AnnotationError, match=r"photo \d+ of .* has the file name .* which leaves the folder of photos"
    ):
        read(files)


@pytest.mark.parametrize("name", ["a.jpg", "train2014/a b.jpg", "größe..jpg", "...jpg"])
def test_file_names_within_it_are_taken(tmp_path: Path, name: str) -> None:
    assert name in read(write_refer(tmp_path, edit=first_photo(file_name=name))).images.file_name


@pytest.mark.parametrize("name", ["./sub/a.jpg", "sub//a.jpg", "sub\\a.jpg"])
def test_file_names_are_brought_into_one_form(tmp_path: Path, name: str) -> None:
    files = write_refer(tmp_path, edit=first_photo(file_name=name))
    assert "sub/a.jpg" in read(files).images.file_name
    assert len(read(files, leave_out=[name]).images.id) == len(read(files, leave_out=["sub/a.jpg"]).images.id) == 5


def test_missing_choices_are_told_with_those_there(tmp_path: Path) -> None:
    files = write_refer(tmp_path)
    with pytest.raises(AnnotationError, match=r"refcoco\+ does not exist; data sets in .*: refcoco\. .*--dataset"):
        read(files, dataset="refcoco+")
    with pytest.raises(AnnotationError, match=r"refs\(umd\)\.p does not exist; .*: refs\(unc\)\.p\. .*--split-by"):
        read(files, split_by="umd")
    with pytest.raises(AnnotationError, match=r"has no split 'val'; it has train \(12 refs\)\. .*--split"):
        read(files, split="val")
    (files.root / "refcoco" / "instances.json").unlink()
    with pytest.raises(AnnotationError, match=r"instances\.json cannot be read: No such file"):
        read(files)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"images": [1e', "\xff", '{"a": ' + "9" * 5000 + "}", "[]"])
def test_malformed_json_is_told(tmp_path: Path, text: str) -> None:
    files = write_refer(tmp_path)
    (files.root / "refcoco" / "instances.json").write_bytes(text.encode("latin1"))
    with pytest.raises(AnnotationError, match=r"instances\.json is (not valid JSON|a list, not a record)"):
        read(files)


def test_endless_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "MAX_FILE_BYTES", 100)
    with pytest.raises(AnnotationError, match="bytes, more than the limit of 100"):
        read(write_refer(tmp_path))


# --- pickles ---------------------------------------------------------------------------------------------------------

SOURCE = Path("refs(unc).p")
builtin_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


@pytest.mark.fuzz
@given(builtin_values, st.sets(st.integers()), st.integers(0, 5))
@settings(max_examples=examples(200))
def test_builtin_values_come_back_from_every_protocol(value: Any, numbers: set[int], protocol: int) -> None:
    value = [value, numbers, frozenset(numbers)]
    found = unpickle_builtins(pickle.dumps(value, protocol), SOURCE)
    assert found == value
    assert repr(found[0]) == repr(value[0])  # types too: 1 == True


def test_strings_of_python_2_are_utf8_or_else_latin1() -> None:
    data = b"\x80\x02]q\x00(U\x06gr\xc3\xb6\xc3\x9fU\x04gr\xf6\xdfX\x06\x00\x00\x00gr\xc3\xb6\xc3\x9fI5\nI01\nL7L\ne."
    assert unpickle_builtins(data, SOURCE) == ["größ", "größ", "größ", 5, True, 7]
    assert unpickle_builtins(b"S'gr\\xc3\\xb6\\xc3\\x9f'\n.", SOURCE) == "größ"
    assert unpickle_builtins(b"S'gr\\xf6\\xdf'\n.", SOURCE) == "größ"


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(os.system, "touch hacked"), "posix.system"),
        (Calls(eval, "open('hacked', 'w')"), "eval"),
        (Calls(getattr, "", "join"), "getattr"),
        (Calls(bytearray, 10), "bytearray"),
        (SOURCE, "pathlib"),
        (1j, "complex"),
        (np.arange(3), "numpy"),
        (range(3), "range"),
        (Calls, "Calls"),
        (builtins.print, "print"),
    ],
)
def test_pickles_that_want_more_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    files = write_refer(tmp_path, protocol=protocol, edit=first_ref(category_id=value))
    with pytest.raises(AnnotationError, match=rf"refs\(unc\)\.p wants to use '.*{name}.*', which no annotation file"):
        read(files)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\nset\n(ltR}b.",  # BUILD on a harmless object
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
        b"cbuiltins\nbytes\n(I99999999999\ntR.",
        b"cbuiltins\nset\n(I1\ntR.",
        b"Pid\n.",
        b"]Q.",
        b"\x82\x01.",
        b"\x80\x09].",
        b"]]}u.",
        b"a.",
        b"0.",
        b"",
        b"\x80\x02]",
        b"hello",
        b"h\x05.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ],
)
def test_malformed_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p is not a pickle, or is damaged or truncated"):
        unpickle_builtins(data, SOURCE)


@pytest.mark.parametrize(
    "data",
    [
        b"]r" + struct.pack("<I", 2**31) + b".",  # a memo index
        b"]p2147483648\n.",
        b"\x8e" + struct.pack("<Q", 2**33) + b"abc.",  # bytes of 8 GiB
        b"\x8d" + struct.pack("<Q", 2**33) + b"abc.",
        b"\x96" + struct.pack("<Q", 2**33) + b"abc.",
        b"\x95" + struct.pack("<Q", 2**33) + b"abc.",
    ],
)
def test_a_small_pickle_takes_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        unpickle_builtins(data, SOURCE)
    except AnnotationError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_pickle_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    for protocol in range(6):
        files = write_refer(tmp_path / str(protocol), photos=2, protocol=protocol)
        path = files.root / "refcoco" / "refs(unc).p"
        whole = path.read_bytes()
        for length in range(0, len(whole), 13):
            path.write_bytes(whole[:length])
            with pytest.raises(AnnotationError, match="is not a pickle, or is damaged or truncated"):
                read(files)


@pytest.mark.fuzz
@given(st.binary(max_size=60))
@settings(max_examples=examples(500))
def test_any_bytes_are_a_pickle_or_refused(data: bytes) -> None:
    try:
        unpickle_builtins(data, SOURCE)
    except AnnotationError:
        pass
