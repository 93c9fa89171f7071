"""The approximate first stage: what it finds is ranked exactly, and what it misses is measured."""

import sys

import numpy as np
import pytest

from nemo_dali.distributed.ranks import Ranks
from nemo_dali.errors import NemoError
from nemo_dali.mining.approximate import ApproximateRanker, list_count, recall_places
from nemo_dali.mining.job import mine
from nemo_dali.mining.ranking import Excluded, Ranker
from nemo_dali.mining.table import NegativeTable
from tests.helpers.files import make_noise
from tests.helpers.rankings import unit


def clustered(rng, photos, width, groups=40):
    """Embeddings with structure, as those of photos have."""
    centre = unit(rng, groups, width)
    image = centre[rng.integers(0, groups, photos)] + 0.6 * unit(rng, photos, width)
    return image / np.linalg.norm(image, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def embeddings():
    rng = np.random.default_rng(0)
    image = clustered(rng, 6000, 64)
    text = image[rng.integers(0, 6000, 90)] + 0.5 * unit(rng, 90, 64)
    return (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32), image.astype(np.float32)


def searches(embeddings, probes, **options):
    text, image = embeddings
    ranker = Ranker(text, image, np.arange(90) // 3 * 7, depth=100, ref=np.arange(90) // 3, **options)
    return ranker, ApproximateRanker(ranker, text, image, probes=probes, ranks=Ranks())


@pytest.mark.slow
def test_with_all_lists_nothing_is_missed(embeddings):
    ranker, search = searches(embeddings, list_count(6000))
    exact, found = ranker.rank(0, 90), search.rank(0, 90)
    assert found.neighbors.tobytes() == exact.neighbors.tobytes()
    assert found.similarity.tobytes() == exact.similarity.tobytes()
    assert (found.own_rank <= exact.own_rank).all()
    assert search.recall().tolist() == [[10, 1], [100, 1]]


def test_what_is_found_is_ranked_exactly_and_what_is_missed_is_measured(embeddings):
    ranker, search = searches(embeddings, 4)
    exact, found = ranker.rank(0, 90), search.rank(0, 90)
    shares = []
    for row in range(90):
        of_exact, of_found = (
            dict(zip(block.neighbors[row].tolist(), block.similarity[row].tolist(), strict=True))
            for block in (exact, found)
        )
        common = of_exact.keys() & of_found.keys()
        shares.append(len(common) / 100)
        assert all(of_exact[photo] == of_found[photo] for photo in common)
    assert (found.similarity[:, 1:] <= found.similarity[:, :-1]).all()
    assert 0.5 < np.mean(shares) < 0.999
    places, recall = search.recall().T
    assert places.tolist() == [10, 100] and recall[1] == pytest.approx(np.mean(shares))
    assert searches(embeddings, 16)[1].recall()[1, 1] > recall[1]


def test_exclusions_hold_and_rows_are_filled_up_behind_them(embeddings):
    rng = np.random.default_rng(1)
    never = rng.random(6000) < 0.9
    for rules in ({"siblings_above": 0.8}, {"crops_margin": 0.0}):
        excluded = Excluded(never=never, **rules)
        options = {"excluded": excluded, "crop_embedding": unit(rng, 18_000, 64)}
        ranker, search = searches(embeddings, list_count(6000), **options)
        exact, found = ranker.rank(0, 90), search.rank(0, 90)
        assert found.neighbors.tobytes() == exact.neighbors.tobytes()
        assert not never[found.neighbors[found.neighbors >= 0]].any()


@pytest.mark.parametrize(
    ("photos", "lists"), [(2, 1), (39, 1), (100, 2), (6000, 128), (10**6, 4096), (5 * 10**6, 8192)]
)
def test_how_many_lists(photos, lists):
    assert list_count(photos) == lists
    assert lists * 39 <= max(photos, 39)


def test_where_recall_is_measured():
    assert recall_places(1000) == [10, 100, 1000] and recall_places(50) == [10, 50] and recall_places(4) == [4]


@pytest.mark.slow
def test_a_table_says_how_it_was_searched(clip, tmp_path, monkeypatch):
    dataset = make_noise(tmp_path, photos=90, each=1)
    options = {
        "model": str(clip[0] / "tiny.json"),
        "pretrained": str(clip[0] / "tiny.pt"),
        "device": "cpu",
        "depth": 20,
    }
    mine(dataset, output=tmp_path / "exact.neg.h5", **options)
    report = mine(dataset, output=tmp_path / "a.neg.h5", approximate=True, probes=1, **options)
    table = NegativeTable.open(tmp_path / "a.neg.h5")
    assert table.method == "FAISS IVF2,SQ8, 1 probes, re-ranked exactly"
    assert table.recall[:, 0].tolist() == [10, 20] and ((0 < table.recall[:, 1]) & (table.recall[:, 1] <= 1)).all()
    assert report.recall == tuple(map(tuple, table.recall.tolist()))
    assert "the approximate search finds" in str(report)
    whole = mine(dataset, output=tmp_path / "b.neg.h5", approximate=True, probes=99, **options)
    assert whole.recall == ((10, 1.0), (20, 1.0))
    exact = NegativeTable.open(tmp_path / "exact.neg.h5")
    np.testing.assert_array_equal(NegativeTable.open(tmp_path / "b.neg.h5").neighbors, exact.neighbors)


def test_without_faiss_it_is_told_how_to_install_it(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    dataset = make_noise(tmp_path, photos=9)
    options = {"model": str(clip[0] / "tiny.json"), "pretrained": str(clip[0] / "tiny.pt"), "device": "cpu"}
    with pytest.raises(NemoError, match=r"pip install 'nemo-dali\[faiss\]'"):
        mine(dataset, output=tmp_path / "a.neg.h5", approximate=True, **options)
    assert not list(tmp_path.glob("a.neg.h5*"))
