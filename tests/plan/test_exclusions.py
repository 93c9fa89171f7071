"""No cell of any kind shows a photo that the table excludes for every sentence."""

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import NemoError
from nemo_dali.kernels.plan.rows import MINED, RANDOM
from nemo_dali.loader.sources import Corpus
from nemo_dali.mining.table import NegativeTable
from nemo_dali.mining.table_writer import write_table
from nemo_dali.plan.planner import Part, Planner
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
    rows = Planner(corpus.parts(policy), policy, seed=3, size=64).plan(0, np.arange(5000))
    assert not excluded[negatives(rows)].any()
