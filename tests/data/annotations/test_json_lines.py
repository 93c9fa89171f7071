"""One's own data as JSON lines ▸ columns, against pycocotools, and the reader against the JSON Schema."""

import json
import os
import re
from collections.abc import Sequence
from importlib.resources import files as resources
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import _untrusted, read_annotations
from nemo_dali.data.annotations._untrusted import photo_name
from nemo_dali.data.annotations.json_lines import KEYS, read_json_lines
from nemo_dali.data.columns import Annotations, is_inside
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import AnnotationError, PhotoError
from tests.helpers.bounds import fuzz, mutate_bytes, outcome
from tests.helpers.counts import examples
from tests.helpers.refer import stored_mask

SCHEMA = json.loads((resources("nemo_dali") / "json_lines.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
WIDTH, HEIGHT = 40, 30
POLYGONS = [[3.0, 4, 20, 6, 12, 25], [10, 10, 30, 12, 18, 28]]
RLE = {"size": [HEIGHT, WIDTH], "counts": [100, 50, 200, 30, WIDTH * HEIGHT - 380]}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name, size in (("a.jpg", (WIDTH, HEIGHT)), ("sub/b.png", (WIDTH, HEIGHT)), ("c.jpg", (50, 20))):
        Image.new("RGB", size, "teal").save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def line(**values: Any) -> dict[str, Any]:
    """A line with a mask; a value of None takes the key away."""
    record = {"photo": "a.jpg", "expressions": ["red cup"], "mask": POLYGONS} | values
    return {key: value for key, value in record.items() if value is not None}


def read(photos: Path, *records: Any, split: str = "train") -> Annotations:
    path = photos.parent / "mine.jsonl"
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return read_json_lines(path, images=photos, split=split)


def test_columns_hold_what_the_lines_hold(photos: Path) -> None:
    found = read(
        photos,
        line(photo="sub/b.png", expressions=["cup", "größte Tasse"], category="cup", photo_categories=["dog", "cup"]),
        line(split="val", expressions=["one", "two"], category="zebra"),
        "",
        line(mask=None, no_target=True, source="made up", distractors=0),
        line(distractors=3, ann_id=77, expressions=["last"], photo_categories=["ant"], no_target=False),
    )
    assert found.name == "mine-train"
    assert found.images.id.tolist() == [1, 2] and list(found.images.file_name) == ["sub/b.png", "a.jpg"]
    assert found.images.width.tolist() == [WIDTH] * 2 and found.images.height.tolist() == [HEIGHT] * 2
    assert found.refs.ref_id.tolist() == [1, 3, 4]  # line 2 is of another split, but counts
    assert found.refs.ann_id.tolist() == [-1, -1, 77]
    assert found.refs.no_target.tolist() == [-1, 1, 0]
    assert found.refs.distractors.tolist() == [-1, 0, 3]
    assert found.refs.empty.tolist() == [0, 1, 0] and found.refs.rle_count[1] == 0
    assert list(found.refs.source) == ["", "made up", ""]
    assert found.sentences.sent_id.tolist() == [1, 2, 5, 6]
    assert list(found.sentences.text) == ["cup", "größte Tasse", "red cup", "last"]
    assert list(found.category_name) == ["ant", "cup", "dog", "zebra"] and found.category_id.tolist() == [1, 2, 3, 4]
    assert found.refs.category.tolist() == [1, -1, -1]
    assert found.image_categories.tolist() == [1, 2, 0] and found.images.category_count.tolist() == [2, 1]


def test_given_ids_are_kept(photos: Path) -> None:
    found = read(
        photos,
        line(ref_id=9, image_id=70),
        line(ref_id=3, image_id=50, photo="sub/b.png"),
        line(ref_id=-4, image_id=70),
    )
    assert found.refs.ref_id.tolist() == [9, 3, -4]
    assert found.images.id.tolist() == [50, 70] and found.refs.image.tolist() == [1, 0, 1]


def decoded(segmentation: Any) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects(segmentation, HEIGHT, WIDTH))


COMPRESSED = coco_mask.frPyObjects(RLE, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mask": POLYGONS}, decoded(POLYGONS).max(axis=2)),
        ({"mask": RLE}, decoded(RLE)),
        ({"mask": COMPRESSED | {"counts": COMPRESSED["counts"].decode()}}, decoded(RLE)),
        ({"mask": [RLE, {"size": [HEIGHT, WIDTH], "counts": [0, 60, 1140]}]}, None),
        ({"mask": None, "box": [2.5, 3, 10.25, 7]}, decoded(np.array([[2.5, 3, 10.25, 7]])).max(axis=2)),
        ({"mask": None, "box": [-3, 20, 60, 30]}, None),
    ],
)
def test_masks_of_every_form(photos: Path, values: dict[str, Any], expected: np.ndarray | None) -> None:
    if expected is None:
        expected = decoded(RLE)
        if "box" in values:
            expected[:] = 0
            expected[20:] = 1
        else:
            expected[:, :2] = 1
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(stored_mask(read(photos, line(**values)), 0), expected)


# Of a photo of 40 x 30: the same two objects in every format.
BOXES = {
    "xywh": [[4, 3, 20, 12], [16, 6, 20, 21]],
    "xyxy": [[4, 3, 24, 15], [16, 6, 36, 27]],
    "rel_xywh": [[0.1, 0.1, 0.5, 0.4], [0.4, 0.2, 0.5, 0.7]],
    "rel_xyxy": [[0.1, 0.1, 0.6, 0.5], [0.4, 0.2, 0.9, 0.9]],
}


def boxed(box: list[float], **values: Any) -> dict[str, Any]:
    return line(mask=None, box=box, **values)


def read_boxes(
    photos: Path, boxes: Sequence[list[float]], box_format: str | None = None, *, of_lines: str | None = None
) -> Annotations:
    """A file of boxes, each in a photo of 40 x 30; their format as an argument, or on the lines."""
    path = photos.parent / "boxes.jsonl"
    path.write_text("".join(json.dumps(boxed(box, box_format=of_lines)) + "\n" for box in boxes))
    return read_json_lines(path, images=photos, box_format=box_format)


@pytest.mark.parametrize("box_format", BOXES)
def test_boxes_of_every_format_make_the_same_masks(photos: Path, box_format: str) -> None:
    expected = read_boxes(photos, BOXES["xywh"])
    assert expected.box_format == "xywh"
    for found in (
        read_boxes(photos, BOXES[box_format], box_format=box_format),
        read_boxes(photos, BOXES[box_format], of_lines=box_format),
    ):
        assert found.box_format == box_format
        for ref in range(2):
            np.testing.assert_array_equal(stored_mask(found, ref), stored_mask(expected, ref))


def test_the_command_takes_a_box_format_and_the_file_records_it(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photos.parent / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, [*map(boxed, BOXES["xyxy"]), line()])))
    words = ["index", path, "--images", photos, "-o", photos.parent / "a.ris.h5"]
    assert main([str(word) for word in words]) == 1
    assert "--box-format xyxy (or xywh, if they are right)" in capsys.readouterr().err
    assert main([str(word) for word in [*words, "--box-format", "xyxy"]]) == 0
    dataset = Dataset.open(photos.parent / "a.ris.h5")
    assert dataset.box_format == "xyxy" and dataset.mask(0)[3:15, 4:24].all() and dataset.mask(0).sum() == 12 * 20
    capsys.readouterr()
    assert main(["inspect", str(dataset.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["box_format"] == "xyxy"
    with pytest.raises(
        ValueError, match=r"box_format \(xyxy\) must be left out with photos, which is not a \.jsonl file"
    ):
        read_annotations(photos, images=photos, box_format="xyxy")
    with pytest.raises(ValueError, match=r"box_format \('cxcywh'\) must be one of"):
        read_boxes(photos, BOXES["xywh"], box_format="cxcywh")


OTHERS = [[0, 0, 12, 9], [1, 2, 30, 12], [2, 0, 38, 25]]  # fit both ways
FAR = [30, 20, 4, 4]  # fits as xywh alone


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        (BOXES["xyxy"], r"1 of 2 boxes extend beyond their photo as .*, the first in line 2 of .* --box-format xyxy "),
        ([*OTHERS, [16, 6, 36, 27]], r"1 of 4 boxes extend beyond .*, the first in line 4 of "),
        ([*BOXES["xyxy"] * 60, FAR], "60 of 121 boxes extend beyond"),  # one slip
        (BOXES["rel_xywh"], r"2 of 2 boxes have no value above 1, .* line 1 of .* --box-format rel_xywh or rel_xyxy "),
        ([*BOXES["rel_xywh"], [0.5, 0.5, 0.3, 0.2]], r"3 of 3 boxes .* --box-format rel_xywh \(or xywh"),
        ([*BOXES["rel_xyxy"], [0.4, 0.4, 1.002, 0.7]], r"3 of 3 boxes .* --box-format rel_xyxy \(or xywh"),
        ([[10, 2, 3, 4], *BOXES["rel_xyxy"]], r"2 of 3 boxes have no value above 1, .* the first in line 2 of"),
    ],
)
def test_boxes_that_look_otherwise_are_refused_where_nothing_states_a_format(
    photos: Path, boxes: list[list[float]], reason: str
) -> None:
    with pytest.raises(AnnotationError, match=reason) as caught:
        read_boxes(photos, boxes)
    assert str(caught.value).count("\n") == 0 and "'box_format' on every line" in str(caught.value)


@pytest.mark.parametrize(("name", "stated"), [("xyxy", "xywh"), ("rel_xyxy", "xywh"), ("rel_xyxy", "rel_xywh")])
def test_a_format_that_is_stated_is_taken_with_a_warning(
    photos: Path, name: str, stated: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_boxes(photos, BOXES[name], of_lines=stated).box_format == stated
    assert "of 2 boxes " in caplog.text and f"They are read as {stated}, as stated" in caplog.text
    caplog.clear()
    read_boxes(photos, BOXES[stated], of_lines=stated)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "boxes",
    [
        OTHERS,
        [[0, 0, 40, 30]],
        [[0, 0, 42, 32], [-2, -2, 41, 20]],  # a pixel or two outside
        [[-3, 20, 60, 30], [16, 6, 36, 27]],  # the first fits neither way
        [[30, 20, 14, 4], FAR],  # one outside; as corners none is right
        [*[FAR, [2, 3, 10, 12]] * 10, [0, 0, 1, 1]],  # a single small one
        [*OTHERS * 10, [16, 6, 36, 27]],  # one slip
    ],
)
def test_boxes_that_may_be_right_are_taken_without_a_word(
    photos: Path, boxes: list[list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    assert read_boxes(photos, boxes).box_format == "xywh"
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("records", "option", "reason"),
    [
        ([boxed(FAR, box_format="xywh"), boxed(FAR)], None, "line 2 of .* has no 'box_format', but line 1 of .* has"),
        ([boxed(FAR), line(), boxed(FAR, box_format="xywh")], None, "line 1 of .* has no 'box_format', but line 3"),
        (
            [boxed(FAR, box_format="xywh"), boxed(FAR, box_format="xyxy")],
            None,
            "line 2 of .* has the 'box_format' xyxy, but line 1 of .* says xywh",
        ),
        (
            [boxed(FAR, box_format="xywh")],
            "xyxy",
            "line 1 of .* the 'box_format' xywh, but the option --box-format say",
        ),
        (
            [boxed(FAR, split="val", box_format="yxyx")],
            None,
            "'box_format' of line 1 of .* is none of xywh, xyxy, rel_",
        ),
        (
            [boxed([30, 20, 14, 24])],
            "xyxy",
            "line 1 of .* second corner is not to the right of the first and below it, as xyxy",
        ),
        ([boxed([0.5, 0.5, 30, 0.4])], "rel_xywh", "line 1 of .* values far above 1, but is said to be rel_xywh"),
    ],
)
def test_box_formats_that_contradict(photos: Path, records: list[Any], option: str | None, reason: str) -> None:
    path = photos.parent / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(AnnotationError, match=reason):
        read_json_lines(path, images=photos, box_format=option)


def test_a_file_without_boxes_records_no_format(photos: Path) -> None:
    assert read(photos, line(box_format="xyxy"), line()).box_format == ""
    assert read(photos, line(), boxed(FAR, split="val")).box_format == ""


def test_sizes_are_read_from_headers_unless_given(photos: Path) -> None:
    found = read(photos, line(photo="c.jpg"), line(photo="d.jpg", width=41, height=31))
    assert found.images.width.tolist() == [50, 41] and found.images.height.tolist() == [20, 31]
    with pytest.raises(PhotoError, match=r"1 of 2 photos cannot be opened in .*photos: d\.jpg \(No such file"):
        read(photos, line(photo="c.jpg"), line(photo="d.jpg"))
    (photos / "e.jpg").write_text("no photo")
    with pytest.raises(PhotoError, match=r"size of e\.jpg cannot be read in .* \(neither JPEG nor PNG\)"):
        read(photos, line(photo="e.jpg"))


def test_the_command_and_the_file_that_it_writes(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(photos, line(), line(mask=None, no_target=True, photo="c.jpg"), line(split="val"))
    words = ["index", photos.parent / "mine.jsonl", "--images", photos, "-o", photos.parent / "a.ris.h5"]
    assert main([str(word) for word in [*words, "--split", "train"]]) == 0
    assert "2 photos, 2 refs, 2 sentences" in capsys.readouterr().out
    dataset = Dataset.open(photos.parent / "a.ris.h5")
    assert dataset.mask(0).any() and not dataset.mask(1).any() and dataset.mask(1).shape == (20, 50)
    assert main(["inspect", str(photos.parent / "a.ris.h5"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["no_target"] == 1
    assert main([str(word) for word in [*words, "--split", "test"]]) == 1
    assert "has no split 'test'; it has train (2 lines), val (1 lines)" in capsys.readouterr().err


def test_empty_expressions_are_skipped_on_request(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = photos.parent / "mine.jsonl"
    lines = [line(expressions=["a", " "]), line(expressions=[""]), line(expressions=["b"], photo="c.jpg")]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    found = read_json_lines(path, images=photos, skip_empty=True)
    assert list(found.sentences.text) == ["a", "b"] and found.refs.ref_id.tolist() == [1, 3]
    assert "2 sentences without text and 1 refs without a sentence were skipped" in caplog.text


# Lines that cannot be used. Those of the first list break the schema, too; of the others it cannot tell.
WRONG = [
    ("7", "line 2 of .* is a int, not a record"),
    ("[]", "line 2 of .* is a list, not a record"),
    (line(photo=None), "line 2 of .*mine.jsonl has no 'photo'"),
    (line(photo=5), "'photo' of line 2 of .* is a int, not a str"),
    (line(photo="../a.jpg"), "line 2 of .* has the file name '../a.jpg', which leaves the folder"),
    (line(expressions=None), "line 2 of .* has no 'expressions'"),
    (line(expressions="red cup"), "'expressions' of line 2 of .* is a str, not a list"),
    (line(expressions=[]), "line 2 of .* has no sentence.* --skip-empty"),
    (line(expressions=["a", " "]), "an expression of line 2 of .* is empty.* --skip-empty"),
    (line(expressions=[5]), "an expression of line 2 of .* is a int, not a str"),
    (line(expressions=["a\0b"]), "an expression of line 2 of .* holds a null character"),
    (line(mask=None), "line 2 of .* has no mask. Give one of 'mask', 'box' and"),
    (line(mask=None, no_target=False), "line 2 of .* has no mask"),
    (line(no_target=True), "line 2 of .* has 'mask' and 'no_target'"),
    (line(box=[1, 2, 3, 4]), "line 2 of .* has 'mask' and 'box'"),
    (line(mask=None, no_target=1), "'no_target' of line 2 of .* is a int, not a bool"),
    (line(sentences=["x"]), r"line 2 of .* has the unknown key 'sentences'\. Known keys are ann_id, box,"),
    (line(width=40), "line 2 of .* has only one of 'width' and 'height'"),
    (line(width=0, height=5), "line 2 of .* is 0x5 pixels; a side has 1 to 65535"),
    (line(width="40", height=30), "'width' of line 2 of .* is a str, not a int"),
    (line(ref_id=2**63), "'ref_id' of line 2 of .* does not fit 64 bits"),
    (line(ann_id="5"), "'ann_id' of line 2 of .* is a str, not a int"),
    (line(distractors=-1), "'distractors' of line 2 of .* is not a number of objects. Fix the line, or leave it out"),
    (line(distractors=2**31), "'distractors' of line 2 of .* is not a number of objects"),
    (line(distractors="2"), "'distractors' of line 2 of .* is a str, not a int"),
    (line(split=1), "'split' of line 2 of .* is a int, not a str"),
    (line(category=["cup"]), "'category' of line 2 of .* is a list, not a str"),
    (line(photo_categories="cup"), "'photo_categories' of line 2 of .* is a str, not a list"),
    (line(photo_categories=[1]), "a value in 'photo_categories' of line 2 of .* is a int, not a str"),
    (line(mask=[]), "The mask of line 2 of .* cannot be used: it is neither a list of polygons nor run lengths"),
    (line(mask=[1, 2, 3, 4, 5, 6]), "The mask of line 2 of .* cannot be used: a polygon is not a flat list"),
    (line(mask=[[1, 2, "3", 4, 5, 6]]), "The mask of line 2 of .* cannot be used: a polygon is not a flat list"),
    (line(mask=[[1, 2, 3, 4, 5, 6], RLE]), "The mask of line 2 of .* cannot be used: it mixes polygons and run"),
    (line(mask={"size": [HEIGHT, WIDTH]}), "The mask of line 2 of .* cannot be used: its run lengths are not a list"),
    (line(mask=None, box=[1, 2, 3]), r"The mask of line 2 of .* cannot be used: the box is not \[x, y, width, height"),
    (line(mask=None, box=[1, 2, 3, "4"]), "The mask of line 2 of .* cannot be used: the box is not"),
    (line(box_format=1), "'box_format' of line 2 of .* is a int, not a str"),
    (line(box_format="cxcywh"), "'box_format' of line 2 of .* is none of xywh, xyxy, rel_xywh, rel_xyxy"),
    (line(mask=None, box=[1, 2, 0, 4]), "The mask of line 2 of .* cannot be used: the box has no width or height"),
]
WRONG_BEYOND_THE_SCHEMA = [
    ("{", r"line 2 of .* is not valid JSON \("),
    ("[" * 50_000, "line 2 of .* is not valid JSON"),
    ('{"a": ' + "9" * 5000 + "}", "line 2 of .* is not valid JSON"),
    (line(expressions=["\ud800"]), "an expression of line 2 of .* holds a null character or half a surrogate pair"),
    (line(width=41, height=30), "line 2 of .* gives its photo a different size than an earlier line"),
    (line(ref_id=5), "line 1 of .* has no 'ref_id', but other lines have. Give all or none"),
    (line(mask=[[1, 2, 3, 4]]), "The mask of line 2 of .* cannot be used: none of its polygons has three points"),
    (line(mask=[[1, 2, 3, 4, 5, 6, 7]]), "The mask of line 2 of .* cannot be used: a polygon is not a flat list"),
    (line(mask={"size": [5, 5], "counts": [25]}), "cannot be used: its run lengths are not for the photo's 40x30"),
    (line(mask={"size": [HEIGHT, WIDTH], "counts": [1200]}), "The mask of line 2 of .* has no pixel. If nothing fits"),
    (line(mask=None, box=[39, 29.9, 5, 0.01]), "The mask of line 2 of .* has no pixel"),
    (line(mask=None, box=[50, 5, 5, 5]), "The mask of line 2 of .* has no pixel"),
    (line(mask=None, box=[0, 0, float("nan"), 5]), "The mask of line 2 of .* cannot be used: the box has no width"),
    (line(mask=None, box=[0, 0, 1e9, 5]), "cannot be used: a polygon reaches more than a photo's size beyond"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "reason"), WRONG + WRONG_BEYOND_THE_SCHEMA)
def test_lines_that_cannot_be_used_are_told_with_their_number(photos: Path, record: Any, reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason) as caught:
        read(photos, line(width=WIDTH, height=HEIGHT), record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record", [record for record, _ in WRONG])
def test_the_schema_refuses_them_too(record: Any) -> None:
    assert not VALIDATOR.is_valid(json.loads(record) if isinstance(record, str) else record)


@pytest.mark.parametrize(
    "record",
    [
        line(),
        line(mask=RLE),
        line(mask=[RLE, RLE]),
        line(mask={"size": [HEIGHT, WIDTH], "counts": "T31"}),
        line(mask=None, box=[1.5, 2, 3, 4], no_target=False),
        line(mask=None, no_target=True),
        line(width=WIDTH, height=HEIGHT, split="val", category="cup", photo_categories=["dog"], source="s"),
        line(ref_id=1, ann_id=2, image_id=3, distractors=2),
        *(boxed(BOXES[name][0], box_format=name) for name in BOXES),
        line(box_format="xyxy"),
    ],
)
def test_schema_and_reader_take_these(photos: Path, record: dict[str, Any]) -> None:
    VALIDATOR.validate(record)
    if record.get("mask") != {"size": [HEIGHT, WIDTH], "counts": "T31"}:
        assert len(read(photos, record, split=record.get("split", "train")).refs.ref_id) == 1


def test_the_schema_is_one_and_knows_the_readers_keys() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]) == KEYS


@given(st.text(alphabet="aC:./\\\n\0ü ", max_size=8))
def test_schema_and_reader_agree_on_file_names(name: str) -> None:
    try:
        inside = is_inside(photo_name({"photo": name}, "photo", "a line"))
    except AnnotationError:
        inside = False
    assert VALIDATOR.is_valid(line(photo=name)) == inside


def test_file_names_are_brought_into_one_form(photos: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(photos / "ab:c.jpg")
    for name in ("sub/b.png", "./sub/b.png", "sub//b.png", "sub\\b.png", ".\\sub/./b.png"):
        found = read(photos, line(photo=name), line(photo="sub/b.png"), line(photo="./ab:c.jpg"))
        assert list(found.images.file_name) == ["sub/b.png", "ab:c.jpg"]
    for name in (
        "/sub/b.png",
        "//sub/b.png",
        "\\sub\\b.png",
        "..\\a.jpg",
        "sub\\..\\..\\a.jpg",
        "C:\\a.jpg",
        "./C:a.jpg",
    ):
        with pytest.raises(AnnotationError, match="leaves the folder"):
            read(photos, line(photo=name))
    for name in ("", ".", "sub/", "sub\\", "sub/."):
        with pytest.raises(AnnotationError, match="names no file"):
            read(photos, line(photo=name))


def test_photos_may_lie_in_several_folders(photos: Path) -> None:
    path = photos.parent / "mine.jsonl"
    path.write_text("".join(json.dumps(line(photo=name)) + "\n" for name in ("b.png", "a.jpg", "c.jpg")))
    folders = [photos, photos / "sub"]
    found = read_annotations(path, images=folders)
    assert found.images.width.tolist() == [WIDTH, WIDTH, 50]
    assert list(found.images.file_name) == ["b.png", "a.jpg", "c.jpg"]
    index_dataset(found, images=folders, output=photos.parent / "a.ris.h5")
    dataset = Dataset.open(photos.parent / "a.ris.h5")
    assert dataset.image_root == str(photos) and list(dataset.images.file_name) == ["sub/b.png", "a.jpg", "c.jpg"]


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ((line(ref_id=1), line(ref_id=1)), "line 2 of .* gives 'ref_id' 1 to a different ref than before"),
        ((line(image_id=1), line(image_id=2)), "line 2 of .* has the 'image_id' 2, but an earlier line of the photo 1"),
        (
            (line(image_id=1), line(image_id=1, photo="c.jpg")),
            "line 2 of .* gives 'image_id' 1 to a different photo than before",
        ),
        ((line(image_id=1), line(image_id=1), line()), "line 3 of .* has no 'image_id', but other lines have"),
        (("", " "), "mine.jsonl has no lines. Write one JSON object per ref"),
    ],
)
def test_ids_that_do_not_fit(photos: Path, records: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason):
        read(photos, *records)


def test_a_mark_of_byte_order_and_windows_lines_are_taken(photos: Path) -> None:
    path = photos.parent / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(line())}\r\n\r\n{json.dumps(line())}\r\n".encode())
    assert len(read_json_lines(path, images=photos).refs.ref_id) == 2
    path.write_bytes(json.dumps(line(expressions=["größer"]), ensure_ascii=False).encode("latin1"))
    with pytest.raises(AnnotationError, match=r"line 1 of .*windows\.jsonl is not valid JSON"):
        read_json_lines(path, images=photos)


def test_a_missing_file_is_told(photos: Path) -> None:
    with pytest.raises(AnnotationError, match=r"nowhere\.jsonl cannot be read: No such file"):
        read_annotations(photos / "nowhere.jsonl", images=photos)


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_hostile_value_is_never_printed(photos: Path, key: str) -> None:
    for value in ("x" * 100_000, ["x" * 100_000], {"x" * 100_000: 1}, "\x1b[31m" * 3000, float("nan"), 10**400):
        try:
            read(photos, line(**{"mask": None if key in ("box", "no_target") else POLYGONS, key: value}))
        except (AnnotationError, PhotoError) as error:
            assert len(str(error)) < 1000 and str(error).isprintable()
        else:
            pytest.fail(f"{key} may not be so long")


# --- hostile files ---------------------------------------------------------------------------------------------------


def test_polygons_in_a_photo_said_to_be_huge_take_no_more_than_their_file_explains(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_untrusted, "FREE_RUNS", 1_000_000)
    huge = line(width=65535, height=65535, mask=[[0, 0, 65535, 65535, 0, 65535]], photo="b.jpg")
    with pytest.raises(AnnotationError, match=r"masks up to line 8 of .* take far more memory"):
        read(photos, *[huge] * 20)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "is not valid JSON"),
        ('{"photo": ' * 100_000, "is not valid JSON"),
        ('{"photo": "a.jpg", "ref_id": ' + "9" * 100_000 + "}", "is not valid JSON"),
        (json.dumps(line(ref_id=10**400)), "does not fit 64 bits"),
        (json.dumps(line(width=1)).replace("1}", "1e999, " + '"height": 5}'), "'width' of line 1 .* is a float"),
        (json.dumps(line(mask=None, box=[0, 0, 5, 5])).replace("5]", "1e999]"), "reaches more than a photo's size"),
        (json.dumps(line(mask=[["x" * 1_000_000] + [1] * 99_999])), "not a flat list of x and y"),
        (json.dumps(line(mask={"size": [30, 40], "counts": ["x" * 1_000_000] + [1] * 100_000})), "whole numbers"),
        (json.dumps(line(mask=[[[]] * 500_000])), "not a flat list of x and y"),
        (json.dumps(line(expressions=["a" * 10_001])), "more than 10,000 characters"),
        (json.dumps(line(split="\x1b[31mred")), r"it has \\x1b\[31mred \(1 lines\)"),
        ("[" + "[]," * 1_000_000 + "[]]", "is a list, not a record"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_lines_are_refused_within_bounds(photos: Path, text: str, reason: str) -> None:
    (photos.parent / "x.jsonl").write_text(text)
    assert re.search(reason, outcome(_read, photos.parent / "x.jsonl", memory=250 << 20))


def test_a_pipe_is_not_waited_for(photos: Path) -> None:
    os.mkfifo(photos.parent / "x.jsonl")
    assert "it is not a regular file" in outcome(_read, photos.parent / "x.jsonl")


def _read(path: Path) -> object:
    return read_json_lines(path, images=path.parent / "photos")


PIECES = [
    *(b"1e999", b"-1", b"NaN", b"Infinity", b"9" * 400, b"9" * 5000, b"true", b"null", b"[", b"{", b"]", b"}", b"[[]]"),
    *(b'"x"', b'"\\ud800"', b'"\\u0000"', b'"../x"', b"\xff", b"\0", b"0.5", b",", b":", b"\n", b'"width":65535, '),
    *(b'"counts": "oooooooo", ', b'"no_target": true, ', b'"box": [0, 0, 1e308, 1e308], ', b'"ref_id": 1, ', b"1,"),
    *(b'"box_format": "rel_xyxy", ', b'"box_format": "xywh", ', b'"box": [-1e308, 0, 1e308, 1], ', b"1e308", b"-1e999"),
]  # fmt: skip


def _mutate(random: Random, seeds: Sequence[bytes]) -> bytes:
    return mutate_bytes(random, seeds, pieces=PIECES)


@pytest.mark.fuzz
def test_any_file_is_read_or_refused(photos: Path) -> None:
    lines = [
        line(width=WIDTH, height=HEIGHT, ref_id=1, ann_id=2, image_id=3),
        line(mask=RLE, category="cup", photo_categories=["dog"], source="s", split="train"),
        line(mask={"size": [HEIGHT, WIDTH], "counts": "T31"}),
        line(mask=None, box=[1.5, 2, 3, 4], no_target=False),
        line(mask=None, no_target=True),
    ]
    seeds = [json.dumps(record).encode() for record in lines]
    seeds.append(b"\n".join(seeds[1:]))
    assert fuzz(_read, seeds, _mutate, photos.parent / "x.jsonl", examples(5000)) > 0
