"""The truth of a generated data set: that the file says what the annotations, the photos and the sentences say."""

import json
import pickle

import pytest

from nemo_dali.synthetic import make_photo, synthesize
from nemo_dali.synthetic._scenes import normalise
from nemo_dali.synthetic.layouts import LAYOUTS

COUNT = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("truths")
    for name in LAYOUTS:
        synthesize(root / name, images=COUNT, seed=7, layout=name)
    return {name: root / name for name in LAYOUTS}


@pytest.fixture(scope="module")
def photos():
    return [make_photo(seed=7, number=number) for number in range(COUNT)]


def load(folder):
    layout = LAYOUTS[folder.name]
    content = (folder / layout.folder / layout.refs_file).read_bytes()
    refs = json.loads(content) if layout.refs_file.endswith(".json") else pickle.loads(content)
    texts = ((folder / layout.folder / name).read_text() for name in ("instances.json", "truth.json"))
    return *map(json.loads, texts), refs


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_photos_are_told_as_they_were_made_and_annotated(folders, photos, name):
    instances, truth, _ = load(folders[name])
    kinds = {category["id"]: category["name"] for category in instances["categories"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    assert set(truth) == {"format", "version", "images", "sentences"}
    assert [image["id"] for image in truth["images"]] == [image["id"] for image in instances["images"]]
    told = []
    for image, photo in zip(truth["images"], photos, strict=True):
        scene = photo.scene
        assert set(image) == {"id", "theme", "horizon", "width", "height", "grey", "things", "hides"}
        assert (image["width"], image["height"]) == photo.image.size
        assert (image["theme"], image["horizon"], image["grey"]) == (scene.theme, scene.horizon, scene.grey)
        assert {tuple(pair) for pair in image["hides"]} == scene.hides
        for thing, own in zip(image["things"], scene.things, strict=True):
            assert set(thing) == {"ann_id", "kind", "colour", "size", "zone", "box", "visible"}
            said = (thing["kind"], thing["colour"], thing["size"], thing["zone"], thing["visible"])
            assert said == (own.kind, own.colour, own.size, own.zone, own.visible)
            assert (thing["ann_id"] is None) == (own.visible == 0)
            if thing["ann_id"] is not None:
                annotation, (x0, y0, x1, y1) = annotations[thing["ann_id"]], thing["box"]
                assert annotation["image_id"] == image["id"] and kinds[annotation["category_id"]] == thing["kind"]
                assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
                told.append(thing["ann_id"])
    assert told == [*annotations]


@pytest.mark.parametrize("name", LAYOUTS)
def test_sentences_are_told_with_the_things_that_they_are_about(folders, photos, name):
    _, truth, refs = load(folders[name])
    images = {image["id"]: image for image in truth["images"]}
    sentences = {sentence["sent_id"]: sentence for sentence in truth["sentences"]}
    assert [*sentences] == [i for ref in refs for i in ref["sent_ids"]]
    counts = dict.fromkeys((0, 1, 2), 0)
    for ref in refs:
        things = images[ref["image_id"]]["things"]
        ann_ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
        if ref.get("source") == "zero" or ann_ids == [-1]:
            ann_ids = []
        for sentence in ref["sentences"]:
            told = sentences[sentence["sent_id"]]
            keys = {"sent_id", "image_id", "sent", "things", "expressions", "expression_kind"}
            assert set(told) == keys and told["image_id"] == ref["image_id"]
            assert told["sent"] == sentence["sent"]
            assert [things[i]["ann_id"] for i in told["things"]] == ann_ids
            assert (told["expression_kind"] == "several") == (len(ann_ids) > 1)
            counts[min(len(ann_ids), 2)] += 1
            for expression in told["expressions"]:
                words = sentence["sent"].replace("large", "big").replace("little", "small").split()
                said = [value for key, value in expression.items() if key in ("kind", "colour", "size")]
                assert all(word in words or f"{word}s" in words for word in said)
            if len(ann_ids) > 1:
                assert len(told["expressions"]) == 1 + (" and " in told["sent"])
            else:
                (expression,) = told["expressions"]
                assert set(expression) <= {"kind", "colour", "size", "where", "landmark"}
    assert counts[1] > COUNT and (counts[0] > 0) == (counts[2] > 0) == LAYOUTS[name].generalised
    singles = [s for photo in photos for i in sorted(photo.sentences) for s in photo.sentences[i]]
    told = [s for s in truth["sentences"] if len(s["things"]) == 1]
    assert [s["sent"] for s in told] == [normalise(s.raw) for s in singles]


def test_the_truth_comes_before_the_refs_that_say_that_all_is_there(folders, tmp_path, monkeypatch):
    from nemo_dali import synthetic

    def write_own(path, content):
        if path.name == "refs(unc).p":
            raise KeyboardInterrupt
        path.write_bytes(content)

    monkeypatch.setattr(synthetic, "write_own", write_own)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "data", images=2, seed=7)
    assert {path.name for path in (tmp_path / "data" / "refcoco").iterdir()} == {"instances.json", "truth.json"}
