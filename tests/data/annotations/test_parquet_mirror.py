"""A mirror of RefCOCO as Parquet ▸ the data set that REFER's files of the same content give."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import parquet_mirror as module
from nemo_dali.data.annotations import read_annotations, read_parquet_mirror, read_refer
from nemo_dali.data.columns import Annotations
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import AnnotationError, NemoError
from tests.helpers.refer import ReferFiles, stored_mask, write_refer

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def mirror_rows(files: ReferFiles) -> list[dict[str, Any]]:
    """REFER's records as the mirrors have them, a row a ref; boxes and captions are not read."""
    photos = {photo["id"]: photo for photo in files.instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in files.instances["annotations"]}
    return [
        {
            **{key: ref[key] for key in ("sent_ids", "file_name", "ann_id", "ref_id", "image_id", "split")},
            "sentences": [
                {"raw": s["raw"], "sent": s["sent"], "sent_id": s["sent_id"], "tokens": s["sent"].split()}
                for s in ref["sentences"]
            ],
            "category_id": ref["category_id"],
            "raw_anns": json.dumps(annotations[ref["ann_id"]]),
            "raw_image_info": json.dumps(photos[ref["image_id"]]),
            "raw_sentences": json.dumps(ref["sentences"]),
            "image_path": f"coco/train2014/{photos[ref['image_id']]['file_name']}",
            "bbox": [1.0, 2.0, 3.0, 4.0],
            "captions": ["a caption"],
            "global_image_id": f"coco.{ref['image_id']}",
            "anns_id": f"refcoco.{ref['ann_id']}",
        }
        for ref in files.refs
    ]


def write_mirror(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return path


def spread(refs: list[Any], instances: dict[str, list[Any]]) -> None:
    """Refs of three splits, as a photo's refs have."""
    for ref in refs:
        ref["split"] = ("train", "val", "testA")[ref["image_id"] % 3]


def bare(refs: list[Any], instances: dict[str, list[Any]]) -> None:
    """No more in instances.json than a mirror has: objects that are referred to, and nameless categories."""
    spread(refs, instances)
    named = {ref["ann_id"] for ref in refs}
    instances["annotations"] = [a for a in instances["annotations"] if a["id"] in named]
    there = sorted({a["category_id"] for a in instances["annotations"]})
    instances["categories"] = [{"id": i, "name": f"category {i}"} for i in there]


def assert_same(found: Annotations, expected: Annotations) -> None:
    for table in ("images", "refs", "sentences"):
        for name, column in vars(getattr(expected, table)).items():
            np.testing.assert_array_equal(getattr(getattr(found, table), name), column, err_msg=f"{table}/{name}")


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("split", ["train", "val", "testA"])
def test_a_mirror_gives_what_refers_files_give(tmp_path: Path, split: str, pieces: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "ROWS", 4)
    files = write_refer(tmp_path, photos=12, edit=bare)
    rows = mirror_rows(files)
    for piece in range(pieces):
        some = rows[piece * len(rows) // pieces : (piece + 1) * len(rows) // pieces]
        write_mirror(tmp_path / "mirror" / f"{piece}-of-{pieces}.parquet", some)
    expected = read_refer(files.root, dataset="refcoco", split_by="unc", split=split)
    found = read_parquet_mirror(tmp_path / "mirror", split=split)
    assert_same(found, expected)
    assert found.name == f"mirror-{split}" and found.category_name == expected.category_name
    np.testing.assert_array_equal(found.image_categories, expected.image_categories)
    np.testing.assert_array_equal(found.rle_counts, expected.rle_counts)
    for ref in range(len(found.refs.ref_id)):
        np.testing.assert_array_equal(stored_mask(found, ref), stored_mask(expected, ref))


def test_the_data_set_has_the_same_fingerprint(tmp_path: Path) -> None:
    files = write_refer(tmp_path, photos=9, edit=bare)
    path = write_mirror(tmp_path / "train-00000-of-00001.parquet", mirror_rows(files))
    common = ["--split", "train", "--images", str(files.photos), "-o"]
    assert main(["index", str(path), *common, str(tmp_path / "a.ris.h5")]) == 0
    refer = [str(files.root), "--dataset", "refcoco", "--split-by", "unc"]
    assert main(["index", *refer, *common, str(tmp_path / "b.ris.h5")]) == 0
    assert len({Dataset.open(tmp_path / f"{name}.ris.h5").fingerprint for name in "ab"}) == 1


def test_what_a_mirror_lacks_is_all_that_differs(tmp_path: Path) -> None:
    """Categories' names, and those of objects that nobody refers to."""
    files = write_refer(tmp_path, photos=9, edit=spread)
    path = write_mirror(tmp_path / "a.parquet", mirror_rows(files))
    expected = read_refer(files.root, dataset="refcoco", split_by="unc", split="train")
    found = read_annotations(path, images=files.photos)
    for table in (found, expected):  # the crowds' category, 44, is in instances.json only
        vars(table.images).update(category_begin=0, category_count=0)
    assert_same(found, expected)
    assert (found.category_id.tolist(), found.category_name) == ([1, 18], ["category 1", "category 18"])
    assert found.rle_counts.tolist() == expected.rle_counts.tolist()


def test_photos_can_be_left_out_and_folders_that_are_refers_stay_so(tmp_path: Path) -> None:
    files = write_refer(tmp_path, photos=9)
    write_mirror(files.root / "a.parquet", mirror_rows(files))
    name = files.instances["images"][0]["file_name"]
    left = read_annotations(files.root, images=files.photos, split="train", leave_out=[name])
    assert name not in left.images.file_name and len(left.images.id) == 8
    by_name = read_annotations(files.root, images=files.photos, dataset="refcoco", split_by="unc", split="train")
    assert by_name.name == "refcoco-unc-train"
    with pytest.raises(ValueError, match=r"dataset \(refcoco\) must be left out with a\.parquet"):
        read_annotations(files.root / "a.parquet", images=files.photos, dataset="refcoco", split="train")


def other(key: str, value: Any) -> Any:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[3][key] = value

    return change


def changed(key: str, **values: Any) -> Any:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[3][key] = json.dumps(json.loads(rows[3][key]) | values)

    return change


def dropped(key: str) -> Any:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            del row[key]

    return change


BAD = {
    "no JSON": (other("raw_anns", "{"), "'raw_anns' of row 3 of .* is not a JSON record"),
    "deep": (other("raw_anns", "[" * 100_000), "'raw_anns' of row 3 of .* is not a JSON record"),
    "list": (other("raw_image_info", "[]"), "'raw_image_info' of row 3 of .* is not a JSON record"),
    "null": (other("raw_anns", None), "'raw_anns' of row 3 of .* is not a JSON record"),
    "null id": (other("ann_id", None), "'ann_id' of row 3 .* is a NoneType, not a int"),
    "another id": (changed("raw_anns", id=1), "'raw_anns' of row 3 of .* has a different 'id' than its row"),
    "another photo": (changed("raw_anns", image_id=1), "has a different 'image_id' than its row"),
    "two records": (changed("raw_image_info", width=999), "differs from what another row has for the same id"),
    "leaving": (changed("raw_image_info", file_name="../x.jpg"), "differs|leaves the folder"),
    "no mask": (changed("raw_anns", segmentation=7), "The mask of annotation .* cannot be used"),
    "no sentences": (other("sentences", []), "has no sentence.*--skip-empty"),
    "no column": (dropped("raw_anns"), "has no column raw_anns, so it is not a mirror of RefCOCO"),
    "other split": (lambda rows: [row.update(split="val") for row in rows], r"has no split 'train'; it has val \("),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_is_told(tmp_path: Path, what: str) -> None:
    change, told = BAD[what]
    rows = mirror_rows(write_refer(tmp_path, photos=4))
    change(rows)
    with pytest.raises(NemoError, match=told):
        read_parquet_mirror(write_mirror(tmp_path / "a.parquet", rows), split="train")


def test_what_takes_far_more_than_its_size_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    rows = mirror_rows(write_refer(tmp_path, photos=4))
    rows[0]["raw_anns"] = " " * 10_000_000
    path = write_mirror(tmp_path / "a.parquet", rows)
    monkeypatch.setattr(module, "FREE_BYTES", 1_000_000)
    monkeypatch.setattr(module, "BYTES_PER_BYTE", 2)
    with pytest.raises(AnnotationError, match="takes far more memory than its size explains"):
        read_parquet_mirror(path, split="train")


def test_files_that_are_none_and_a_missing_pyarrow_are_told(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(AnnotationError, match="cannot be read: No such file"):
        read_parquet_mirror(tmp_path / "nowhere.parquet", split="train")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(NemoError, match="cannot be read as Parquet"):
        read_parquet_mirror(tmp_path, split="train")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(NemoError, match=r"pip install 'nemo-dali\[parquet\]'"):
        read_parquet_mirror(tmp_path, split="train")
