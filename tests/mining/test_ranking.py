"""The ranking: NumPy's float64 ▸ the reference ▸ the kernels, for any blocks, exclusions and devices."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.kernels.ranking.ranking import Ranking, slack_of
from nemo_dali.kernels.ranking.reference import rank_reference, similarity_reference
from nemo_dali.kernels.ranking.rules import no_rules
from nemo_dali.mining import ranking
from nemo_dali.mining.ranking import Excluded, Ranker, first_not_finite, rank
from tests.helpers.counts import examples
from tests.helpers.lanes import lanes
from tests.helpers.rankings import check_ranking, unit


def ranked(ranker, *, most_rows=None, begin=0):
    """The whole ranking, from blocks."""
    blocks = [ranker.rank(*block) for block in ranker.blocks(begin=begin, most_rows=most_rows)]
    return tuple(np.concatenate(parts) for parts in zip(*(block[1:] for block in blocks), strict=True))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.fuzz
@settings(max_examples=examples(80), deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sentences=st.integers(1, 9),
    photos=st.integers(2, 40),
    width=st.integers(1, 70),
    depth=st.integers(1, 50),
    copies=st.booleans(),
)
def test_rank_is_the_brute_force_ranking(seed, sentences, photos, width, depth, copies):
    rng = np.random.default_rng(seed)
    text, image = unit(rng, sentences, width), unit(rng, photos, width)
    if copies:
        image = image[rng.integers(0, photos, photos)]
    own = rng.integers(0, photos, sentences).astype(np.int32)
    check_ranking(text, image, own, depth, *rank(text, image, own, depth=depth))


@pytest.mark.parametrize(("photos", "width", "depth"), [(3000, 64, 100), (20_000, 32, 1000), (500, 512, 499)])
def test_kernel_equals_its_reference_to_the_bit(photos, width, depth):
    rng = np.random.default_rng(photos)
    # The common direction of CLIP embeddings: similarities lie close together, far from zero.
    text, image = (unit(rng, n, width) * 0.5 + unit(np.random.default_rng(1), 1, width) for n in (40, photos))
    image[7], image[photos // 2] = image[photos - 1], image[photos - 1]
    own = rng.integers(0, photos, len(text)).astype(np.int32)
    expected = rank_reference(text, image, own, depth=depth)
    ranker = Ranker(text, image, own, depth=depth)
    (block,) = (ranker.rank(*block) for block in ranker.blocks())
    assert_same(block[1:], expected)
    check_ranking(text, image, own, depth, *expected[:2])


@pytest.mark.parametrize("block", [900, 200])
def test_proposing_scores_may_be_off_by_half_the_slack(block):
    """The matrix product only proposes: whatever it is off by, within its bound, the ranking stays exact."""
    rng = np.random.default_rng(0)
    text, image = unit(rng, 50, 64), unit(rng, 900, 64)
    own = rng.integers(0, 900, 50).astype(np.int32)
    expected = rank_reference(text, image, own, depth=40)
    scores = text @ image.T + rng.uniform(-0.02, 0.02, (50, 900)).astype(np.float32)
    with ThreadPoolExecutor(2) as pool:
        for slack, same in ((0.0401, True), (0.0, False)):
            ranking = Ranking(text, image, own, np.arange(51), depth=40, pool=pool, threads=2)
            for first in range(0, 900, block):
                some = np.ascontiguousarray(scores[:, first : first + block])
                ranking.take(some, first, np.float32(slack), no_rules())
            assert [np.array_equal(*pair) for pair in zip(ranking.result(), expected, strict=True)] == [same] * 3


def test_the_slack_bounds_what_any_order_of_summation_is_off_by():
    rng = np.random.default_rng(0)
    text, image = unit(rng, 200, 512), unit(rng, 300, 512)
    exact = text.astype(np.float64) @ image.astype(np.float64).T
    backwards = np.zeros_like(exact, np.float32)
    for column in range(511, -1, -1):
        backwards += text[:, column, None] * image[:, column]
    slack = slack_of(1.0, 1.0, 512)
    assert 0 < np.abs(backwards - exact).max() < slack / 2 and slack < 1e-4


def test_identical_photos_tie_and_come_by_row():
    rng = np.random.default_rng(0)
    text = unit(rng, 5, 512)
    image = np.repeat(unit(rng, 30, 512), 20, axis=0)[rng.permutation(600)]
    own = np.arange(5, dtype=np.int32)
    neighbors, similarity = rank(text, image, own, depth=300)
    for row in range(5):
        for value in np.unique(similarity[row, :280]):  # the last group may be cut off by the depth
            group = neighbors[row, similarity[row] == value]
            same = np.flatnonzero((image == image[group[0]]).all(axis=1))
            np.testing.assert_array_equal(group, same[same != own[row]][: len(group)])
    same = rank(text, np.tile(image[:1], (50, 1)), own, depth=60)[0]
    np.testing.assert_array_equal(same, [[photo for photo in range(50) if photo != row] for row in range(5)])


def test_block_sizes_change_no_byte(monkeypatch):
    rng = np.random.default_rng(0)
    text, image = unit(rng, 101, 96), unit(rng, 700, 96)
    own = rng.integers(0, 700, 101).astype(np.int32)
    expected = rank_reference(text, image, own, depth=50)
    for most_rows in (1, 7, 64, 101, 500):
        ranker = Ranker(text, image, own, depth=50)
        assert [begin for begin, _ in ranker.blocks(most_rows=most_rows)] == list(range(0, 101, most_rows))
        assert_same(ranked(ranker, most_rows=most_rows), expected)
    for photos in (1, 64, 699):
        monkeypatch.setattr(ranking, "BLOCK_PHOTOS", photos)
        assert_same(ranked(Ranker(text, image, own, depth=50)), expected)


def test_blocks_hold_whole_refs():
    rng = np.random.default_rng(0)
    ref = np.repeat(np.arange(6), [1, 4, 2, 2, 7, 1])
    ranker = Ranker(unit(rng, 17, 32), unit(rng, 9, 32), ref, depth=3, ref=ref)
    assert ranker.blocks(most_rows=5) == [(0, 5), (5, 9), (9, 16), (16, 17)]
    assert ranker.blocks(most_rows=1) == [(0, 1), (1, 5), (5, 7), (7, 9), (9, 16), (16, 17)]
    assert ranker.blocks(most_rows=100) == [(0, 17)]
    assert ranker.blocks(begin=7, most_rows=5) == [(7, 9), (9, 16), (16, 17)]
    assert ranker.blocks(begin=17) == []


def test_own_rank_counts_before_the_exclusion():
    text = np.float32([[1, 0]] * 4)
    angle = np.arange(4) * 0.3
    image = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    block = Ranker(text, image, np.arange(4), depth=1).rank(0, 4)
    assert block.own_rank.tolist() == [1, 2, 3, 4]
    assert block.neighbors[:, 0].tolist() == [1, 0, 0, 0]


def test_zero_and_opposite_similarities_rank():
    """Zeros of either sign tie."""
    text = np.float32([[1, 0, 0, 0]])
    image = np.float32([[0, 1, 0, 0], [-1, 0, 0, 0], [-0.0, 1, 0, 0], [1, 0, 0, 0], [-1e-45, 1, 0, 0]])
    neighbors, similarity = rank(text, image, np.int32([3]), depth=9)
    assert neighbors.tolist() == [[0, 2, 4, 1]] and similarity[0, [0, 1, 3]].tolist() == [0, 0, -1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"text_embedding": np.full((3, 4), np.nan, np.float32)}, r"text_embedding \(row 0\)"),
        ({"image_embedding": np.diag(np.float32([1, np.inf, 1, 1]))}, r"image_embedding \(row 1\)"),
        ({"image_embedding": np.ones((1, 4), np.float32)}, "image_embedding"),
        ({"image_embedding": np.ones((5, 3), np.float32)}, "image_embedding"),
        ({"own_image": np.int32([0, 1, 5])}, "own_image"),
        ({"own_image": np.int32([0, -1, 0])}, "own_image"),
        ({"own_image": np.int32([0, 1])}, "own_image"),
        ({"depth": 0}, r"depth \(0\)"),
        ({"ref": [0, 0, 1]}, "own_image .* must be equal"),
    ],
)
def test_rank_refuses_wrong_arguments(change, named):
    rng = np.random.default_rng(0)
    arguments = {
        "text_embedding": unit(rng, 3, 4),
        "image_embedding": unit(rng, 5, 4),
        "own_image": np.int32([0, 1, 2]),
        "depth": 2,
    }
    with pytest.raises(ValueError, match=named):
        Ranker(**(arguments | change))


def best_of_crops(text, crop, photos):
    """float32 [S, M], from the definition."""
    return similarity_reference(text, crop).reshape(len(text), photos, -1).max(axis=2)


def _excluded_by_definition(text, image, own, ref, excluded, crop):
    """bool [S, M], from the definitions of the exclusions."""
    out = np.zeros((len(text), len(image)), bool)
    if excluded.never is not None:
        out |= excluded.never
    if excluded.twins is not None:
        out |= excluded.twins == excluded.twins[own, None]
    if excluded.shown is not None:
        out |= (excluded.category[:, None] >= 0) & excluded.shown[:, excluded.category].T
    if excluded.similar_above is not None:
        out |= similarity_reference(image[own], image) > excluded.similar_above
    if excluded.siblings_above is not None:
        above = similarity_reference(text, image) > excluded.siblings_above
        for row in range(len(text)):
            others = (ref == ref[row]) & (np.arange(len(text)) != row)
            out[row] |= above[others].any(axis=0)
    if excluded.crops_margin is not None:
        best = best_of_crops(text, crop, len(image)).astype(np.float64)
        out |= best > best[np.arange(len(text)), own, None] - excluded.crops_margin
    return out


@pytest.mark.parametrize("depth", lanes([5, 200, 599], fast=[5, 599]))
@pytest.mark.parametrize("block", lanes([1 << 17, 170, 64], fast=[1 << 17, 64]))
@pytest.mark.parametrize(
    "which",
    [
        ["never"],
        ["category"],
        ["similar"],
        ["siblings"],
        ["twins"],
        ["crops"],
        ["never", "twins", "category", "similar", "siblings", "crops"],
    ],
)
def test_exclusions_follow_their_definitions(monkeypatch, depth, block, which):
    rng = np.random.default_rng(len(which) + depth)
    ref = np.sort(rng.integers(0, 20, 60))
    text, image = unit(rng, 60, 64), unit(rng, 600, 64)
    image[100:140], image[7] = image[5], image[590]  # ties across blocks
    crop = unit(rng, 1800, 64)
    own = rng.integers(0, 600, 20)[ref]
    excluded = Excluded(
        never=rng.random(600) < 0.1 if "never" in which else None,
        twins=rng.integers(0, 20, 600).astype(np.int32) if "twins" in which else None,
        shown=rng.random((600, 70)) < 0.3 if "category" in which else None,
        category=rng.integers(-1, 70, 20)[ref].astype(np.int32) if "category" in which else None,
        similar_above=0.2 if "similar" in which else None,
        siblings_above=0.15 if "siblings" in which else None,
        crops_margin=-0.15 if "crops" in which else None,
    )
    out = _excluded_by_definition(text, image, own, ref, excluded, crop)
    assert 0.02 < out.mean() < 0.7
    expected = rank_reference(text, image, own, depth=depth, excluded=out)
    monkeypatch.setattr(ranking, "BLOCK_PHOTOS", block)
    ranker = Ranker(text, image, own, depth=depth, ref=ref, excluded=excluded, crop_embedding=crop)
    assert_same(ranked(ranker, most_rows=7), expected)
    every = [
        ranker.rank_among(begin, end, np.tile(rng.permutation(600), (end - begin, 1)))
        for begin, end in ranker.blocks(most_rows=25)
    ]
    assert_same(tuple(np.concatenate(parts) for parts in zip(*(block[1:] for block in every), strict=True)), expected)


@pytest.mark.parametrize("block", [1 << 17, 17])
def test_photos_all_but_one_with_another_are_counted(monkeypatch, block):
    """Those of one content are not: they are left out anyway."""
    rng = np.random.default_rng(0)
    image, twins = unit(rng, 40, 64), np.arange(40, dtype=np.int32)
    image[[9, 30, 31]] = image[[3, 4, 5]]
    image[30, 0] += 1e-3
    image[31, 0] += 0.5
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    monkeypatch.setattr(ranking, "BLOCK_PHOTOS", block)
    for content, found in ((None, 4), (twins, 4), (np.where(twins == 9, 3, twins), 2)):
        ranker = Ranker(unit(rng, 2, 64), image, [0, 1], depth=3, excluded=Excluded(twins=content))
        assert ranker.near_identical(0.999, most=100) == (found, 40)
    assert ranker.near_identical(0.999, most=2) == (0, 2) and ranker.near_identical(-1.0, most=3) == (3, 3)


def test_bounds_of_exclusions_are_exact():
    """A photo at the bound stays, whatever the matrix product makes of it; the next float32 above it goes."""
    rng = np.random.default_rng(0)
    text, image = unit(rng, 2, 512), unit(rng, 300, 512)
    exact = similarity_reference(text, image)
    for photo in (3, 50, 299):
        for bound, stays in ((exact[1, photo], True), (np.nextafter(exact[1, photo], np.float32(-1)), False)):
            excluded = Excluded(siblings_above=float(bound))
            neighbors = Ranker(text, image, [0, 0], depth=299, ref=[0, 0], excluded=excluded).rank(0, 2).neighbors
            assert (photo in neighbors[0]) == stays
    exact = similarity_reference(image[:1], image)[0]
    for bound, stays in ((exact[9], True), (np.nextafter(exact[9], np.float32(-1)), False)):
        excluded = Excluded(similar_above=float(bound))
        assert (9 in Ranker(text, image, [0, 0], depth=299, excluded=excluded).rank(0, 2).neighbors) == stays


def test_the_bound_for_crops_is_exact():
    """A photo whose best crop is as far below the own photo's best as the margin stays; any nearer, it goes."""
    rng = np.random.default_rng(0)
    text, image, crop = unit(rng, 1, 512), unit(rng, 300, 512), unit(rng, 900, 512)
    best = best_of_crops(text, crop, 300)[0].astype(np.float64)
    for photo in (3, 50, 299):
        margin = float(best[0] - best[photo])
        for more, stays in ((0, True), (1e-9, False)):
            excluded = Excluded(crops_margin=margin + more)
            ranker = Ranker(text, image, [0], depth=299, excluded=excluded, crop_embedding=crop)
            assert (photo in ranker.rank(0, 1).neighbors[0]) == stays
            assert (photo in ranker.rank_among(0, 1, np.array([[photo, 100]])).neighbors[0]) == stays


@pytest.mark.parametrize("crops", [None, 7, 80])
def test_crops_that_do_not_fit_the_photos_are_refused(crops):
    rng = np.random.default_rng(0)
    given = None if crops is None else unit(rng, crops, 32)
    with pytest.raises(ValueError, match=r"crop_embedding (None|\(.*\)) must be"):
        Ranker(
            unit(rng, 2, 32),
            unit(rng, 40, 32),
            [0, 1],
            depth=3,
            excluded=Excluded(crops_margin=0.1),
            crop_embedding=given if crops != 80 else unit(rng, 80, 16),
        )


def test_a_sentence_without_candidates_has_an_empty_row():
    rng = np.random.default_rng(0)
    excluded = Excluded(never=np.ones(40, bool))
    block = Ranker(unit(rng, 3, 32), unit(rng, 40, 32), [0, 1, 2], depth=5, excluded=excluded).rank(0, 3)
    assert (block.neighbors == -1).all() and np.isneginf(block.similarity).all() and (block.own_rank >= 1).all()


def test_candidates_may_be_few():
    rng = np.random.default_rng(0)
    text, image = unit(rng, 2, 32), unit(rng, 40, 32)
    block = Ranker(text, image, [0, 1], depth=3).rank_among(0, 2, np.array([[5, -1, 0, -1], [7, 9, 3, 2]]))
    assert block.neighbors[0].tolist() == [5, -1, -1] and set(block.neighbors[1]) <= {7, 9, 3, 2}
    assert (np.diff(block.similarity[1]) <= 0).all()


def test_products_by_torch_give_the_same_bytes():
    """The path of a GPU, on the CPU."""
    rng = np.random.default_rng(0)
    text, image = unit(rng, 50, 96), unit(rng, 700, 96)
    own = rng.integers(0, 700, 50)
    ranker = Ranker(text, image, own, depth=60, device="cpu:0")
    assert_same(ranked(ranker, most_rows=13), rank_reference(text, image, own, depth=60))
    options = {"excluded": Excluded(crops_margin=-0.1), "crop_embedding": unit(rng, 2100, 96)}
    plain, torches = (Ranker(text, image, own, depth=60, device=device, **options) for device in ("cpu", "cpu:0"))
    assert_same(ranked(torches, most_rows=13), ranked(plain))


@pytest.mark.gpu
def test_products_on_a_gpu_give_the_same_bytes():
    rng = np.random.default_rng(0)
    text, image = unit(rng, 500, 512), unit(rng, 7000, 512)
    own = rng.integers(0, 7000, 500)
    options = {
        "excluded": Excluded(similar_above=0.1, siblings_above=0.1, crops_margin=-0.1),
        "crop_embedding": unit(rng, 21_000, 512),
    }
    cpu, gpu = (Ranker(text, image, own, depth=600, device=device, **options) for device in ("cpu", "cuda"))
    assert_same(ranked(gpu, most_rows=130), ranked(cpu))


def test_rows_that_are_not_finite_are_found_wherever_they_are(monkeypatch):
    monkeypatch.setattr(ranking, "CHECKED_ROWS", 4)
    array = np.ones((11, 3), np.float32)
    assert first_not_finite(array) is None
    array[9, 1] = np.inf
    assert first_not_finite(array) == 9
    array[5, 2] = np.nan
    assert first_not_finite(array) == 5


def test_ranking_on_several_threads_at_once():
    """The kernel shares nothing between calls."""
    rng = np.random.default_rng(0)
    text, image = unit(rng, 30, 64), unit(rng, 400, 64)
    own = rng.integers(0, 400, 30).astype(np.int32)
    expected = rank(text, image, own, depth=20)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: rank(text, image, own, depth=20), range(8)):
            np.testing.assert_array_equal(result[0], expected[0])
            np.testing.assert_array_equal(result[1], expected[1])
