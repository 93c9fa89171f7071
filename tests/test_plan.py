import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.plan import MINED, PLAN, RANDOM, SINGLE, Part, Planner
from nemo_dali.policy import MosaicPolicy


def make_part(refs=300, photos=90, depth=40, seed=0, dtype=np.float32, **columns):
    """A data set of ``refs`` refs with one to four sentences, and a table with some short rows."""
    random = np.random.default_rng(seed)
    count = random.integers(1, 5, refs).astype(np.int32)
    ref_image = random.integers(0, photos, refs).astype(np.int32)
    neighbors = np.full((count.sum(), depth), -1, np.int32)
    similarity = np.full((count.sum(), depth), -np.inf, np.float32)
    for row, own in enumerate(np.repeat(ref_image, count)):
        valid = depth if random.random() < 0.8 else int(random.integers(0, depth))
        others = np.delete(np.arange(photos), own)
        neighbors[row, :valid] = random.permutation(others)[:valid]
        similarity[row, :valid] = -np.sort(-random.uniform(0, 0.5, valid))
    return Part(
        ref_image=ref_image,
        sentence_begin=(np.cumsum(count) - count).astype(np.int64),
        sentence_count=count,
        photos=photos,
        neighbors=neighbors,
        similarity=similarity.astype(dtype),
        **columns,
    )


PART = make_part()
FULL = MosaicPolicy(p_mined=0.5, p_random=0.2, grids={2: 1.0, 3: 1.0}, jitter=0.3, max_similarity=0.3, top_k=12)


def plan_all(policy=FULL, epoch=0, count=20_000, parts=(PART,), seed=1, size=480):
    return Planner(parts, policy, seed=seed, size=size).plan(epoch, np.arange(count))


def test_fields_are_the_documented_ones():
    assert PLAN.names == ("position", "ref", "sentence", "kind", "grid", "cell", "images", "center")
    assert [PLAN[name].base.str for name in PLAN.names] == ["<i8", "<i4", "<i4", "|u1", "|u1", "|u1", "<i4", "<i4"]
    assert (PLAN["images"].shape, PLAN["center"].shape) == ((9,), (2,))


def oracle(part, policy, seed, epoch, position, size):
    """One row by NumPy's own generator and plain Python: the specification in the module's docstring."""

    def words(p):
        return [int(w) for w in np.random.Philox(key=[seed, epoch], counter=[0, p, 0, 0]).random_raw(16)]

    refs = len(part.ref_image)
    ref = sorted(range(refs), key=lambda item: words(item)[0])[position % refs]
    word = words(position)

    def below(w, n):
        return w * n >> 64

    def share(w):
        return (w >> 11) * 2.0**-53

    sentence = int(part.sentence_begin[ref]) + below(word[1], int(part.sentence_count[ref]))
    own = int(part.ref_image[ref])
    if share(word[2]) >= policy.p_mined + policy.p_random:
        return ref, sentence, SINGLE, 1, 0, [own], [-1, -1]
    weights = policy.grids
    grid = 2 if share(word[3]) < weights.get(2, 0) / (weights.get(2, 0) + weights.get(3, 0)) else 3
    need = grid * grid - 1
    cell = below(word[4], grid * grid)
    kind = MINED if share(word[2]) < policy.p_mined and epoch >= policy.mine_after_epoch else RANDOM
    found = []
    if kind == MINED:
        pairs = zip(part.neighbors[sentence], part.similarity[sentence], strict=True)
        row = [(int(n), float(s)) for n, s in pairs if n >= 0]
        tau = np.inf if policy.max_similarity is None else policy.max_similarity
        pool = [n for n, s in row if s <= tau][: policy.top_k]
        if len(pool) < need:
            pool = [n for n, _ in row][-need:]
        for k in range(min(need, len(pool))):
            left = [n for n in pool if n not in found]
            found.append(left[below(word[8 + k], len(left))])
    while len(found) < need:
        left = [n for n in range(part.photos) if n != own and n not in found]
        found.append(left[below(word[8 + len(found)], len(left))])
    images = [*found[:cell], own, *found[cell:]]
    shift = int(policy.jitter * size)
    center = [size // 2 - shift + below(word[5 + axis], 2 * shift + 1) for axis in range(2)] if grid == 2 else [-1, -1]
    return ref, sentence, kind, grid, cell, images, center


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_equal_the_plain_python_specification(dtype):
    part = make_part(refs=40, photos=20, depth=15, seed=3, dtype=dtype)
    for epoch in (0, 2):
        policy = MosaicPolicy(
            p_mined=0.6,
            p_random=0.2,
            grids={2: 2.0, 3: 1.0},
            jitter=0.3,
            max_similarity=0.3,
            top_k=9,
            mine_after_epoch=1,
        )
        rows = Planner([part], policy, seed=11, size=101).plan(epoch, np.arange(60))
        for row in rows:
            expected = oracle(part, policy, 11, epoch, int(row["position"]), 101)
            ref, sentence, kind, grid, cell, images, center = expected
            assert row.tolist()[1:6] == (ref, sentence, kind, grid, cell)
            assert row["images"].tolist() == images + [-1] * (9 - len(images))
            assert row["center"].tolist() == center


def test_negatives_are_distinct_and_never_the_own_photo():
    rows = plan_all()
    for row in rows:
        used = row["images"][: row["grid"] ** 2]
        assert used.min() >= 0 and len(set(used.tolist())) == len(used)
        assert (row["images"][row["grid"] ** 2 :] == -1).all()
        assert row["images"][row["cell"]] == PART.ref_image[row["ref"]]
        assert PART.sentence_begin[row["ref"]] <= row["sentence"]
        assert row["sentence"] < PART.sentence_begin[row["ref"]] + PART.sentence_count[row["ref"]]


def test_a_table_that_holds_the_own_photo_does_no_harm():
    part = make_part(refs=50, photos=12, depth=11, seed=4)
    own = np.repeat(part.ref_image, part.sentence_count)
    part.neighbors[:, 3] = own
    part.neighbors[::5] = -1  # no candidate at all
    part.similarity[::5] = -np.inf
    part.neighbors[1::5, 4:] = -1  # three candidates beside the own photo
    part.similarity[1::5, 4:] = -np.inf
    rows = Planner([part], MosaicPolicy(p_mined=1, grids={2: 1, 3: 1}, top_k=8), seed=0, size=64).plan(
        0, np.arange(2000)
    )
    for row in rows:
        used = row["images"][: row["grid"] ** 2].tolist()
        assert used.count(int(part.ref_image[row["ref"]])) == 1
        assert min(used) >= 0


@pytest.mark.parametrize("kind", [SINGLE, RANDOM, MINED])
def test_shares_follow_the_policy_within_three_sigma(kind):
    rows = plan_all()
    p = {SINGLE: 0.3, RANDOM: 0.2, MINED: 0.5}[kind]
    assert abs((rows["kind"] == kind).mean() - p) < 3 * np.sqrt(p * (1 - p) / len(rows))


@pytest.mark.parametrize("grid", [2, 3])
def test_every_cell_is_equally_likely(grid):
    cells = plan_all()
    cells = cells["cell"][cells["grid"] == grid]
    p = 1 / grid**2
    shares = np.bincount(cells, minlength=grid**2) / len(cells)
    # Nine tests at three sigma would fail one time in 40; the seed is fixed, so the bound is that of one test.
    assert (abs(shares - p) < 3 * np.sqrt(p * (1 - p) / len(cells))).all()


def test_each_epoch_is_another_permutation_of_all_refs():
    planner = Planner([PART], FULL, seed=1, size=480)
    first, second = (planner.plan(epoch, np.arange(planner.length))["ref"] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(planner.length))
    assert (first != second).mean() > 0.9
    other_seed = Planner([PART], FULL, seed=2, size=480).plan(0, np.arange(planner.length))["ref"]
    assert (first != other_seed).mean() > 0.9


def test_draws_of_neighbouring_seeds_and_epochs_do_not_alias():
    """``seed + epoch`` schemes repeat (1, 0) at (0, 1)."""
    a, b = plan_all(seed=1, epoch=0, count=300), plan_all(seed=0, epoch=1, count=300)
    assert (a["ref"] != b["ref"]).mean() > 0.9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(0, 3))
def test_a_row_depends_on_its_position_alone(positions, epoch):
    planner = Planner([PART], FULL, seed=1, size=480)
    whole = planner.plan(epoch, np.arange(5001))
    assert np.array_equal(planner.plan(epoch, positions), whole[positions])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_split_over_ranks_gives_the_same_rows(ranks):
    planner = Planner([PART], FULL, seed=1, size=480)
    whole = planner.plan(3, np.arange(256))
    parts = [planner.plan(3, np.arange(start, start + 32 // ranks)) for start in range(0, 256, 32 // ranks)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_positions_behind_the_epoch_repeat_its_refs_with_new_draws():
    planner = Planner([PART], FULL, seed=1, size=480)
    rows = planner.plan(0, np.arange(2 * planner.length))
    head, tail = rows[: planner.length], rows[planner.length :]
    assert np.array_equal(head["ref"], tail["ref"])
    assert (head["kind"] != tail["kind"]).any()


def test_warm_up_turns_mined_samples_into_random_ones():
    policy = MosaicPolicy(p_mined=0.5, p_random=0.2, mine_after_epoch=2)
    warm, after = plan_all(policy, epoch=1), plan_all(policy, epoch=2)
    assert set(warm["kind"]) == {SINGLE, RANDOM}
    assert set(after["kind"]) == {SINGLE, RANDOM, MINED}
    assert abs((warm["kind"] == RANDOM).mean() - 0.7) < 0.02


def test_mined_photos_come_from_the_window():
    policy = MosaicPolicy(p_mined=1, max_similarity=0.35, top_k=5)
    rows = plan_all(policy, count=3000)
    checked = 0
    for row in rows:
        s = row["sentence"]
        begin = int((PART.similarity[s] > 0.35).sum())
        pool = PART.neighbors[s][begin : begin + 5]
        if (pool[:3] >= 0).all() and len(pool) >= 3:
            others = np.delete(row["images"][:4], row["cell"])
            assert set(others) <= set(pool[pool >= 0])
            checked += 1
    assert checked > 1000


def test_short_pools_are_counted():
    part = make_part(refs=100, photos=30, depth=20, seed=5)
    part.neighbors[:, 2:], part.similarity[:, 2:] = -1, -np.inf
    planner = Planner([part], MosaicPolicy(p_mined=1), seed=0, size=64)
    _, short = planner.plan_and_count(0, np.arange(100))
    assert (short.last_valid, short.random) == (100, 100)
    low = Planner([make_part(seed=6)], MosaicPolicy(p_mined=1, max_similarity=-1), seed=0, size=64)
    rows, short = low.plan_and_count(0, np.arange(100))
    assert short.last_valid == 100 and 0 < short.random < 100
    assert (rows["kind"] == MINED).all()


def test_jitter_moves_the_crossing_within_its_share():
    centers = plan_all()["center"]
    centers = centers[centers[:, 0] >= 0]
    assert centers.min() >= 240 - 144 and centers.max() <= 240 + 144
    assert centers.min() < 240 - 130 and centers.max() > 240 + 130
    still = plan_all(MosaicPolicy(p_mined=1), count=100, size=101)["center"]
    assert (still == 50).all()


def test_positional_cells_are_respected():
    sentences = int(PART.sentence_count.sum())
    cells = {2: np.full(sentences, 0b0101, np.uint16), 3: np.full(sentences, 0b100000000, np.uint16)}
    part = Part(**{**vars(PART), "cells": cells})
    rows = plan_all(parts=[part])
    assert set(rows["cell"][rows["grid"] == 2]) == {0, 2}
    assert set(rows["cell"][rows["grid"] == 3]) == {8}


def test_several_data_sets_are_mixed_and_never_share_a_mosaic():
    other = make_part(refs=100, photos=50, seed=9)
    planner = Planner([PART, other], FULL, seed=1, size=480)
    rows = planner.plan(0, np.arange(planner.length))
    assert sorted(rows["ref"]) == list(range(400))
    second = rows["ref"] >= 300
    assert 0 < second[:100].sum() < 100  # mixed, not one after the other
    for of_second, some in ((False, rows[~second]), (True, rows[second])):
        images = some["images"][some["images"] >= 0]
        assert ((images >= 90) == of_second).all()
        assert ((some["sentence"] >= PART.sentence_count.sum()) == of_second).all()
    own = np.take_along_axis(rows["images"], rows["cell"][:, None].astype(int), 1)[:, 0]
    assert np.array_equal(own, np.concatenate([PART.ref_image, other.ref_image + 90])[rows["ref"]])


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(NemoError, match="needs 9 photos"):
        Planner([make_part(refs=5, photos=8, depth=3)], MosaicPolicy(grids={3: 1}), seed=0, size=480)
    bare = Part(**{**vars(PART), "neighbors": None, "similarity": None})
    with pytest.raises(NemoError, match="nemo-dali mine"):
        Planner([bare], MosaicPolicy(), seed=0, size=480)
    assert (Planner([bare], MosaicPolicy(p_mined=0, p_random=1), seed=0, size=480).plan(0, 5)["kind"] == RANDOM).all()
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            Planner([PART], FULL, seed=seed, size=480)
    planner = Planner([PART], FULL, seed=2**64 - 1, size=480)
    with pytest.raises(ValueError, match="positions"):
        planner.plan(0, [-1])
    with pytest.raises(ValueError, match="epoch"):
        planner.plan(-1, [0])
    assert len(planner.plan(0, [])) == 0


@pytest.mark.parametrize("wrong", [90, -2])
def test_a_table_that_names_photos_that_do_not_exist_is_refused(wrong):
    part = make_part()
    part.neighbors[part.neighbors == 7] = wrong
    with pytest.raises(FileFormatError, match="damaged"):
        plan_all(parts=[part])
