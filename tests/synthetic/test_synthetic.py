"""The generated data set: RefCOCO's layout, masks that are what one sees, sentences that are true of one thing only."""

import hashlib
import json
import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from nemo_dali import synthetic
from nemo_dali.data.annotations import read_refer
from nemo_dali.errors import NemoError
from nemo_dali.synthetic import draw, make_photo, segmentation, synthesize
from nemo_dali.synthetic._scenes import (
    NO,
    UNSURE,
    YES,
    Expression,
    Scene,
    Thing,
    expression_kind,
    fits,
    normalise,
    refers_to,
    similar,
)
from nemo_dali.synthetic._shapes import KINDS, PAINTS
from nemo_dali.synthetic.layouts import SPLITS

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    synthesize(folder, images=COUNT, seed=7)
    return folder


@pytest.fixture(scope="module")
def photos():
    return [make_photo(seed=7, number=number) for number in range(COUNT)]


def load(folder):
    instances = json.loads((folder / "refcoco" / "instances.json").read_text())
    return instances, pickle.loads((folder / "refcoco" / "refs(unc).p").read_bytes())


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_layout_is_refcocos(folder):
    instances, refs = load(folder)
    raw = (folder / "refcoco" / "refs(unc).p").read_bytes()
    assert raw[:2] == b"\x80\x02"
    assert set(refs[0]) == {
        *("ref_id", "ann_id", "category_id", "image_id", "split", "file_name", "sent_ids", "sentences", "distractors")
    }
    annotations = {a["id"]: a for a in instances["annotations"]}
    images = {i["id"]: i for i in instances["images"]}
    assert len(images) == COUNT
    assert {c["name"] for c in instances["categories"]} == set(KINDS)
    photos = folder / "images" / "mscoco" / "images" / "train2014"
    for image in images.values():
        with Image.open(photos / image["file_name"]) as photo:
            assert photo.format == "JPEG"
            assert photo.size == (image["width"], image["height"])
            assert 200 <= min(photo.size) <= max(photo.size) <= 640
    assert [r["ref_id"] for r in refs] == list(range(1, len(refs) + 1))
    assert len({s["sent_id"] for r in refs for s in r["sentences"]}) == sum(len(r["sentences"]) for r in refs)
    for ref in refs:
        annotation = annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
        assert ref["file_name"].startswith(f"COCO_train2014_{ref['image_id']:012d}_")
        assert ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
        assert 1 <= len(ref["sentences"]) <= 3
        assert len({s["sent"] for s in ref["sentences"]}) == len(ref["sentences"])
        for sentence in ref["sentences"]:
            assert set(sentence) == {"sent_id", "sent", "raw", "tokens"}
            assert sentence["tokens"] == sentence["sent"].split()
            assert sentence["sent"] == sentence["raw"].lower().rstrip(".")


def test_every_split_can_be_read_and_photos_do_not_cross_splits(folder):
    _, refs = load(folder)
    photos = {
        split: {r["image_id"] for r in refs if r["split"] == split} for split in ("train", "val", "testA", "testB")
    }
    assert set.union(*photos.values()) == set(range(1, COUNT + 1))
    assert sum(map(len, photos.values())) == COUNT
    assert {split: len(ids) for split, ids in photos.items()} == {"train": 47, "val": 5, "testA": 4, "testB": 4}
    for split in photos:
        read = read_refer(folder, dataset="refcoco", split_by="unc", split=split)
        assert len(read.refs.ref_id) == sum(r["split"] == split for r in refs)
        assert read.refs.distractors.tolist() == [r["distractors"] for r in refs if r["split"] == split]


def test_shares_of_the_splits():
    shares = Counter(SPLITS.get(i % 50, "train") for i in range(500))
    assert shares == {"train": 400, "val": 40, "testA": 30, "testB": 30}


@pytest.mark.slow
def test_same_arguments_same_bytes_and_more_images_only_add(folder, tmp_path):
    again, fewer, other = tmp_path / "again", tmp_path / "fewer", tmp_path / "other"
    synthesize(again, images=COUNT, seed=7)
    synthesize(fewer, images=10, seed=7)
    synthesize(other, images=10, seed=8)
    assert digests(again) == digests(folder)
    jpegs = {name: digest for name, digest in digests(fewer).items() if name.endswith(".jpg")}
    assert len(jpegs) == 10
    assert jpegs.items() <= digests(folder).items()
    assert not jpegs.items() & digests(other).items()
    assert load(fewer)[1] == load(folder)[1][: len(load(fewer)[1])]


@pytest.mark.slow
def test_photos_vary(folder, photos):
    instances, _ = load(folder)
    assert len({(i["width"], i["height"]) for i in instances["images"]}) > COUNT // 2
    assert {i["width"] > i["height"] for i in instances["images"]} == {True, False}
    assert {len(p.scene.things) for p in photos} >= {4, 5, 6, 7, 8, 9}
    things = [t for p in photos for t in p.scene.things]
    assert {t.kind for t in things} == set(KINDS)
    assert {t.colour for t in things} >= set(PAINTS)
    assert {p.scene.theme for p in photos} == set(synthetic.THEMES)
    assert {type(a["segmentation"]) for a in instances["annotations"]} == {list}
    assert max(len(a["segmentation"]) for a in instances["annotations"]) > 1
    samplings = set()
    for image in instances["images"]:
        path = folder / "images" / "mscoco" / "images" / "train2014" / image["file_name"]
        with Image.open(path) as photo:
            samplings.add(tuple(layer[1:3] for layer in photo.layer))
    assert len(samplings) >= 3


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"images \(0\) must be"):
        synthesize(tmp_path / "x", images=0)
    for distractors in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(ValueError, match="distractors"):
            synthesize(tmp_path / "x", images=1, distractors=distractors)
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    synthesize(tmp_path, images=2)
    before = digests(tmp_path)
    assert "notes.txt" in before
    with pytest.raises(NemoError, match="exists already, of a data set"):
        synthesize(tmp_path, images=3)
    assert digests(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(NemoError, match="Cannot write"):
        synthesize(tmp_path / "file" / "below", images=1)


def test_a_run_cut_short_leaves_no_refs_and_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    def make(*, number, **options):
        if number == 3:
            raise KeyboardInterrupt
        return make_photo(number=number, **options)

    monkeypatch.setattr(synthetic, "make_photo", make)
    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "data", images=5)
    assert not list((tmp_path / "data" / "refcoco").iterdir())
    with pytest.raises(NemoError, match="unfinished"):
        synthesize(tmp_path / "data", images=5)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo_dali.io.output.os.write", no_space)
    words = f"Cannot write {tmp_path / 'data'}: No space left on device. Choose another folder or free some space."
    with pytest.raises(NemoError, match=re.escape(words)):
        synthesize(tmp_path / "data", images=1)
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


# --- masks -----------------------------------------------------------------------------------------------------------


def decoded(annotation_segmentation, height, width):
    rles = coco.frPyObjects(annotation_segmentation, height, width)
    return coco.decode(coco.merge(rles) if isinstance(rles, list) else rles).astype(bool)


def grown(mask):
    padded = np.pad(mask, 1)
    return np.any([padded[y : y + mask.shape[0], x : x + mask.shape[1]] for y in range(3) for x in range(3)], axis=0)


@pytest.mark.slow
def test_masks_are_the_visible_pixels(photos):
    hidden = 0
    for photo in photos:
        height, width = photo.labels.shape
        for i, thing in enumerate(photo.scene.things):
            visible = photo.labels == i + 1
            if not visible.any():
                continue
            mask = decoded(segmentation(photo, i), height, width)
            if thing.visible < 1:
                hidden += 1
                assert np.array_equal(mask, visible)
            else:  # its own shapes, rasterised by others' rules: outermost pixels may differ, some of a sharp tip
                assert not (mask & ~grown(visible)).any()
                assert (visible & ~grown(mask)).sum() <= 4
                assert (mask & visible).sum() > 0.92 * (mask | visible).sum()
            rows, columns = np.nonzero(visible)
            assert thing.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert hidden > 20


@pytest.mark.slow
def test_files_hold_those_masks(folder, photos):
    instances, _ = load(folder)
    found = iter(instances["annotations"])
    for number, photo in enumerate(photos):
        for i in range(len(photo.scene.things)):
            if (area := int((photo.labels == i + 1).sum())) == 0:
                continue
            annotation = next(found)
            assert annotation["image_id"] == number + 1
            assert annotation["area"] == area
            assert annotation["segmentation"] == json.loads(json.dumps(segmentation(photo, i)))
            x0, y0, x1, y1 = photo.scene.things[i].box
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    assert next(found, None) is None


@pytest.mark.slow
def test_repainting_a_thing_changes_pixels_of_its_mask_and_no_others(photos):
    for photo in photos[:12]:
        scene = replace(photo.scene, grey=False)
        before, labels, _ = draw(scene, seed=1)
        for i, thing in enumerate(scene.things):
            things = list(scene.things)
            things[i] = replace(thing, paint=tuple((c + 128) % 256 for c in thing.paint))
            after, same_labels, _ = draw(replace(scene, things=tuple(things)), seed=1)
            assert np.array_equal(labels, same_labels)
            changed = (np.abs(np.int16(before) - np.int16(after)) > 40).any(axis=2)
            mask = labels == i + 1
            assert (changed & ~grown(mask)).sum() <= 2
            assert mask.sum() < 300 or changed[mask].mean() > 0.2  # windows, stems and wheels have colours of their own


def test_a_thing_in_front_hides_what_is_behind():
    back = Thing("ball", "red", "big", "grass", PAINTS["red"], 150, 160, 60)
    front = Thing("ball", "blue", "small", "grass", PAINTS["blue"], 190, 190, 30)
    _, labels, scene = draw(Scene(400, 300, "meadow", 120, False, (back, front)), seed=0)
    assert labels[190, 190] == 2
    assert labels[130, 130] == 1
    assert labels[10, 390] == 0
    assert scene.hides == {(0 + 1, 0)}
    assert scene.things[1].visible == 1
    assert scene.things[1].box == pytest.approx((160, 160, 220, 220), abs=1)
    assert 0.6 < scene.things[0].visible < 0.95
    alone = np.pi * 60**2
    assert (labels == 1).sum() == pytest.approx(scene.things[0].visible * alone, rel=0.02)


# --- language --------------------------------------------------------------------------------------------------------

SAID_PLACES = {"upper": "top", "lower": "bottom", "center": "middle"}


def parse(sentence, zones):
    """What a sentence says, read by its words alone: kind, colour, size, and one (word, landmark) of position."""
    words = [w for w in sentence.split() if w != "the"]
    text = " ".join(words)
    rank = None
    for word, said in {
        "leftmost": ("leftmost", "left most", "furthest left"),
        "rightmost": ("rightmost", "right most", "furthest right"),
        "highest": ("highest", "topmost", "furthest up"),
        "lowest": ("lowest", "furthest down"),
    }.items():
        for phrase in said:
            if phrase in text:
                rank, text = word, text.replace(phrase, "").strip()
    relation = r"(?:to )?left of|(?:to )?right of|above|over|below|under|in front of|behind"
    match = re.fullmatch(
        rf"(?:(small|little|big|large) )?(?:({'|'.join(PAINTS)}) )?({'|'.join(KINDS)})"
        rf"(?: ({relation})(?: ({'|'.join(PAINTS)}))? ({'|'.join(KINDS)}))?(?: (.+))?",
        text,
    )
    assert match, sentence
    size, colour, kind, related, its_colour, its_kind, rest = match.groups()
    size = {"little": "small", "large": "big"}.get(size, size)
    where, landmark = rank, None
    if related:
        where = {"over": "above", "under": "below"}.get(related, related).removeprefix("to ")
        landmark = Expression(its_kind, its_colour)
    elif rest:
        assert rank is None
        places = [SAID_PLACES.get(w, w) for w in rest.split() if w not in ("on", "in", "at", "to", "side")]
        where = " ".join(places)
        assert where in zones or set(places) <= {"left", "right", "middle", "top", "bottom"}, sentence
    return Expression(kind, colour, size, where, landmark)


def meant(scene, said):
    """The things that an expression fits, by plain two-valued rules that lie between "surely" and "surely not"."""
    things = scene.things
    x = [(t.box[0] + t.box[2]) / 2 / scene.width for t in things]
    y = [(t.box[1] + t.box[3]) / 2 / scene.height for t in things]
    fit = [
        i
        for i, t in enumerate(things)
        if t.kind == said.kind and said.colour in (None, t.colour) and said.size in (None, t.size)
    ]
    if said.where is None:
        return fit
    if said.landmark:
        (j,) = [
            i for i, t in enumerate(things) if t.kind == said.landmark.kind and said.landmark.colour in (None, t.colour)
        ]
        a = things[j].box
        kept = []
        for i in fit:
            b = things[i].box
            overlap = min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
            dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
            true = {
                "left of": dx < 0 and abs(dy) < -1.3 * dx,
                "right of": dx > 0 and abs(dy) < 1.3 * dx,
                "above": dy < 0 and abs(dx) < -1.3 * dy,
                "below": dy > 0 and abs(dx) < 1.3 * dy,
                "in front of": overlap and i > j,
                "behind": overlap and i < j,
            }[said.where]
            if true and i != j:
                kept.append(i)
        return kept
    if said.where in ("leftmost", "rightmost", "highest", "lowest"):
        assert len(fit) > 1, "a rank among one"
        key = {"leftmost": x, "rightmost": [-v for v in x], "highest": y, "lowest": [-v for v in y]}[said.where]
        return [min(fit, key=lambda i: key[i])]
    if said.where in {t.zone for t in things}:
        return [i for i in fit if things[i].zone == said.where]
    rules = {
        "left": lambda i: x[i] < 0.42,
        "right": lambda i: x[i] > 0.58,
        "top": lambda i: y[i] < 0.42,
        "bottom": lambda i: y[i] > 0.58,
        "middle": lambda i: abs(x[i] - 0.5) < 0.13,
    }
    return [i for i in fit if all(rules[word](i) for word in said.where.split())]


def test_every_sentence_is_true_of_its_thing_and_of_no_other(photos):
    used = Counter()
    for photo in photos:
        scene = photo.scene
        for index, sentences in photo.sentences.items():
            assert scene.things[index].visible >= 0.5
            for sentence in sentences:
                raw = sentence.raw
                said = parse(normalise(raw), {t.zone for t in scene.things})
                assert sentence.says == (said,), raw
                assert meant(scene, said) == [index], raw
                assert refers_to(scene, said) == index, raw
                used.update(k for k in ("colour", "size", "where", "landmark") if getattr(said, k) is not None)
    assert min(used.values()) > 10
    assert len(used) == 4


def test_the_first_sentence_needs_its_every_word(photos):
    for photo in photos:
        for index, (first, *_) in photo.sentences.items():
            raw = first.raw
            said = parse(normalise(raw), {t.zone for t in photo.scene.things})
            for name in ("colour", "size", "where"):
                if getattr(said, name) is not None:
                    less = replace(said, **{name: None}, **({"landmark": None} if name == "where" else {}))
                    assert refers_to(photo.scene, less) != index, (raw, name)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [(0, 0), (2, 2), (1, 3), (5, 5)])
def test_distractors_are_as_asked_for_and_recorded(wanted, tmp_path):
    made = synthesize(tmp_path, images=8, seed=3, distractors=wanted)
    refs = load(tmp_path)[1]
    assert made["refs"] == len(refs) >= 8
    counts = []
    for number in range(8):
        photo = make_photo(seed=3, number=number, distractors=wanted)
        for index in sorted(photo.sentences):  # refs are written in the order of the things
            me = photo.scene.things[index]
            kin = [t for t in photo.scene.things if t is not me and t.kind == me.kind]
            counts.append(sum(t.colour == me.colour or t.size == me.size for t in kin))
            assert similar(photo.scene, index) == counts[-1]
    assert [r["distractors"] for r in refs] == counts
    assert min(counts) >= wanted[0]
    assert max(counts) <= wanted[1]


def kinds_said(**options):
    """How often each kind of expression is said in photos; every sentence is true of its thing alone."""
    said = Counter()
    for number in range(options.pop("count")):
        photo = make_photo(seed=3, number=number, **options)
        for index, sentences in photo.sentences.items():
            assert len({normalise(sentence.raw) for sentence in sentences}) == len(sentences) <= 3
            for sentence in sentences:
                (expression,) = sentence.says
                assert parse(normalise(sentence.raw), {t.zone for t in photo.scene.things}) == expression
                assert refers_to(photo.scene, expression) == index
                said[expression_kind(expression)] += 1
    return said


@pytest.mark.parametrize("kind", ["attribute", "place", "zone", "rank", "relation"])
def test_a_kind_of_expression_alone(kind):
    assert kinds_said(count=4, expressions={kind: 0.5}).keys() == {kind}


def test_kinds_left_out_or_of_no_weight_are_never_said():
    said = kinds_said(count=20, expressions={"place": 1, "attribute": 2, "rank": 0})
    assert said.keys() == {"attribute", "place"} and min(said.values()) > 5


def test_the_first_of_a_kind_is_as_short_as_it_can_be():
    for number in range(10):
        photo = make_photo(seed=3, number=number, expressions={"place": 1})
        for index, (first, *_) in photo.sentences.items():
            (expression,) = first.says
            for name in ("colour", "size"):
                if getattr(expression, name) is not None:
                    assert refers_to(photo.scene, replace(expression, **{name: None})) != index


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "tolerance"),
    [
        ({"attribute": 1, "place": 1}, 0.1),
        ({"attribute": 2, "place": 1, "relation": 1}, 0.1),
        ({"place": 3, "rank": 1}, 0.1),
        (dict.fromkeys(["attribute", "place", "zone", "rank", "relation"], 1), 0.1),
    ],
)
def test_shares_of_the_kinds_are_near_their_weights(weights, tolerance):
    said = kinds_said(count=200, expressions=weights)
    assert said.total() > 700
    for kind, weight in weights.items():
        assert said[kind] / said.total() == pytest.approx(weight / sum(weights.values()), abs=tolerance), said


def test_expressions_are_recorded_and_their_order_does_not_matter(tmp_path):
    ways = [{"relation": 1, "attribute": 2, "rank": 0}, {"attribute": 2.0, "relation": 1.0}]
    for i, expressions in enumerate(ways):
        synthesize(tmp_path / str(i), images=3, seed=3, expressions=expressions)
    assert digests(tmp_path / "0") == digests(tmp_path / "1")
    info = load(tmp_path / "0")[0]["info"]
    assert info["expressions"] == {"attribute": 2.0, "relation": 1.0}
    synthesize(tmp_path / "none", images=1, seed=3)
    info = load(tmp_path / "none")[0]["info"]
    assert info == {"description": "generated by nemo-dali synth", "seed": 3, "distractors": [0, 3]}


@pytest.mark.parametrize(
    ("expressions", "message"),
    [
        ({"colour": 1}, r"expressions \('colour'\) must be weights of attribute, place, zone, rank, relation"),
        ({"place": -1}, r"expressions \(place=-1\) must have weights from 0 to 1e\+06"),
        ({"place": float("nan")}, r"\(place=nan\) must have weights"),
        ({"place": 1e300}, r"\(place=1e\+300\) must have weights"),
        ({"place": "1"}, r"\(place='1'\) must have weights"),
        ({}, r"expressions \({}\) must have a weight > 0, of attribute"),
        ({"place": 0}, r"expressions \({'place': 0}\) must have a weight > 0"),
        (["place"], r"expressions \(\['place'\]\) must be a mapping of weights, of attribute"),
    ],
)
def test_expressions_that_are_no_weights(tmp_path, expressions, message):
    with pytest.raises(ValueError, match=message):
        synthesize(tmp_path / "x", images=1, expressions=expressions)
    assert not (tmp_path / "x").exists()


def test_no_photo_of_that_kind(monkeypatch):
    monkeypatch.setattr(synthetic, "describe", lambda *_: [])
    monkeypatch.setattr(synthetic, "ATTEMPTS", 2)
    with pytest.raises(NemoError, match="ask for fewer, or for further kinds of expression"):
        make_photo(seed=0, number=0, expressions={"zone": 1})


def test_greyscale_photos_are_described_without_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "GREY_PHOTOS", 1.0)
    synthesize(tmp_path, images=6, seed=5)
    for path in tmp_path.rglob("*.jpg"):
        with Image.open(path) as photo:
            assert photo.mode == "L"
    for ref in load(tmp_path)[1]:
        for sentence in ref["sentences"]:
            assert not set(sentence["tokens"]) & {*PAINTS, "grey"}


def thing(kind, colour, size, x, y, half=20, zone="grass"):
    return Thing(kind, colour, size, zone, box=(x - half, y - half, x + half, y + half))


SCENE = Scene(
    400,
    400,
    "meadow",
    100,
    False,
    (
        thing("ball", "red", "small", 60, 300),
        thing("ball", "red", "big", 340, 300),
        thing("ball", "blue", "big", 172, 300),
        thing("cup", "red", "big", 60, 220),
        thing("star", "red", "big", 60, 40, zone="sky"),
    ),
)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (Expression("cup"), 3),
        (Expression("ball"), None),
        (Expression("house"), None),
        (Expression("ball", "blue"), 2),
        (Expression("ball", "red"), None),
        (Expression("ball", "red", "big"), 1),
        (Expression("ball", size="small"), 0),
        (Expression("ball", where="right"), 1),
        (Expression("ball", where="left"), None),  # of the blue ball, at 0.43, people would differ
        (Expression("ball", "red", where="left"), 0),
        (Expression("ball", where="middle"), 2),
        (Expression("ball", where="leftmost"), 0),
        (Expression("ball", size="big", where="leftmost"), 2),
        (Expression("ball", where="highest"), None),  # all are equally high
        (Expression("cup", where="leftmost"), None),  # there is only one
        (Expression("star", where="sky"), 4),
        (Expression("star", where="grass"), None),
        (Expression("star", where="top left"), 4),
        (Expression("star", where="top right"), None),
        (Expression("ball", where="below", landmark=Expression("cup")), None),  # the blue one is, somewhat
        (Expression("ball", "red", where="below", landmark=Expression("cup")), 0),
        (Expression("ball", where="above", landmark=Expression("cup")), None),
        (Expression("ball", where="right of", landmark=Expression("ball", "blue")), 1),
        (Expression("ball", where="right of", landmark=Expression("ball", "red")), None),  # which red ball?
    ],
)
def test_refers_to(expression, expected):
    assert refers_to(SCENE, expression) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (Expression("ball"), "attribute"),
        (Expression("ball", "red", "big"), "attribute"),
        (Expression("ball", where="top left"), "place"),
        (Expression("ball", where="middle"), "place"),
        (Expression("star", "red", where="sky"), "zone"),
        (Expression("ball", where="highest"), "rank"),
        (Expression("ball", where="above", landmark=Expression("cup")), "relation"),
    ],
)
def test_kinds_of_expression(expression, expected):
    assert expression_kind(expression) == expected


def test_fits_has_three_answers():
    def at(x):
        return replace(SCENE, things=(thing("ball", "red", "small", x, 200),))

    left = Expression("ball", where="left")
    assert [fits(at(x), 0, left) for x in (100, 168, 240)] == [YES, UNSURE, NO]


def test_in_front_and_behind_follow_what_hides_what():
    front, back = thing("cup", "red", "big", 100, 100), thing("ball", "red", "big", 120, 100)
    scene = replace(SCENE, things=(back, front), hides=frozenset({(1, 0)}))
    assert refers_to(scene, Expression("cup", where="in front of", landmark=Expression("ball"))) == 1
    assert refers_to(scene, Expression("ball", where="behind", landmark=Expression("cup"))) == 0
    assert refers_to(scene, Expression("ball", where="in front of", landmark=Expression("cup"))) is None
    touching = replace(scene, hides=frozenset())
    assert fits(touching, 1, Expression("cup", where="in front of", landmark=Expression("ball"))) == UNSURE
