"""No cell of any kind shows a photo that is excluded, be it for every sentence or for this ref."""

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.kernels.plan.rows import MINED, RANDOM, SINGLE
from nemo_dali.loader.sources import Corpus
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.table_writer import write_table
from nemo_dali.plan.part import Part
from nemo_dali.plan.planner import Planner, ShortPools
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.files import make_files
from tests.helpers.plans import make_part

GRIDS = {"grids": {2: 1.0, 3: 1.0}, "top_k": 12}
POLICIES = {
    "mined": MosaicPolicy(p_mined=1, max_similarity=0.4, **GRIDS),
    "random": MosaicPolicy(p_mined=0, p_random=1, **GRIDS),
    "both": MosaicPolicy(p_mined=0.5, p_random=0.5, **GRIDS),
    "warm-up": MosaicPolicy(p_mined=1, mine_after_epoch=3, **GRIDS),
    "short pool": MosaicPolicy(p_mined=1, max_similarity=-0.9, **GRIDS),
}
RULES = ["category", "twins", "similar"]
ROWS = 20_000  # of two, four or nine cells each: more than 100,000 in all


def part_without(seed, share=0.3):
    """A data set whose table excludes some photos, from its rows too."""
    part = make_part(seed=seed)
    excluded = np.random.default_rng(seed).random(part.photos) < share
    neighbors, similarity = np.full_like(part.neighbors, -1), np.full_like(part.similarity, -np.inf)
    for row, candidates in enumerate(part.neighbors):
        kept = (candidates >= 0) & ~excluded[candidates]
        neighbors[row, : kept.sum()], similarity[row, : kept.sum()] = candidates[kept], part.similarity[row][kept]
    return Part(**{**vars(part), "neighbors": neighbors, "similarity": similarity, "excluded": excluded})


def negatives(rows):
    """Photos of all cells but the target's."""
    shown = rows["images"] >= 0
    shown[np.arange(len(rows)), rows["cell"]] = False
    return rows["images"][shown]


@pytest.mark.parametrize("bad_share", [0, 0.2])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("kind", POLICIES)
def test_no_excluded_photo_is_shown(kind, sets, bad_share):
    parts = [part_without(seed) for seed in range(sets)]
    excluded = np.concatenate([part.excluded for part in parts])
    planner = Planner(parts, POLICIES[kind], seed=3, size=64)
    for epoch in (0, 5):
        rows = planner.plan(epoch, np.arange(ROWS))
        if bad_share:
            bad = np.random.default_rng(9).random(len(excluded)) < bad_share
            rows, replaced = planner.substitute(epoch, rows, bad)
            assert replaced.negatives > 1000 and not bad[negatives(rows)].any()
        assert kind != "warm-up" or set(rows["kind"]) == ({RANDOM} if epoch == 0 else {MINED})
        shown = negatives(rows)
        assert len(shown) + ROWS > 100_000 and not excluded[shown].any()
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows["images"][:2000])
        often = np.bincount(shown, minlength=len(excluded))
        assert (often[~excluded & (~bad if bad_share else True)] > 0).all()  # whatever is left is drawn
        if kind == "random" and not bad_share and sets == 1:
            assert often[~excluded].std() / often[~excluded].mean() < 0.1  # and drawn alike


def test_random_photos_are_words_among_the_photos_left():
    """The specification, in plain Python."""
    part = part_without(0)
    rows = Planner([part], POLICIES["random"], seed=3, size=64).plan(1, np.arange(200))
    for row in rows:
        words = np.random.Philox(key=[3, 1], counter=[0, int(row["position"]), 0, 0]).random_raw(16)
        own, found = row["images"][row["cell"]], []
        for k in range(row["grid"].astype(int) ** 2 - 1):
            left = [n for n in range(part.photos) if not part.excluded[n] and n != own and n not in found]
            found.append(left[int(words[8 + k]) * len(left) >> 64])
        cell = int(row["cell"])
        assert [n for n in row["images"] if n >= 0] == [*found[:cell], own, *found[cell:]]


@pytest.mark.parametrize("kind", POLICIES)
def test_a_table_that_excludes_nothing_gives_the_rows_of_before(kind):
    part = make_part(seed=1)
    none = Part(**{**vars(part), "excluded": np.zeros(part.photos, bool)})
    plain, same = (Planner([p], POLICIES[kind], seed=3, size=64) for p in (part, none))
    assert plain.plan(0, np.arange(ROWS)).tobytes() == same.plan(0, np.arange(ROWS)).tobytes()
    bad = np.random.default_rng(9).random(part.photos) < 0.2
    rows = plain.plan(0, np.arange(2000))
    assert plain.substitute(0, rows, bad)[0].tobytes() == same.substitute(0, rows, bad)[0].tobytes()


def test_too_many_excluded_photos_are_told_with_their_number():
    part = make_part(seed=1)
    few = np.arange(part.photos) >= 8
    with pytest.raises(NemoError, match=r"needs 9 photos, but a negative table excludes 82 of its data set's 90"):
        Planner([Part(**{**vars(part), "excluded": few})], POLICIES["random"], seed=3, size=64)
    single = MosaicPolicy(p_mined=0, p_random=0)
    Planner([Part(**{**vars(part), "excluded": np.ones(part.photos, bool)})], single, seed=3, size=64)


def test_the_exclusions_of_a_file_reach_the_plan(tmp_path):
    files = make_files(tmp_path, photos=24)
    dataset, old = Dataset.open(files.dataset), NegativeTable.open(files.negatives)
    excluded = np.arange(24) % 3 == 0
    neighbors, similarity = np.full_like(old.neighbors, -1), np.full_like(old.similarity, -np.inf)
    for row, candidates in enumerate(old.neighbors):
        kept = candidates[~excluded[candidates]]
        neighbors[row, : len(kept)], similarity[row, : len(kept)] = kept, old.similarity[row, : len(kept)]
    write_table(
        tmp_path / "excluding.neg.h5",
        blocks=[(neighbors, similarity)],
        text_embedding=old.text_embedding,
        image_embedding=old.image_embedding,
        depth=old.depth,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="random",
        pretrained="none",
        weights_hash="",
        exclusions=[],
        excluded_photos=excluded,
    )
    corpus = Corpus([files.dataset], [tmp_path / "excluding.neg.h5"], [])
    policy = POLICIES["both"]
    parts = [part.under(policy, samples="refs") for part in corpus.parts()]
    rows = Planner(parts, policy, seed=3, size=64).plan(0, np.arange(5000))
    assert not excluded[negatives(rows)].any()


def rules_of(part, seed, *, similar=0.7):
    """Categories, twins and embeddings for a data set, and which photos they forbid: bool [refs, photos]."""
    rng = np.random.default_rng(seed)
    refs, photos = len(part.ref_image), part.photos
    shown = rng.random((photos, 7)) < [0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    category = rng.integers(-1, 7, refs).astype(np.int32)
    twins = np.arange(photos, dtype=np.int32)
    for members in rng.permutation(photos)[:12].reshape(4, 3):
        twins[members] = members[0]
    embedding = rng.standard_normal((photos // 6, 32))[rng.integers(0, photos // 6, photos)]  # scenes
    embedding = embedding + 0.3 * rng.standard_normal((photos, 32))
    embedding = (embedding / np.linalg.norm(embedding, axis=1, keepdims=True)).astype(np.float32)
    own = part.ref_image
    rules = {
        "category": {"category": category, "shown": shown},
        "twins": {"twins": twins},
        "similar": {"embedding": embedding, "similar_above": similar},
    }
    forbidden = {
        "category": shown.T[category] & (category >= 0)[:, None],
        "twins": twins[own, None] == twins,
        "similar": (embedding.astype(np.float64) @ embedding.T.astype(np.float64))[own] > similar,
    }
    forbidden["twins"][np.arange(refs), own] = forbidden["similar"][np.arange(refs), own] = False
    return rules, forbidden


def part_with_rules(names, seed, photo_wide):
    """A data set with these rules, whose table obeys them, and what they forbid: bool [refs, photos]."""
    part = part_without(seed) if photo_wide else make_part(seed=seed)
    rules, all_forbidden = rules_of(part, seed)
    forbidden = np.logical_or.reduce([all_forbidden[name] for name in names])
    if photo_wide:
        forbidden = forbidden | part.excluded
    neighbors, similarity = np.full_like(part.neighbors, -1), np.full_like(part.similarity, -np.inf)
    ref = np.repeat(np.arange(len(part.ref_image)), part.sentence_count)
    for row, candidates in enumerate(part.neighbors):
        kept = (candidates >= 0) & ~forbidden[ref[row], candidates]
        neighbors[row, : kept.sum()], similarity[row, : kept.sum()] = candidates[kept], part.similarity[row][kept]
    more = {key: value for name in names for key, value in rules[name].items()}
    return Part(**{**vars(part), "neighbors": neighbors, "similarity": similarity, **more}), forbidden


def refs_and_negatives(rows):
    """The ref and the photo of each cell but the targets'."""
    shown = rows["images"] >= 0
    shown[np.arange(len(rows)), rows["cell"]] = False
    return np.repeat(rows["ref"], shown.sum(1)), rows["images"][shown]


@pytest.mark.parametrize("bad_share", [0, 0.2])
@pytest.mark.parametrize("names", [["category"], ["twins"], ["similar"], RULES], ids="+".join)
@pytest.mark.parametrize("kind", POLICIES)
def test_no_photo_is_shown_that_is_excluded_for_its_ref(kind, names, bad_share):
    (one, forbidden), (two, more) = (part_with_rules(names, seed, photo_wide=seed == 1) for seed in range(2))
    planner = Planner([one, two], POLICIES[kind], seed=3, size=64)
    bad = np.random.default_rng(9).random(one.photos + two.photos) < bad_share
    for epoch in (0, 5):
        rows = planner.plan(epoch, np.arange(ROWS))
        if bad_share:
            rows, replaced = planner.substitute(epoch, rows, bad)
            assert replaced.negatives > 1000 and not bad[negatives(rows)].any()
        ref, photo = refs_and_negatives(rows)
        assert len(ref) + ROWS > 100_000
        first = ref < len(one.ref_image)
        assert set(photo[first]) <= set(range(one.photos)) and photo[~first].min() >= one.photos
        assert not forbidden[ref[first], photo[first]].any()
        assert not more[ref[~first] - len(one.ref_image), photo[~first] - one.photos].any()
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows["images"][:2000])


def test_categories_leave_the_other_photos_equally_likely():
    part, forbidden = part_with_rules(["category"], 0, photo_wide=False)
    rows = Planner([part], POLICIES["random"], seed=3, size=64).plan(0, np.arange(200_000))
    ref, photo = refs_and_negatives(rows)
    for category in range(-1, 7):
        mine = part.category[ref] == category
        often = np.bincount(photo[mine], minlength=part.photos)
        # The own photo is left out too, which differs from ref to ref: each is allowed for nearly all.
        left = ~forbidden[np.flatnonzero(part.category == category)[0]] & (often > 0)
        assert left.sum() == (~forbidden[np.flatnonzero(part.category == category)[0]]).sum()
        assert often[left].std() / often[left].mean() < 0.15


def test_rows_under_all_rules_equal_the_plain_python_specification():
    part, forbidden = part_with_rules(RULES, 1, photo_wide=True)
    rows = Planner([part], POLICIES["random"], seed=3, size=64).plan(1, np.arange(2000))
    met = 0
    for row in rows:
        words = np.random.Philox(key=[3, 1], counter=[0, int(row["position"]), 0, 0]).random_raw(16)
        own, found, used = row["images"][row["cell"]], [], [row["images"][row["cell"]]]
        category = part.category[row["ref"]]
        free = [
            n for n in range(part.photos) if not part.excluded[n] and not (category >= 0 and part.shown[n, category])
        ]
        for k in range(row["grid"].astype(int) ** 2 - 1):
            left = [n for n in free if n not in used]
            place = free.index(left[int(words[8 + k]) * len(left) >> 64])
            while forbidden[row["ref"], free[place]] or free[place] in used:  # it gives way to the next
                met += 1
                place = (place + 1) % len(free)
            found.append(free[place])
            used.append(free[place])
        cell = int(row["cell"])
        assert [n for n in row["images"] if n >= 0] == [*found[:cell], own, *found[cell:]]
    assert met > 500


def test_where_no_photo_is_left_the_target_is_shown_alone_and_counted():
    part = make_part(seed=1)
    shown = np.zeros((part.photos, 2), bool)
    shown[3:, 0] = True  # three photos are left for category 0: too few for a 3x3, and for a 2x2 of one of their own
    category = (np.arange(len(part.ref_image)) % 2).astype(np.int32)
    part = Part(**{**vars(part), "category": category, "shown": shown})
    policy = MosaicPolicy(p_mined=0, p_random=1, grids={2: 1.0, 3: 1.0})
    planner = Planner([part], policy, seed=3, size=64)
    rows, met = planner.draw(0, np.arange(5000))
    short = ShortPools.of(met)
    single = rows["kind"] == SINGLE
    assert planner.grids == {1, 2, 3} and short.single == single.sum() > 1000 and short.last_valid == 0
    assert set(category[rows["ref"][single]]) == {0}
    assert (rows["images"][single, 0] == part.ref_image[rows["ref"][single]]).all()
    assert (rows["images"][single, 1:] == -1).all() and (rows["center"][single] == -1).all()
    shrunk = rows["grid"] == 2
    assert ((category[rows["ref"]] == 0) & shrunk).any()  # three are enough there
    assert "exclusions leave too few photos" in str(short) and "max_similarity" not in str(short)
    # Bad photos can leave too few as well: then too, not an error.
    bad = np.zeros(part.photos, bool)
    bad[1] = True
    replaced, _ = planner.substitute(0, rows, bad)
    assert (category[replaced["ref"][replaced["kind"] != SINGLE]] == 1).all()
    assert not bad[negatives(replaced)].any()


def test_too_many_twins_are_told_with_their_number():
    part = make_part(seed=1)
    twins = np.maximum(np.arange(part.photos, dtype=np.int32) - part.photos + 8, 0)
    with pytest.raises(NemoError, match=r"needs 9 photos, but of the 90 that a data set has 83 are one and the same"):
        Planner([Part(**{**vars(part), "twins": twins})], POLICIES["random"], seed=3, size=64)
