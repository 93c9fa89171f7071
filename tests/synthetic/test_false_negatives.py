"""False negatives: by hand on a few photos, and against plain loops on generated data."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.errors import AnnotationError, FileFormatError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.table_writer import write_table
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.synthetic import synthesize
from nemo_dali.synthetic._scenes import NO, UNSURE, YES, Expression, Scene, Sentence, Thing, fits
from nemo_dali.synthetic._truth_file import photo_record, sentence_record, truth_content
from nemo_dali.synthetic.false_negatives import MOSAICS, false_negatives
from nemo_dali.synthetic.layouts import LAYOUTS
from nemo_dali.synthetic.truth import Truth
from tests.helpers.refer import write_refer
from tests.helpers.tables import write_ranked_table

PERSON, DOG = 1, 18
# Of each photo: what it shows (kind, colour, size, and how far to the right), the category of its ref's target, what
# the ref's sentence says, and the photos that are most similar to the sentence.
PHOTOS = [
    ([("ball", "red", "small", 0.15)], PERSON, Expression("ball", "red"), [1, 5, 4, 2, 3]),
    ([("ball", "red", "big", 0.42)], PERSON, Expression("ball", "red", "big"), [0, 5, 2, 3, 4]),
    ([("ball", "blue", "small", 0.15)], PERSON, Expression("ball", where="left"), [0, 1, 3, 4, 5]),
    ([("cup", "red", "small", 0.5)], DOG, Expression("cup"), [4, 0, 1, 2, 5]),
    ([], DOG, Expression("balloon", where="sky"), [0, 1, 2, 3, 5]),
    (
        [("ball", "red", "small", 0.15), ("ball", "blue", "small", 0.85)],
        PERSON,
        Expression("ball", where="leftmost"),
        [0, 2, 1, 3, 4],
    ),
]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hand")
    row = {1000 + 7 * i: i for i in range(len(PHOTOS))}

    def edit(refs, instances):
        for ref in refs:
            ref["category_id"] = PHOTOS[row[ref["image_id"]]][1]
            ref["sentences"] = ref["sentences"][:1]
            ref["sent_ids"] = ref["sent_ids"][:1]
        for annotation in instances["annotations"]:
            if not annotation["iscrowd"]:
                annotation["category_id"] = PHOTOS[row[annotation["image_id"]]][1]

    refer = write_refer(folder, photos=len(PHOTOS), refs_per_photo=1, edit=edit)
    annotations = read_refer(refer.root, dataset="refcoco", split_by="unc", split="train")
    index_dataset(annotations, images=refer.photos, output=folder / "a.ris.h5")
    dataset = Dataset.open(folder / "a.ris.h5")
    images, sentences = [], []
    for i, (shown, *_) in enumerate(PHOTOS):
        width, height = int(dataset.images.width[i]), int(dataset.images.height[i])
        things = []
        for kind, colour, size, right in shown:
            x = round(right * width)
            things.append(Thing(kind, colour, size, "grass", box=(x - 1, height - 4, x + 1, height - 2)))
        scene = Scene(width, height, "meadow", height // 2, False, tuple(things))
        images.append(photo_record(int(dataset.images.id[i]), scene, dict.fromkeys(range(len(things)), 1)))
    for ref in refer.refs:
        (sentence,) = ref["sentences"]
        said = Sentence(sentence["sent"], (PHOTOS[row[ref["image_id"]]][2],))
        sentences.append(sentence_record(sentence["sent_id"], ref["image_id"], [0], said))
    (folder / "truth.json").write_bytes(truth_content(images, sentences))
    neighbors = np.array([PHOTOS[i][3] for i in dataset.refs.image[dataset.sentences.ref]], np.int32)
    write_table(
        folder / "a.neg.h5",
        blocks=[(neighbors, np.tile(np.float32([0.5, 0.4, 0.3, 0.2, 0.1]), (len(neighbors), 1)))],
        text_embedding=np.ones((len(neighbors), 1), np.float32),
        image_embedding=np.ones((len(PHOTOS), 1), np.float32),
        depth=5,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="hand",
        pretrained="none",
        weights_hash="0" * 64,
        exclusions=["own photo"],
    )
    return folder / "a.ris.h5", folder / "a.neg.h5", Truth.read(folder)


def test_shares_by_hand(by_hand):
    """With K = 3 a mosaic's negatives are the first three photos, in some order, so shares are whole ninths."""
    found = false_negatives(*by_hand, policy=MosaicPolicy(top_k=3), mosaics=60)

    def mined(kind=None):
        s = found.mined if kind is None else found.mined_by_kind[kind]
        return s.negatives, *(round(18 * share, 9) for share in (s.words, s.fits, s.unsure, s.category))

    # Words: of "red ball" photos 1 and 5, of "ball on the left" 0 and 1, of "leftmost ball" 0, 2 and 1. All is said of
    # 1 and 5, and of 0; on the ball of 1, at 0.42, people would differ; and no ball is the leftmost of one.
    assert mined() == (180, 7, 3, 1, 11)
    assert mined("attribute") == (90, 4, 4, 0, 12)
    assert mined("place") == (30, 12, 6, 6, 12)
    assert mined("zone") == (30, 0, 0, 0, 0)
    assert mined("rank") == (30, 18, 0, 0, 18)
    assert [*found.mined_by_kind] == [*found.random_by_kind] == ["attribute", "place", "zone", "rank"]


def test_random_negatives_are_drawn_from_all_photos(by_hand):
    found = false_negatives(*by_hand, policy=MosaicPolicy(top_k=3))
    random = found.random
    assert random.negatives == found.mined.negatives == 3 * MOSAICS
    expected = {"words": 8 / 30, "fits": 4 / 30, "unsure": 1 / 30, "category": 14 / 30}
    for name, share in expected.items():
        assert getattr(random, name) == pytest.approx(share, abs=0.01), name
    assert found.random_by_kind["rank"].words == pytest.approx(3 / 5, abs=0.02)


def test_a_bound_leaves_false_negatives_out(by_hand):
    """The first two photos are no candidates then; three are left."""
    found = false_negatives(*by_hand, policy=MosaicPolicy(top_k=3, max_similarity=0.35), mosaics=60)
    assert round(18 * found.mined.words, 9) == 2  # photo 5 for "ball on the left", and 1 for "leftmost ball"


def test_only_the_window_and_the_grids_of_a_policy_matter(by_hand):
    policy = MosaicPolicy(top_k=3)
    others = replace(policy, p_mined=0.1, p_random=0.9, mine_after_epoch=9, jitter=0.5, target_cell="positional")
    assert false_negatives(*by_hand, policy=policy, mosaics=60) == false_negatives(*by_hand, policy=others, mosaics=60)
    another = false_negatives(*by_hand, policy=MosaicPolicy(top_k=5), seed=1, mosaics=60)
    assert another != false_negatives(*by_hand, policy=MosaicPolicy(top_k=5), seed=0, mosaics=60)


def test_the_table_of_shares(by_hand):
    found = false_negatives(*by_hand, policy=MosaicPolicy(top_k=3), mosaics=60)
    lines = str(found).splitlines()
    assert lines[0].split() == ["negatives", "number", "words", "fit", "all", "fits", "unsure", "category"]
    assert lines[1].split() == ["mined", "180", "38.9%", "16.7%", "5.6%", "61.1%"]
    assert [line[:20].strip() for line in lines[3:5]] == ["mined, attribute", "random, attribute"]
    assert len(lines) == 3 + 2 * 4 and max(map(len, lines)) <= 80
    none = replace(found, mined=replace(found.mined, category=float("nan")))
    assert str(none).splitlines()[1].split()[-1] == "-"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    synthesize(folder / "data", images=40, seed=5, layout="grefcoco")
    annotations = read_refer(folder / "data", dataset="grefcoco", split_by="unc", split="train")
    photos = folder / "data" / LAYOUTS["grefcoco"].photos
    index_dataset(annotations, images=photos, output=folder / "a.ris.h5")
    write_ranked_table(folder / "a.neg.h5", Dataset.open(folder / "a.ris.h5"))
    return folder


@pytest.mark.parametrize("kind", ["mined", "random"])
def test_generated_data_against_plain_loops_over_what_a_loader_draws(generated, kind):
    files = generated / "a.ris.h5", generated / "a.neg.h5"
    policy = MosaicPolicy(top_k=9, max_similarity=0.2, grids={2: 0.5, 3: 0.5})
    found = false_negatives(*files, Truth.read(generated / "data"), policy=policy, seed=3, mosaics=100)
    told = json.loads((generated / "data" / "grefcoco" / "truth.json").read_text())
    scenes = {}
    for image in told["images"]:
        things = [
            Thing(*(t[k] for k in ("kind", "colour", "size", "zone")), box=tuple(t["box"])) for t in image["things"]
        ]
        hides = frozenset(map(tuple, image["hides"]))
        scenes[image["id"]] = (
            Scene(image["width"], image["height"], "", 0, image["grey"], tuple(things), hides),
            [i for i, t in enumerate(image["things"]) if t["ann_id"] is not None],
        )
    sentences = {sentence["sent_id"]: sentence for sentence in told["sentences"]}
    names = {
        c["name"]: c["id"] for c in json.loads((generated / "data/grefcoco/instances.json").read_text())["categories"]
    }
    loader = Loader(
        *files, batch_size=1, policy=replace(policy, p_mined=kind == "mined", p_random=kind == "random"), seed=3
    )
    dataset = Dataset.open(files[0])
    counts = {}
    for epoch, position in [(i // len(dataset.refs.image), i % len(dataset.refs.image)) for i in range(100)]:
        (row,) = loader.plan(epoch, [position])
        sentence = sentences[dataset.sentences.sent_id[row["sentence"]]]
        for cell, photo in enumerate(row["images"]):
            if photo < 0 or cell == row["cell"]:
                continue
            scene, seen = scenes[dataset.images.id[photo]]
            words, answers = True, []
            for said in sentence["expressions"]:
                landmark = Expression(**said["landmark"]) if "landmark" in said else None
                expression = Expression(**{**said, "landmark": landmark})
                bare = replace(expression, where=None, landmark=None)
                words &= any(fits(scene, i, bare) == YES for i in seen)
                answers.append(max((fits(scene, i, expression) for i in seen), default=NO))
            category = dataset.refs.category[row["ref"]]
            shown = {names[scene.things[i].kind] for i in seen}
            is_shown = None if category < 0 else bool(dataset.category_id[category] in shown)
            for name in ("", sentence["expression_kind"]):
                counts.setdefault(name, []).append((words, min(answers) == YES, min(answers) == UNSURE, is_shown))
    loader.close()
    overall, by_kind = (found.mined, found.mined_by_kind) if kind == "mined" else (found.random, found.random_by_kind)
    assert {"attribute", "place", "several"} <= {*counts}
    for name, rows in counts.items():
        shares = overall if not name else by_kind[name]
        assert shares.negatives == len(rows)
        for i, field in enumerate(("words", "fits", "unsure", "category")):
            values = [row[i] for row in rows if row[i] is not None]
            assert getattr(shares, field) == pytest.approx(np.mean(values)) if values else np.isnan(shares.category)
    assert 0 < overall.fits < overall.words < 1


def test_other_files_are_refused(generated, by_hand):
    files = generated / "a.ris.h5", generated / "a.neg.h5"
    with pytest.raises(AnnotationError, match="does not have"):
        false_negatives(*files, by_hand[2], policy=MosaicPolicy())
    with pytest.raises(FileFormatError, match="mined for a different data set"):
        false_negatives(files[0], by_hand[1], Truth.read(generated / "data"), policy=MosaicPolicy())
