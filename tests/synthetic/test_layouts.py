"""Generated data in the layouts of gRefCOCO, Ref-ZOM and RefCLEF: keys, sentences, and the whole way to batches."""

import json
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from nemo_dali.commands.cli import main
from nemo_dali.commands.preview import preview
from nemo_dali.data.dataset import Dataset
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.mining.job import mine
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.synthetic import make_photo, synthesize
from nemo_dali.synthetic.layouts import LAYOUTS
from tests.helpers.tables import write_random_table

COUNT = 12
GENERALISED = [name for name, layout in LAYOUTS.items() if layout.generalised]
NEW = [name for name in LAYOUTS if name != "refcoco"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    for name in LAYOUTS:
        synthesize(root / name, images=COUNT, seed=7, layout=name)
    return {name: root / name for name in LAYOUTS}


def load(folder):
    layout = LAYOUTS[folder.name]
    content = (folder / layout.folder / layout.refs_file).read_bytes()
    refs = json.loads(content) if layout.refs_file.endswith(".json") else pickle.loads(content)
    return json.loads((folder / layout.folder / "instances.json").read_text()), refs


def as_list(value):
    return value if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def indexed(folders, tmp_path_factory):
    """The training split of every layout as the commands make it: ``synth`` prints the one that follows."""
    out = tmp_path_factory.mktemp("indexed")
    paths = {}
    for name, folder in folders.items():
        layout = LAYOUTS[name]
        by = re.search(r"\((.*)\)", layout.refs_file)[1]
        words = ["index", folder, "--dataset", name, "--split-by", by, "--split", "train", "--verify"]
        paths[name] = out / f"{name}.ris.h5"
        assert main([str(w) for w in [*words, "--images", folder / layout.photos, "-o", paths[name]]]) == 0
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_photos_and_refs_of_single_things_are_those_of_refcoco(folders, name):
    plain_instances, plain = load(folders["refcoco"])
    instances, refs = load(folders[name])
    photos, plain_photos = (
        sorted((folders[n] / LAYOUTS[n].photos).iterdir(), key=lambda path: int(path.stem.rpartition("_")[2]))
        for n in (name, "refcoco")
    )
    assert [p.read_bytes() for p in photos] == [p.read_bytes() for p in plain_photos]
    assert sorted(i["file_name"] for i in instances["images"]) == sorted(p.name for p in photos)
    single = [ref for ref in refs if len(as_list(ref["ann_id"])) == 1 and -1 not in as_list(ref["ann_id"])]
    single = [ref for ref in single if ref.get("source") != "zero"]
    assert [as_list(ref["ann_id"]) for ref in single] == [[ref["ann_id"]] for ref in plain]
    assert [[s["raw"] for s in ref["sentences"]] for ref in single] == [
        [s["raw"] for s in ref["sentences"]] for ref in plain
    ]
    assert [a["area"] for a in instances["annotations"]] == [a["area"] for a in plain_instances["annotations"]]


@pytest.mark.parametrize("name", NEW)
def test_keys(folders, name):
    instances, refs = load(folders[name])
    keys = {"ref_id", "ann_id", "category_id", "image_id", "split", "file_name", "sent_ids", "sentences"}
    assert all(set(ref) == keys | ({"source"} if name == "ref-zom" else set()) for ref in refs)
    assert [ref["ref_id"] for ref in refs] == list(range(1, len(refs) + 1))
    assert [i for ref in refs for i in ref["sent_ids"]] == list(range(1, sum(len(r["sentences"]) for r in refs) + 1))
    annotations = {a["id"]: a for a in instances["annotations"]}
    for ref in refs:
        ids, categories = as_list(ref["ann_id"]), as_list(ref["category_id"])
        assert len(ids) == len(categories) == len(set(ids)) > 0
        if ids == [-1]:
            assert categories == [-1] and name == "grefcoco"
            continue
        assert [annotations[i]["category_id"] for i in ids] == categories
        assert {annotations[i]["image_id"] for i in ids} == {ref["image_id"]}
    if name == "grefcoco":
        assert {type(ref["ann_id"]) for ref in refs} == {list}
    elif name == "ref-zom":
        assert {ref["source"] for ref in refs} == {"one", "many", "zero"}
        assert all((type(ref["ann_id"]) is list) == (ref["source"] == "many") for ref in refs)
        assert {ref["split"] for ref in refs} == {"train", "test"}
    else:
        assert {type(a["segmentation"]) for a in instances["annotations"]} == {list}
        assert all(isinstance(part["counts"], str) for a in instances["annotations"] for part in a["segmentation"])


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if not layout.compressed])
def test_publishers_readers_find_polygons(folders, name):
    """``refer.py`` and ReLA's mapper look at ``segmentation[0]``, as in COCO only crowds are something else."""
    instances, _ = load(folders[name])
    sizes = {image["id"]: (image["height"], image["width"]) for image in instances["images"]}
    hidden = 0
    for annotation in instances["annotations"]:
        parts = annotation["segmentation"]
        assert annotation["iscrowd"] == 0 and type(parts[0]) is list
        assert all(len(part) >= 6 and len(part) % 2 == 0 for part in parts)
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, *sizes[annotation["image_id"]])))
        hidden += mask.sum() == annotation["area"] and all(value == int(value) for part in parts for value in part)
    assert hidden > 5  # partly, by something else; drawn to the pixel


@pytest.mark.parametrize("name", GENERALISED)
def test_sentences_are_true_of_their_things_and_of_no_other(folders, name):
    instances, refs = load(folders[name])
    kinds = {c["id"]: c["name"] for c in instances["categories"]}
    scenes = {number + 1: make_photo(seed=7, number=number).scene for number in range(COUNT)}
    none = several = every = 0
    for ref in refs:
        ids = [] if -1 in as_list(ref["ann_id"]) or ref.get("source") == "zero" else as_list(ref["ann_id"])
        things = scenes[ref["image_id"]].things
        here = [a for a in instances["annotations"] if a["image_id"] == ref["image_id"]]
        for sentence in ref["sentences"]:
            words = sentence["tokens"]
            if not ids:
                none += 1
                assert not any(t.kind in words and (t.colour in words or not colours(words)) for t in things)
            elif len(ids) > 1 and ({"every", "all"} & set(words)):
                every += 1
                kind = next(k for k in kinds.values() if k in words or f"{k}s" in words)
                assert ids == [a["id"] for a in here if kinds[a["category_id"]] == kind]
            elif len(ids) > 1:
                several += 1
                said = sentence["sent"].split(" and ")
                own = [r for r in refs if r["image_id"] == ref["image_id"]]
                singles = {s["sent"]: as_list(r["ann_id"]) for r in own for s in r["sentences"]}
                assert sorted(i for part in said for i in singles[part]) == sorted(ids)
    assert none == COUNT and several > 1 and every > 1


def colours(words):
    from nemo_dali.synthetic._shapes import PAINTS

    return set(words) & set(PAINTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_file_holds_the_masks_that_pycocotools_reads(folders, indexed, name):
    instances, refs = load(folders[name])
    annotations = {a["id"]: a for a in instances["annotations"]}
    dataset = Dataset.open(indexed[name])
    train = [ref for ref in refs if ref["split"] == "train"]
    assert dataset.refs.ref_id.tolist() == [ref["ref_id"] for ref in train]
    for row, ref in enumerate(train):
        mask = dataset.mask(row)
        expected = np.zeros(mask.shape, np.uint8)
        for ann_id in as_list(ref["ann_id"]):
            if ann_id != -1 and ref.get("source") != "zero":
                rles = annotations[ann_id]["segmentation"]
                if name != "refclef":
                    rles = coco_mask.frPyObjects(rles, *mask.shape)
                parts = coco_mask.decode(rles if isinstance(rles, list) else [rles])
                expected |= parts.max(axis=2)
        np.testing.assert_array_equal(mask, expected)
        assert bool(dataset.refs.empty[row]) != expected.any()


def test_the_same_arguments_give_the_same_bytes(folders, tmp_path):
    synthesize(tmp_path / "again", images=COUNT, seed=7, layout="grefcoco")
    paths = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()]
    assert len(paths) == COUNT + 3
    assert all((tmp_path / "again" / p).read_bytes() == (folders["grefcoco"] / p).read_bytes() for p in paths)


def test_an_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match=r"layout \(coco\) must be one of refcoco, refclef, grefcoco, ref-zom"):
        synthesize(tmp_path / "x", images=1, layout="coco")


def test_the_command_says_what_comes_next(tmp_path, capsys):
    assert main(["synth", str(tmp_path / "d"), "--images", "3", "--layout", "ref-zom"]) == 0
    words = capsys.readouterr().out.splitlines()[1].split()[1:]
    assert words[:7] == ["index", str(tmp_path / "d"), "--dataset", "ref-zom", "--split-by", "final", "--split"]
    assert main([*words[:-1], str(tmp_path / "a.ris.h5")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a.ris.h5"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["no_target"] == 2  # one a photo, and one of three is of another split


# --- the rest of the package with refs that have no target -----------------------------------------------------------


def test_batches_and_the_contact_sheet_have_empty_masks(indexed, tmp_path):
    dataset = Dataset.open(indexed["grefcoco"])
    write_random_table(tmp_path / "a.neg.h5", dataset)
    policy = MosaicPolicy(p_mined=0.5, grids={2: 0.5, 3: 0.5})
    loader = Loader(indexed["grefcoco"], tmp_path / "a.neg.h5", batch_size=8, policy=policy, size=96, drop_last=False)
    seen = np.zeros(len(dataset.refs.empty), int)
    for batch in loader:
        filled = batch.mask.flatten(1).any(dim=1).numpy()
        refs = batch.plan["ref"]
        seen[refs] += 1
        assert not filled[dataset.refs.empty[refs] == 1].any()
        assert filled[dataset.refs.empty[refs] == 0].mean() > 0.8  # a small thing may fall between the pixels
    loader.close()
    assert (seen >= 1).all() and dataset.refs.empty.sum() > 8
    preview(indexed["grefcoco"], tmp_path / "a.neg.h5", output=tmp_path / "sheet.png", count=8, size=96)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 96


def test_mining_excludes_nothing_by_a_category_that_is_not_one(indexed, clip, tmp_path):
    dataset = Dataset.open(indexed["grefcoco"])
    weights = {"model": str(clip[0] / "tiny.json"), "pretrained": str(clip[0] / "tiny.pt"), "device": "cpu"}
    mine(indexed["grefcoco"], output=tmp_path / "a.neg.h5", exclusions=Exclusions(category=True), **weights)
    found = (np.asarray(NegativeTable.open(tmp_path / "a.neg.h5").neighbors) >= 0).sum(axis=1)
    category = dataset.refs.category[dataset.sentences.ref]
    assert (found[category < 0] == len(dataset.images.id) - 1).all()
    assert (found[category >= 0] < len(dataset.images.id) - 1).all()
    assert 5 < (category < 0).sum() < len(category)
