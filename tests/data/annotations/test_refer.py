"""gRefCOCO, Ref-ZOM and RefCLEF ▸ columns, against pycocotools and the records that were written."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from nemo_dali.commands.cli import main
from nemo_dali.data.annotations import _untrusted, read_annotations, read_refer
from nemo_dali.data.columns import Annotations
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.data.rle import area, of_pixels, run_lengths, union
from nemo_dali.errors import AnnotationError
from tests.helpers.bounds import fuzz, mutate_bytes
from tests.helpers.counts import examples
from tests.helpers.refer import ReferFiles, stored_mask, write_refer

LAYOUTS = {
    "grefcoco": {"dataset": "grefcoco", "split_by": "unc", "refs_file": "grefs(unc).json"},
    "grefcoco-pickle": {"dataset": "grefcoco", "split_by": "unc", "refs_file": "grefs(unc).p"},
    "ref-zom": {"dataset": "ref-zom", "split_by": "final", "refs_file": "refs(final).p"},
    "ref-zom-as-published": {"dataset": "ref-zom", "split_by": "final", "refs_file": "Ref-ZOM(final).p"},
}


def write(folder: Path, layout: str, edit: Any = None, **options: Any) -> ReferFiles:
    """Files whose refs 0 and 3 have two targets, 1 and 4 none, and the others one."""

    def generalise(refs: list[Any], instances: dict[str, list[Any]]) -> None:
        category = {a["id"]: a["category_id"] for a in instances["annotations"]}
        own = [ref["ann_id"] for ref in refs]
        for number, ref in enumerate(refs):
            pair = own[number // 2 * 2 : number // 2 * 2 + 2]  # of the same photo
            ids = {0: pair, 3: pair[::-1], 1: [], 4: []}.get(number, [own[number]])
            if layout.startswith("grefcoco"):
                ref.update(ann_id=ids or [-1], category_id=[category[i] for i in ids] or [-1])
            else:
                ref["source"] = {0: "zero", 1: "one", 2: "many"}[len(ids)]
                ref["ann_id"] = ids if len(ids) > 1 else own[number]  # 'zero' names one, too
        if edit is not None:
            edit(refs, instances)

    return write_refer(folder, edit=generalise, **LAYOUTS[layout], **options)


def read(files: ReferFiles, layout: str, **options: Any) -> Annotations:
    where = {key: LAYOUTS[layout][key] for key in ("dataset", "split_by")}
    return read_annotations(files.root, images=files.photos, split="train", **where, **options)


def pixels(files: ReferFiles, ann_ids: list[int], image_id: int) -> np.ndarray:
    """What the annotations cover, uint8 [H, W], by pycocotools alone."""
    photo = next(photo for photo in files.instances["images"] if photo["id"] == image_id)
    mask = np.zeros((photo["height"], photo["width"]), np.uint8)
    for annotation in files.instances["annotations"]:
        if annotation["id"] in ann_ids:
            mask |= coco_mask.decode(coco_mask.frPyObjects(annotation["segmentation"], *mask.shape)).max(axis=2)
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_targets_are_united_and_none_has_no_run_lengths(tmp_path: Path, layout: str) -> None:
    files = write(tmp_path, layout)
    found = read(files, layout)
    refs = found.refs
    category = {a["id"]: a["category_id"] for a in files.instances["annotations"]}
    assert found.name == f"{LAYOUTS[layout]['dataset']}-{LAYOUTS[layout]['split_by']}-train"
    assert refs.ref_id.tolist() == [ref["ref_id"] for ref in files.refs]
    assert np.flatnonzero(refs.empty).tolist() == [1, 4]
    assert refs.rle_count[[1, 4]].tolist() == [0, 0]
    assert list(refs.source) == [ref.get("source", "") for ref in files.refs]
    for row, ref in enumerate(files.refs):
        given = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        targets = [] if refs.empty[row] else given
        assert refs.ann_id[row] == (targets[0] if len(targets) == 1 else -1)
        categories = {category[ann_id] for ann_id in targets}
        stored = found.category_id[refs.category[row]] if refs.category[row] >= 0 else -1
        assert stored == (categories.pop() if len(categories) == 1 else -1)
        assert found.images.id[refs.image[row]] == ref["image_id"]
        if targets:
            np.testing.assert_array_equal(stored_mask(found, row), pixels(files, targets, ref["image_id"]))
    overlap = sum(pixels(files, [ann_id], files.refs[0]["image_id"]).astype(int) for ann_id in files.refs[0]["ann_id"])
    assert overlap.max() == 2  # so that a sum would differ from the union


def test_both_kinds_of_category_occur(tmp_path: Path) -> None:
    categories = []
    for seed in range(4):
        refs = read(write(tmp_path / str(seed), "grefcoco", seed=seed), "grefcoco").refs
        categories += refs.category[[0, 3]].tolist()
    assert min(categories) == -1 and max(categories) >= 0


@pytest.mark.parametrize("layout", ["grefcoco", "ref-zom"])
def test_the_file_holds_it_and_a_mask_without_target_is_zero(tmp_path: Path, layout: str) -> None:
    files = write(tmp_path, layout)
    index_dataset(read(files, layout), images=files.photos, output=tmp_path / "a.ris.h5")
    dataset = Dataset.open(tmp_path / "a.ris.h5")
    for row, ref in enumerate(files.refs):
        mask = dataset.mask(row)
        if row in (1, 4):
            photo = next(photo for photo in files.instances["images"] if photo["id"] == ref["image_id"])
            assert mask.shape == (photo["height"], photo["width"]) and not mask.any()
        else:
            np.testing.assert_array_equal(mask, stored_mask(read(files, layout), row))


def test_a_data_set_without_any_target_can_be_written(tmp_path: Path) -> None:
    files = write(tmp_path, "ref-zom", edit=lambda refs, _: [ref.update(source="zero") for ref in refs])
    index_dataset(read(files, "ref-zom"), images=files.photos, output=tmp_path / "a.ris.h5")
    dataset = Dataset.open(tmp_path / "a.ris.h5")
    assert dataset.refs.empty.all() and len(dataset.rle_counts) == 0 and not dataset.mask(0).any()


def test_crowds_are_left_out_of_grefcoco_as_its_reader_does(tmp_path: Path) -> None:
    def edit(refs: list[Any], instances: dict[str, list[Any]]) -> None:
        crowd = next(a for a in instances["annotations"] if a["iscrowd"] and a["image_id"] == refs[0]["image_id"])
        refs[0]["ann_id"][1] = crowd["id"]

    files = write(tmp_path, "grefcoco", edit=edit)
    expected = pixels(files, files.refs[0]["ann_id"][:1], files.refs[0]["image_id"])
    np.testing.assert_array_equal(stored_mask(read(files, "grefcoco"), 0), expected)


def test_a_single_number_of_grefcoco_counts_as_a_list(tmp_path: Path) -> None:
    def edit(refs: list[Any], _: object) -> None:
        refs[2].update(ann_id=refs[2]["ann_id"][0], category_id=refs[2]["category_id"][0])
        refs[4].update(ann_id=-1, category_id=-1)

    plain, single = (read(write(tmp_path / str(i), "grefcoco", e), "grefcoco").refs for i, e in enumerate((None, edit)))
    assert single.ann_id.tolist() == plain.ann_id.tolist() and single.empty.tolist() == plain.empty.tolist()


@pytest.mark.parametrize("layout", ["grefcoco", "ref-zom"])
def test_refs_whose_id_comes_twice_are_all_kept_and_told(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = write(tmp_path, layout, edit=lambda refs, _: refs[5].update(ref_id=refs[2]["ref_id"]))
    with caplog.at_level(logging.WARNING):
        refs = read(files, layout).refs
    assert len(refs.ref_id) == 12 and refs.ref_id[2] == refs.ref_id[5]
    assert "1 ref ids occur more than once" in caplog.text


# --- RefCLEF ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [True, False])
def test_masks_of_refclef_are_lists_of_run_lengths(tmp_path: Path, text: bool) -> None:
    random = np.random.default_rng(5)
    expected: dict[int, np.ndarray] = {}

    def edit(_: object, instances: dict[str, list[Any]]) -> None:
        size = {photo["id"]: (photo["height"], photo["width"]) for photo in instances["images"]}
        for annotation in instances["annotations"]:
            shape = size[annotation["image_id"]]
            parts = [(random.random(shape) < 0.4).astype(np.uint8) for _ in range(random.integers(1, 4))]
            expected[annotation["id"]] = np.maximum.reduce(parts)
            rles = [coco_mask.encode(np.asfortranarray(part)) for part in parts]
            if text:
                rles = [rle | {"counts": rle["counts"].decode()} for rle in rles]
            else:
                rles = [{"size": list(shape), "counts": of_pixels(part > 0).tolist()} for part in parts]
            annotation["segmentation"] = rles

    found = read_refer(
        write_refer(tmp_path, dataset="refclef", split_by="berkeley", edit=edit).root,
        dataset="refclef",
        split_by="berkeley",
        split="train",
    )
    for row, ann_id in enumerate(found.refs.ann_id.tolist()):
        np.testing.assert_array_equal(stored_mask(found, row), expected[ann_id])


@pytest.mark.parametrize("polygons", [True, False])
def test_rrsis_d_is_indexed_by_the_documented_command(tmp_path: Path, polygons: bool) -> None:
    expected: dict[int, np.ndarray] = {}

    def edit(refs: list[Any], instances: dict[str, list[Any]]) -> None:
        sizes = {photo["id"]: (photo["height"], photo["width"]) for photo in instances["images"]}
        for photo in instances["images"]:
            photo["file_name"] = f"{photo['id']:05d}.jpg"
        for annotation in instances["annotations"]:
            if annotation["iscrowd"]:
                continue
            rles = coco_mask.frPyObjects(annotation["segmentation"], *sizes[annotation["image_id"]])
            expected[annotation["id"]] = coco_mask.decode(rles).max(axis=2)
            if not polygons:
                annotation["segmentation"] = [rle | {"counts": rle["counts"].decode()} for rle in rles]
        for number, ref in enumerate(refs):
            ref["split"] = ("train", "train", "val", "test")[number % 4]

    files = write_refer(tmp_path, dataset="rrsisd", photos=8, edit=edit)
    images = files.root / "images" / "rrsisd" / "JPEGImages"
    images.mkdir(parents=True)
    for path in files.photos.iterdir():
        path.rename(images / f"{int(path.stem.rpartition('_')[2]):05d}.jpg")
    for split in ("train", "val", "test"):
        output = tmp_path / f"{split}.ris.h5"
        words = ["index", files.root, "--dataset", "rrsisd", "--split-by", "unc", "--split", split, "--verify"]
        assert main([str(word) for word in [*words, "--images", images, "-o", output]]) == 0
        dataset = Dataset.open(output)
        refs = [ref for ref in files.refs if ref["split"] == split]
        assert dataset.refs.ref_id.tolist() == [ref["ref_id"] for ref in refs]
        for row, ref in enumerate(refs):
            np.testing.assert_array_equal(dataset.mask(row), expected[ref["ann_id"]])


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_run_lengths_of_pixels_and_of_unions(height: int, width: int, data: st.DataObject) -> None:
    flat = st.lists(st.booleans(), min_size=height * width, max_size=height * width)
    masks = [np.array(m).reshape(height, width) for m in data.draw(st.lists(flat, min_size=1, max_size=4))]
    runs = [of_pixels(mask) for mask in masks]
    for mask, counts in zip(masks, runs, strict=True):
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        again = run_lengths({"size": [height, width], "counts": rle["counts"]}, width=width, height=height)
        assert counts.tolist() == again.tolist() and counts.dtype == np.uint32
        assert area(counts) == mask.sum()
    merged = union(runs, width=width, height=height)
    assert merged.tolist() == of_pixels(np.logical_or.reduce(masks)).tolist() and merged.dtype == np.uint32


def test_run_lengths_and_polygons_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="mixes polygons and run lengths"):
        run_lengths([{"size": [2, 2], "counts": [4]}, [0, 0, 1, 0, 1, 1]], width=2, height=2)


def test_photos_left_out_take_their_refs_with_them(tmp_path: Path) -> None:
    files = write_refer(tmp_path, edit=lambda _, i: i["annotations"][1].update(segmentation=[[1, 2]]))
    options: dict[str, Any] = {"dataset": "refcoco", "split_by": "unc", "split": "train"}
    name = files.instances["images"][0]["file_name"]
    with pytest.raises(AnnotationError, match=rf"none of its polygons has three points.*--leave-out {name}\."):
        read_refer(files.root, **options)
    found = read_refer(files.root, leave_out=[name], **options)
    assert found.refs.ref_id.tolist() == [ref["ref_id"] for ref in files.refs[2:]]
    assert name not in found.images.file_name and len(found.images.id) == 5
    with pytest.raises(AnnotationError, match=r"instances\.json has no photo 7\.jpg\. Check --leave-out"):
        read_refer(files.root, leave_out=["7.jpg"], **options)
    with pytest.raises(AnnotationError, match="No ref of the split is left"):
        read_refer(files.root, leave_out=[photo["file_name"] for photo in files.instances["images"]], **options)


# --- mistakes --------------------------------------------------------------------------------------------------------


def ref(number: int, **values: Any) -> Any:
    return lambda refs, _: refs[number].update(values)


def blank(refs: list[Any], instances: dict[str, list[Any]]) -> None:
    sizes = {photo["id"]: (photo["height"], photo["width"]) for photo in instances["images"]}
    for annotation in instances["annotations"]:
        height, width = sizes[annotation["image_id"]]
        annotation["segmentation"] = {"size": [height, width], "counts": [height * width]}


def only_crowds(refs: list[Any], instances: dict[str, list[Any]]) -> None:
    for annotation in instances["annotations"]:
        annotation["iscrowd"] = 1


@pytest.mark.parametrize(
    ("layout", "edit", "reason"),
    [
        ("grefcoco", ref(0, ann_id=[300, -1]), r"'ann_id' of ref 70 of .* mixes -1 \(no target\) with annotations"),
        (
            "grefcoco",
            ref(0, ann_id=[], category_id=[]),
            "'ann_id' of ref 70 of .* is empty; a ref without a target",
        ),
        ("grefcoco", ref(0, category_id=[1]), "ref 70 of .* has 2 values in 'ann_id', but 1 in 'category_id'"),
        ("grefcoco", ref(0, ann_id=[300, "301"]), "a value in 'ann_id' of ref 70 of .* is a str, not a int"),
        ("grefcoco", ref(0, ann_id=[300, True]), "a value in 'ann_id' of ref 70 of .* is a bool, not a int"),
        ("grefcoco", ref(0, ann_id=[300, 2**70]), "a value in 'ann_id' of ref 70 of .* does not fit 64 bits"),
        ("grefcoco", ref(0, ann_id=None, category_id=None), "'ann_id' of ref 70 of .* is a NoneType, not a int"),
        ("grefcoco", ref(0, ann_id=[300, 5]), "ref 70 of .* names annotation 5, which .* lacks"),
        ("grefcoco", ref(0, ann_id=[300, 306]), r"ref 70 of .* is about photo \d+, but annotation 306 of .* about"),
        ("grefcoco", ref(1, image_id=5), "ref 72 of .* names photo 5, which .* lacks"),
        ("grefcoco", ref(1, no_target="yes"), "'no_target' of ref 72 of .* is neither true nor false"),
        ("ref-zom", ref(1, sentences=[]), "ref 72 of .* has no sentence.* --skip-empty"),
        ("grefcoco", blank, "The mask of ref 70 of .* has no pixel, though the ref has a target"),
        ("grefcoco", only_crowds, "ref 70 of .* names only annotations of crowds"),
        ("ref-zom", ref(0, ann_id=[]), "ref 70 of .* names no annotation, but its 'source' is not 'zero'"),
        ("ref-zom", ref(0, ann_id=-1), "ref 70 of .* names no annotation, but its 'source' is not 'zero'"),
        ("ref-zom", ref(0, ann_id=[300, -1]), "ref 70 of .* names no annotation, but its 'source' is not 'zero'"),
        ("ref-zom", ref(0, ann_id="300"), "'ann_id' of ref 70 of .* is a str, not a int"),
        ("ref-zom", ref(0, source=0), "'source' of ref 70 of .* is a int, not a str"),
        ("ref-zom", ref(0, source="a\0"), "'source' of ref 70 of .* holds a null character"),
        ("ref-zom", blank, "The mask of ref 70 of .* has no pixel, though the ref has a target"),
    ],
)
def test_refs_that_do_not_fit_are_told_in_one_sentence(tmp_path: Path, layout: str, edit: Any, reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason) as caught:
        read(write(tmp_path, layout, edit), layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["grefcoco", "grefcoco-pickle"])
def test_refs_of_grefcoco_without_a_sentence_are_skipped_as_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    files = write(tmp_path, layout, ref(2, sentences=[]))
    found = read(files, layout)
    assert found.refs.ref_id.tolist() == [ref["ref_id"] for ref in files.refs if ref["sentences"]]
    assert found.sentences.ref.max() == len(found.refs.ref_id) - 1 == len(files.refs) - 2
    assert "0 sentences without text and 1 refs without a sentence were skipped" in caplog.text


@pytest.mark.parametrize("layout", ["grefcoco", "ref-zom"])
def test_empty_sentences_are_skipped_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str) -> None:
    def edit(refs: list[Any], _: Any) -> None:
        refs[0]["sentences"][0]["sent"] = " "
        for sentence in refs[3]["sentences"]:
            sentence["sent"] = ""

    files = write(tmp_path, layout, edit)
    with pytest.raises(AnnotationError, match=r"sentence \d+ of ref \d+ of .* is empty\. .* --skip-empty\."):
        read(files, layout)
    found = read(files, layout, skip_empty=True)
    texts = [s["sent"] for number, ref in enumerate(files.refs) if number != 3 for s in ref["sentences"]]
    assert list(found.sentences.text) == [text for text in texts if text.strip()]
    empty = 1 + len(files.refs[3]["sentences"])
    assert f"{empty} sentences without text and 1 refs without a sentence were skipped" in caplog.text


def test_the_published_field_no_target_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def edit(refs: list[Any], _: Any) -> None:
        for number, ref in enumerate(refs):
            if number != 2:
                ref["no_target"] = ref["ann_id"] == [-1]

    files = write(tmp_path, "grefcoco", edit)
    found = read(files, "grefcoco")
    expected = found.refs.empty.astype(int)
    expected[2] = -1
    assert found.refs.no_target.tolist() == expected.tolist() and not caplog.text

    def contradict(refs: list[Any], instances: Any) -> None:
        edit(refs, instances)
        refs[0]["no_target"], refs[1]["no_target"] = True, False

    (tmp_path / "other").mkdir()
    found = read(write(tmp_path / "other", "grefcoco", contradict), "grefcoco")
    assert found.refs.no_target.tolist()[:2] == [1, 0] and found.refs.empty.tolist()[:2] == [0, 1]
    assert "'no_target' of 2 refs contradicts the annotations that they name, which take precedence" in caplog.text


@pytest.mark.parametrize("key", ["ref_id", "ann_id", "category_id", "image_id", "split", "sentences", "file_name"])
@pytest.mark.parametrize("value", [["x" * 100_000], [[["x"] * 1000] * 1000], {"x" * 100_000: 1}, "x" * 100_000, 1e300])
def test_a_hostile_value_is_never_printed(tmp_path: Path, key: str, value: Any) -> None:
    files = write(tmp_path, "grefcoco", ref(0, **{key: value}))
    try:
        read(files, "grefcoco")
    except AnnotationError as error:
        assert len(str(error)) < 1000
    else:
        assert key in ("file_name", "split", "category_id")  # not read, or another split's name, or no list


def test_the_names_of_splits_are_cut(tmp_path: Path) -> None:
    files = write(
        tmp_path, "grefcoco", lambda refs, _: [r.update(split=f"{i}" + "x" * 9000) for i, r in enumerate(refs)]
    )
    with pytest.raises(AnnotationError, match=r"has no split 'train'; it has 0xxx.* Choose with --split") as caught:
        read(files, "grefcoco")
    assert len(str(caught.value)) < 1000


def test_two_files_of_refs_are_not_guessed_between(tmp_path: Path) -> None:
    files = write(tmp_path, "grefcoco")
    (files.root / "grefcoco" / "refs(unc).p").write_bytes(b"")
    with pytest.raises(AnnotationError, match=r"has both refs\(unc\)\.p and grefs\(unc\)\.json\. Move"):
        read(files, "grefcoco")


def test_files_of_refs_of_every_kind_are_listed(tmp_path: Path) -> None:
    files = write(tmp_path, "grefcoco")
    with pytest.raises(AnnotationError, match=r"files of refs in .*: grefs\(unc\)\.json\. Choose with --split-by"):
        read_refer(files.root, dataset="grefcoco", split_by="umd", split="train")


def test_arguments_that_do_not_go_with_the_source(tmp_path: Path) -> None:
    files = write(tmp_path, "grefcoco")
    with pytest.raises(ValueError, match=r"split_by \(None\) and split \(train\) must be given with"):
        read_annotations(files.root, images=files.photos, dataset="grefcoco", split="train")
    with pytest.raises(ValueError, match=r"dataset \(refcoco\) must be left out with a\.jsonl"):
        read_annotations(tmp_path / "a.jsonl", images=files.photos, dataset="refcoco")
    with pytest.raises(ValueError, match=r"split \(val\) must be left out with train\.lmdb"):
        read_annotations(tmp_path / "train.lmdb", images=files.photos, split="val")
    with pytest.raises(AnnotationError, match=r"instances\.json is neither a folder, nor a \.jsonl or \.parquet file"):
        read_annotations(files.root / "grefcoco" / "instances.json", images=files.photos)


# --- hostile files ---------------------------------------------------------------------------------------------------


def _read_instances(path: Path) -> object:
    """Read RefCOCO's refs of the folder with the file as instances.json."""
    shutil.copyfile(path, path.parent / "refer" / "refcoco" / "instances.json")
    return read_refer(path.parent / "refer", dataset="refcoco", split_by="unc", split="train")


def _read_refs(path: Path) -> object:
    """Read gRefCOCO's refs from the file."""
    shutil.copyfile(path, path.parent / "refer" / "grefcoco" / "grefs(unc).json")
    return read_refer(path.parent / "refer", dataset="grefcoco", split_by="unc", split="train")


PIECES = [
    *(b"1e999", b"-1", b"NaN", b"Infinity", b"9" * 400, b"9" * 5000, b"true", b"null", b"[", b"{", b"]", b"}", b"[[]]"),
    *(b'"x"', b'"\\ud800"', b'"\\u001b[31m"', b'"../x"', b"\xff", b"\0", b"0.5", b",", b":", b"65535", b"[-1]", b"300"),
    *(b'"counts": "oooooooo", ', b'"segmentation": ', b'"source": "zero", ', b'"iscrowd": 1, ', b'"size": [1, 1], '),
]  # fmt: skip


def _mutate(random: Random, seeds: Sequence[bytes]) -> bytes:
    return mutate_bytes(random, seeds, pieces=PIECES)


@pytest.mark.fuzz
def test_any_instances_are_read_or_refused(tmp_path: Path) -> None:
    files = write_refer(tmp_path, photos=2)
    seed = (files.root / "refcoco" / "instances.json").read_bytes()
    assert fuzz(_read_instances, [seed], _mutate, tmp_path / "x.json", examples(5000)) > 0


@pytest.mark.fuzz
def test_any_refs_are_read_or_refused(tmp_path: Path) -> None:
    files = write(tmp_path, "grefcoco")
    seed = (files.root / "grefcoco" / "grefs(unc).json").read_bytes()
    assert fuzz(_read_refs, [seed], _mutate, tmp_path / "x.json", examples(5000)) > 0


def test_a_mask_named_again_and_again_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_untrusted, "FREE_RUNS", 20_000)

    def times(count: int) -> Any:
        def edit(refs: list[Any], _: Any) -> None:
            refs[0].update({key: refs[0][key] * count for key in ("ann_id", "category_id")})

        return edit

    found = read(write(tmp_path / "once", "grefcoco", times(1)), "grefcoco")
    repeated = read(write(tmp_path / "again", "grefcoco", times(1000)), "grefcoco")
    assert np.array_equal(repeated.rle_counts, found.rle_counts)


def test_a_huge_mask_shared_by_many_refs_takes_no_more_than_its_file_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(refs: list[Any], instances: dict[str, list[Any]]) -> None:
        instances["images"] = [photo | {"width": 65535, "height": 65535} for photo in instances["images"]]
        of_photo = [a for a in instances["annotations"] if a["image_id"] == refs[0]["image_id"] and not a["iscrowd"]]
        of_photo[0]["segmentation"] = [[0, 0, 65535, 65535, 0, 65535]]
        refs[:] = [refs[0] | {"ref_id": number, "ann_id": of_photo[0]["id"]} for number in range(20)]

    monkeypatch.setattr(_untrusted, "FREE_RUNS", 1_000_000)
    files = write_refer(tmp_path, edit=edit)
    with pytest.raises(AnnotationError, match=r"masks up to ref 7 of .* take far more memory"):
        read_refer(files.root, dataset="refcoco", split_by="unc", split="train")
