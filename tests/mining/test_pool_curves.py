"""The curves over tau and K, from their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.kernels.ranking.pools import draws_reference, move_windows
from nemo_dali.mining import pool_curves
from nemo_dali.mining.pool_curves import DRAWN, measure_curves, tau_grid
from nemo_dali.mining.table import NegativeTable
from tests.helpers.counts import examples
from tests.helpers.files import index_grefs, index_refer, make_files
from tests.helpers.said import by_definition, say
from tests.helpers.tables import write_ranked_table


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset.open(index_refer(tmp_path_factory.mktemp("curves"), photos=30))


@pytest.mark.parametrize("shorten", [False, True])
@pytest.mark.parametrize("depth", [1000, 12])
def test_curves_follow_their_definitions(dataset, tmp_path, depth, shorten):
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset, depth=depth, shorten=shorten)
    found = measure_curves(dataset, table)
    sentences, width = table.neighbors.shape
    np.testing.assert_array_equal(found.rows, np.arange(sentences))
    assert found.ks[-1] == width and (np.diff(found.ks) > 0).all()
    own = dataset.refs.image[dataset.sentences.ref]
    true = np.einsum("nd,nd->n", table.text_embedding, table.image_embedding[own])
    np.testing.assert_allclose(found.true, true, atol=1e-6)
    category, shown = dataset.refs.category[dataset.sentences.ref], dataset.shown_categories()
    assert found.shown_by_chance == pytest.approx(np.mean([shown[:, c].mean() for c in category]))
    assert found.labelled == 1
    weight = 1 / dataset.refs.sentence_count[dataset.sentences.ref]
    for t in range(0, len(found.taus), 5):
        assert found.true_below[t] == pytest.approx((true <= found.taus[t]).mean())
        for c, k in enumerate(found.ks):
            pools, cut, counts = [], 0, np.zeros(len(dataset.images.id))
            for row in range(sentences):
                pool = [
                    (photo, value)
                    for photo, value in zip(table.neighbors[row], table.similarity[row], strict=True)
                    if photo >= 0 and value <= found.taus[t]
                ][:k]
                whole = table.neighbors[row, -1] < 0 or width == len(dataset.images.id) - 1
                cut += len(pool) < k and not whole
                pools.append(pool)
                for photo, _ in pool:
                    counts[photo] += weight[row] / len(pool)
            sizes = np.array([len(pool) for pool in pools])
            assert found.size[t, c] == np.median(sizes)
            assert found.empty[t, c] == pytest.approx((sizes == 0).mean())
            assert found.short3[t, c] == pytest.approx((sizes < 3).mean())
            assert found.short8[t, c] == pytest.approx((sizes < 8).mean())
            assert found.cut[t, c] == pytest.approx(cut / sentences)
            flat = [(row, photo, value) for row, pool in enumerate(pools) for photo, value in pool]
            if flat:
                assert found.similarity[t, c] == pytest.approx(np.mean([value for *_, value in flat]), abs=1e-6)
                assert found.shown[t, c] == pytest.approx(np.mean([shown[p, category[row]] for row, p, _ in flat]))
                most = [np.sort(counts)[::-1][: max(1, round(s * len(counts)))].sum() / counts.sum() for s in DRAWN]
                np.testing.assert_allclose(found.drawn[t, c], most, atol=1e-9)
            else:
                assert np.isnan(found.similarity[t, c]) and np.isnan(found.shown[t, c])
            assert found.never[t, c] == pytest.approx((counts == 0).mean())
    for rank, quantiles in zip(found.ranks, found.rank_quantiles, strict=True):
        values = table.similarity[:, rank - 1]
        np.testing.assert_allclose(quantiles, np.quantile(values[np.isfinite(values)], pool_curves.QUANTILES))


def test_candidates_that_another_sentence_says_to_fit_are_counted(tmp_path, monkeypatch):
    dataset = Dataset.open(index_refer(tmp_path, photos=30, edit=say))
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset, depth=12, shorten=True)
    for most in (1000, 20):
        monkeypatch.setattr(pool_curves, "SAID", most)
        found = measure_curves(dataset, table)
        some = np.unique(np.linspace(0, len(found.rows) - 1, min(most, len(found.rows))).astype(int))
        for t in range(0, len(found.taus), 7):
            for c, k in enumerate(found.ks):
                hits = []
                for row in found.rows[some]:
                    photos = by_definition(dataset, row)
                    pool = [
                        photo
                        for photo, value in zip(table.neighbors[row], table.similarity[row], strict=True)
                        if photo >= 0 and value <= found.taus[t]
                    ][:k]
                    hits += [] if photos is None else [photo in photos for photo in pool]
                expected = np.mean(hits) if hits else np.nan
                assert found.known_false[t, c] == pytest.approx(expected, nan_ok=True)
    assert 0 < found.known_false[-1, -1] < 1


def test_sentences_without_a_target_are_measured_apart(tmp_path, monkeypatch):
    """Their own photo shows nothing of what they say."""
    dataset = Dataset.open(index_grefs(tmp_path))
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset, depth=9, shorten=True)
    found = measure_curves(dataset, table)
    none = dataset.refs.empty[dataset.sentences.ref] == 1
    np.testing.assert_array_equal(found.rows, np.flatnonzero(~none))
    np.testing.assert_array_equal(found.no_target.rows, np.flatnonzero(none))
    own = table.image_embedding[dataset.refs.image[dataset.sentences.ref]]
    true = np.einsum("nd,nd->n", table.text_embedding, own)[~none]
    np.testing.assert_allclose(found.true, true, atol=1e-6)
    np.testing.assert_allclose(found.true_below, (true[:, None] <= found.taus).mean(axis=0))
    assert found.labelled == 1
    for curves in (found, found.no_target):
        similarity = np.asarray(table.similarity[curves.rows])
        for t in range(0, len(found.taus), 6):
            for c, k in enumerate(found.ks):
                size = np.minimum(((similarity <= found.taus[t]) & np.isfinite(similarity)).sum(axis=1), k)
                assert curves.size[t, c] == np.median(size)
                for name, least in (("empty", 1), ("short3", 3), ("short8", 8)):
                    assert getattr(curves, name)[t, c] == pytest.approx((size < least).mean())
    assert found.taus[-1] > np.asarray(table.similarity).max()
    monkeypatch.setattr(pool_curves, "SAMPLE", 5)
    few = measure_curves(dataset, table)
    assert len(few.rows) == len(few.no_target.rows) == 5 and set(few.no_target.rows) <= set(found.no_target.rows)


def test_without_any_target_nothing_can_be_measured(tmp_path):
    dataset = Dataset.open(index_grefs(tmp_path, none=1))
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset)
    with pytest.raises(NemoError, match=r"No sentence of .* has a target.* Write a policy file by hand"):
        measure_curves(dataset, table)


def test_a_large_table_is_looked_at_in_part(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_curves, "SAMPLE", 20)
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset)
    found = measure_curves(dataset, table)
    sentences = len(table.neighbors)
    assert len(found.rows) == 20 and found.rows[0] == 0 and found.rows[-1] == sentences - 1
    assert np.ptp(np.diff(found.rows)) <= 1
    monkeypatch.setattr(pool_curves, "SAMPLED_CELLS", 5 * table.neighbors.shape[1])
    assert len(measure_curves(dataset, table).rows) == 5


def test_another_data_set_is_refused(dataset, tmp_path):
    other = make_files(tmp_path / "other")
    with pytest.raises(FileFormatError, match="a different data set"):
        measure_curves(dataset, NegativeTable.open(other.negatives))


def test_without_categories(tmp_path):
    def forget(refs, instances):
        instances["categories"] = []

    dataset = Dataset.open(index_refer(tmp_path, edit=forget))
    found = measure_curves(dataset, write_ranked_table(tmp_path / "a.neg.h5", dataset))
    assert found.labelled == 0 and np.isnan(found.shown).all() and np.isnan(found.shown_by_chance)


def test_hardness_and_how_often_photos_are_told_apart(dataset, tmp_path):
    table = write_ranked_table(tmp_path / "a.neg.h5", dataset)
    found = measure_curves(dataset, table)
    assert 0.3 < found.told_apart < 0.7  # random embeddings
    unbounded = found.hardness[-1]
    assert (np.diff(unbounded) < 0).all() and unbounded[0] > 1 and abs(unbounded[-1]) < 0.5


@given(low=st.floats(-0.5, 0.4), span=st.floats(0.002, 1.0), rows=st.integers(1, 5))
def test_taus_are_round_and_span_the_similarities(low, span, rows):
    similarity = np.linspace(low + span, low, 50, dtype=np.float32)[None].repeat(rows, 0)
    taus = tau_grid(similarity, np.full(rows, 50))
    assert 2 <= len(taus) <= pool_curves.TAUS and (np.diff(taus) > 0).all()
    assert taus[-1] > similarity.max() and taus[0] <= similarity.min() + 1e-6
    np.testing.assert_allclose(np.diff(taus), taus[1] - taus[0], atol=1e-9)
    np.testing.assert_array_equal(taus, np.round(taus, 3))


def test_no_candidates_at_all():
    assert tau_grid(np.full((3, 4), -np.inf, np.float32), np.zeros(3, np.int64)).tolist() == [1.0]


@pytest.mark.fuzz
@settings(max_examples=examples(60))
@given(data=st.data(), rows=st.integers(1, 6), width=st.integers(1, 12), steps=st.integers(1, 6))
def test_moved_windows_count_as_new_ones(data, rows, width, steps):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    neighbors = np.array([rng.permutation(15)[:width] for _ in range(rows)], np.int32)
    weight = rng.uniform(0.1, 1, rows)
    counts, old = np.zeros(15), (np.zeros(rows, np.int64), np.zeros(rows, np.int64))
    for _ in range(steps):
        edges = np.sort(rng.integers(0, width + 1, (rows, 2)), axis=1)
        new = edges[:, 0].copy(), edges[:, 1].copy()
        move_windows(neighbors, *old, *new, weight, counts)
        np.testing.assert_allclose(counts, draws_reference(neighbors, *new, weight, 15), atol=1e-12)
        old = new
    assert counts.sum() == pytest.approx(weight[new[0] < new[1]].sum())
