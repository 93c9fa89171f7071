"""The truth of a generated data set: that the file says what the annotations, the photos and the sentences say."""

import json
import pickle
import time
from dataclasses import replace

import numpy as np
import pytest

from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import AnnotationError
from nemo_dali.synthetic import expression_kinds, make_photo, synthesize
from nemo_dali.synthetic._scenes import NO, UNSURE, YES, Expression, Scene, Sentence, Thing, fits, normalise
from nemo_dali.synthetic._truth_file import photo_record, sentence_record, truth_content
from nemo_dali.synthetic.layouts import LAYOUTS
from nemo_dali.synthetic.truth import Truth

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


# --- reading it ------------------------------------------------------------------------------------------------------


def thing(kind, colour, size, x, y, half=20, zone="grass", visible=1.0):
    return Thing(kind, colour, size, zone, box=(x - half, y - half, x + half, y + half), visible=visible)


def scene(*things):
    return Scene(400, 300, "meadow", 100, False, things)


BALLS = scene(thing("ball", "red", "small", 60, 250), thing("ball", "blue", "big", 340, 250))
CUPS = scene(thing("cup", "red", "big", 200, 250), thing("ball", "red", "medium", 60, 250))
SKY = scene(thing("balloon", "red", "small", 200, 40, zone="sky"), thing("ball", "red", "small", 168, 200))
NOTHING = scene()
# A ball of which nothing can be seen: it has no annotation.
HIDDEN = scene(thing("ball", "red", "small", 60, 250, visible=0.0), thing("cup", "blue", "small", 65, 255))
SCENES = [BALLS, CUPS, SKY, NOTHING, HIDDEN]

SAID = [
    # what is said, then for each scene whether the words fit, and whether all of it does
    ([Expression("ball")], "11100", (YES, YES, YES, NO, NO)),
    ([Expression("ball", "red")], "11100", (YES, YES, YES, NO, NO)),
    ([Expression("ball", "blue")], "10000", (YES, NO, NO, NO, NO)),
    ([Expression("ball", "red", "small")], "10100", (YES, NO, YES, NO, NO)),
    ([Expression("ball", size="big")], "10000", (YES, NO, NO, NO, NO)),
    ([Expression("house")], "00000", (NO, NO, NO, NO, NO)),
    ([Expression("ball", where="left")], "11100", (YES, YES, UNSURE, NO, NO)),
    ([Expression("ball", "red", where="right")], "11100", (NO, NO, NO, NO, NO)),
    ([Expression("ball", where="leftmost")], "11100", (YES, NO, NO, NO, NO)),
    ([Expression("balloon", where="sky")], "00100", (NO, NO, YES, NO, NO)),
    ([Expression("ball", where="sky")], "11100", (NO, NO, NO, NO, NO)),
    ([Expression("ball", where="left of", landmark=Expression("cup"))], "11100", (NO, YES, NO, NO, NO)),
    ([Expression("ball", where="left of", landmark=Expression("ball", "blue"))], "11100", (YES, NO, NO, NO, NO)),
    ([Expression("ball"), Expression("cup")], "01000", (NO, YES, NO, NO, NO)),
    ([Expression("ball", where="left"), Expression("balloon")], "00100", (NO, NO, UNSURE, NO, NO)),
]


def write_truth(path, scenes=SCENES, said=SAID):
    images = [
        photo_record(i, scene, {j: 10 * i + j for j, one in enumerate(scene.things) if one.visible})
        for i, scene in enumerate(scenes, 1)
    ]
    sentences = [
        sentence_record(i, 1, range(len(says)), Sentence(f"sentence {i}", tuple(says)))
        for i, (says, *_) in enumerate(said, 1)
    ]
    path.write_bytes(truth_content(images, sentences))
    return path


def pairs(sentences, photos):
    return np.repeat(np.arange(sentences), photos), np.tile(np.arange(photos), sentences)


def test_what_fits_what_by_hand(tmp_path):
    truth = Truth.read(write_truth(tmp_path / "t.json"))
    rows = pairs(len(SAID), len(SCENES))
    words = truth.fits_words(*rows).reshape(len(SAID), -1)
    answer = truth.fits(*rows).reshape(len(SAID), -1)
    assert (words.dtype, answer.dtype) == (bool, np.int8)
    for i, (says, expected, judged) in enumerate(SAID):
        assert words[i].tolist() == [sign == "1" for sign in expected], says
        assert tuple(answer[i]) == judged, says
    kinds = [truth.kind_names[kind] for kind in truth.kind]
    assert kinds == [*["attribute"] * 6, *["place"] * 2, "rank", *["zone"] * 2, *["relation"] * 2, *["several"] * 2]
    assert truth.fits(*(np.empty(0, int),) * 2).tolist() == truth.fits_words(*(np.empty(0, int),) * 2).tolist() == []


def test_what_is_read_is_what_was_written(folders, photos):
    truth = Truth.read(folders["grefcoco"])
    assert truth.path == folders["grefcoco"] / "grefcoco" / "truth.json"
    for told, photo in zip(truth.scenes, photos, strict=True):
        made = [replace(own, paint=(0, 0, 0), x=0, y=0, half=0, tilt=0, mirror=False) for own in photo.scene.things]
        assert told == replace(photo.scene, things=tuple(made))
    singles = [s for photo in photos for i in sorted(photo.sentences) for s in photo.sentences[i]]
    told = [i for i, sentence in enumerate(load(folders["grefcoco"])[1]["sentences"]) if len(sentence["things"]) == 1]
    assert [truth.sent[i] for i in told] == [normalise(s.raw) for s in singles]
    assert [truth.expressions[truth.said[i, 0]] for i in told] == [s.says[0] for s in singles]
    assert (truth.said[told, 0] == truth.said[told, 1]).all()
    again = Truth.read(truth.path.parent)
    assert again.path == truth.path and Truth.read(truth.path).sent == truth.sent


@pytest.fixture(scope="module")
def indexed(folders, tmp_path_factory):
    """The training split of each generalised layout: some photos of the truth, and refs of several things and none."""
    out, made = tmp_path_factory.mktemp("indexed"), {}
    for name, by in (("grefcoco", "unc"), ("ref-zom", "final")):
        annotations = read_refer(folders[name], dataset=name, split_by=by, split="train")
        index_dataset(annotations, images=folders[name] / LAYOUTS[name].photos, output=out / f"{name}.ris.h5")
        made[name] = Dataset.open(out / f"{name}.ris.h5")
    return made


def test_kinds_of_expression_are_those_of_the_truths_sentences(folders, indexed):
    for name, dataset in indexed.items():
        kinds = {sentence["sent_id"]: sentence["expression_kind"] for sentence in load(folders[name])[1]["sentences"]}
        assert expression_kinds(folders[name], dataset.path) == [kinds[i] for i in dataset.sentences.sent_id.tolist()]


@pytest.mark.parametrize("name", ["grefcoco", "ref-zom"])
def test_the_rows_are_a_data_sets_and_the_answers_those_of_a_plain_loop(folders, photos, indexed, name):
    dataset, (_, told, _) = indexed[name], load(folders[name])
    truth = Truth.read(folders[name]).of(dataset)
    assert len(dataset.images.id) < COUNT
    assert truth.image_id.tolist() == dataset.images.id.tolist()
    assert truth.sent == list(dataset.sentences.text)
    by_id = {sentence["sent_id"]: sentence for sentence in told["sentences"]}
    rows = pairs(len(truth.sent), len(truth.scenes))
    words, answer = truth.fits_words(*rows), truth.fits(*rows)
    seen = set()
    for sentence, photo, its_words, its_answer in zip(*rows, words, answer, strict=True):
        own = photos[dataset.images.id[photo] - 1]
        shown = [i for i in range(len(own.scene.things)) if (own.labels == i + 1).any()]
        record = by_id[dataset.sentences.sent_id[sentence]]
        of_words, of_all = [], []
        for expression in record["expressions"]:
            alike = [
                i
                for i in shown
                if all(
                    getattr(own.scene.things[i], k) == expression[k] for k in {"kind", "colour", "size"} & {*expression}
                )
            ]
            of_words.append(bool(alike))
            landmark = Expression(**expression["landmark"]) if "landmark" in expression else None
            said = Expression(**{**expression, "landmark": landmark})
            of_all.append(max([fits(own.scene, i, said) for i in shown]))
        assert (its_words, its_answer) == (all(of_words), min(of_all)), record
        seen.add((bool(its_words), int(its_answer)))
        if photo == dataset.refs.image[dataset.sentences.ref[sentence]]:
            assert its_answer == (NO if dataset.refs.empty[dataset.sentences.ref[sentence]] else YES)
    assert seen == {(True, YES), (True, UNSURE), (True, NO), (False, NO)}


@pytest.mark.parametrize("rows", [([0], [5]), ([15], [0]), ([-1], [0]), ([0], [-1])])
def test_rows_that_there_are_not(tmp_path, rows):
    truth = Truth.read(write_truth(tmp_path / "t.json"))
    for ask in (truth.fits, truth.fits_words):
        with pytest.raises(ValueError, match="must be rows from 0 to"):
            ask(*map(np.array, rows))


def test_words_of_many_pairs_are_compared_at_once(tmp_path):
    """A hundred times as many pairs as are looked at in a Python loop in that time."""
    truth = Truth.read(write_truth(tmp_path / "t.json"))
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(SAID), 120_000), rng.integers(0, len(SCENES), 120_000)
    begin = time.process_time()
    words = truth.fits_words(*rows)
    assert time.process_time() - begin < 0.5
    assert words.mean() == pytest.approx(np.mean([s == "1" for _, shown, _ in SAID for s in shown]), abs=0.01)


def damaged(change):
    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


FAULTS = {
    "missing": (lambda path: path.unlink(), "cannot be read: No such file"),
    "no JSON": (lambda path: path.write_text("{"), "cannot be used: Expecting"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be used: "),
    "a list": (lambda path: path.write_text("[]"), "it is not the truth of a generated data set"),
    "nested": (lambda path: path.write_text("[" * 200_000), "it nests values too deeply"),
    "foreign": (damaged(lambda c: c.pop("format")), "it is not the truth of a generated data set"),
    "newer": (damaged(lambda c: c.update(version=2)), "it has version 2, and version 1 is read"),
    "empty": (damaged(lambda c: c.update(images=[])), "it has no images"),
    "sentences": (damaged(lambda c: c.update(sentences={})), "it has no sentences"),
    "no kind": (damaged(lambda c: c["images"][1]["things"][0].pop("kind")), "it is damaged at image 1"),
    "a kind": (damaged(lambda c: c["images"][1]["things"][0].update(kind="gnu")), "it is damaged at image 1"),
    "a colour": (damaged(lambda c: c["images"][0]["things"][0].update(colour=[])), "it is damaged at image 0"),
    "a box": (damaged(lambda c: c["images"][0]["things"][0].update(box=[1, 2, 3])), "it is damaged at image 0"),
    "a side": (damaged(lambda c: c["images"][2].update(width=0)), "it is damaged at image 2"),
    "an id": (damaged(lambda c: c["images"][2].update(id=2**80)), "it is damaged at image 2"),
    "a place": (damaged(lambda c: c["sentences"][6]["expressions"][0].update(where="up")), "damaged at sentence 6"),
    "a relation": (damaged(lambda c: c["sentences"][6]["expressions"][0].update(where="above")), "at sentence 6"),
    "landmark": (damaged(lambda c: c["sentences"][11]["expressions"][0].pop("where")), "damaged at sentence 11"),
    "deep": (
        damaged(lambda c: c["sentences"][11]["expressions"][0]["landmark"].update(where="left")),
        "damaged at sentence 11",
    ),
    "nothing": (damaged(lambda c: c["sentences"][0].update(expressions=[])), "it is damaged at sentence 0"),
    "too much": (
        damaged(lambda c: c["sentences"][0].update(expressions=3 * c["sentences"][0]["expressions"])),
        "it is damaged at sentence 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_used(tmp_path, fault):
    edit, words = FAULTS[fault]
    edit(path := write_truth(tmp_path / "t.json"))
    with pytest.raises(AnnotationError, match=words) as told:
        Truth.read(path)
    assert str(path) in str(told.value) and "nemo-dali synth" in str(told.value) and len(str(told.value)) < 400


def test_a_folder_without_the_file(tmp_path):
    with pytest.raises(AnnotationError, match=r"has no truth.json of a generated data set\. Give the folder"):
        Truth.read(tmp_path)


def test_a_data_set_that_the_truth_is_not_of(folders, indexed, tmp_path):
    dataset, truth = indexed["grefcoco"], Truth.read(folders["grefcoco"])
    content = load(folders["grefcoco"])[1]

    def told(change):
        (path := tmp_path / "truth.json").write_text(json.dumps(change(json.loads(json.dumps(content)))))
        with pytest.raises(AnnotationError) as found:
            Truth.read(path).of(dataset)
        assert "nemo-dali synth" in str(found.value)
        return str(found.value)

    def another_sentence(content):
        content["sentences"][0]["sent"] += "s"
        return content

    def another_size(content):
        content["images"][0]["width"] += 1
        return content

    first = dataset.images.id[0], dataset.sentences.sent_id[0]
    assert first == (1, 1)
    assert "does not have 1 of the" in told(lambda c: {**c, "images": c["images"][1:]})
    assert "photos of" in told(lambda c: {**c, "images": c["images"][1:]})
    assert "sentences of" in told(lambda c: {**c, "sentences": c["sentences"][:-1]})
    assert "its photo 1 is not the same" in told(another_size)
    assert "its sentence 1 is not the same" in told(another_sentence)
    assert truth.of(dataset).sent == list(dataset.sentences.text)
