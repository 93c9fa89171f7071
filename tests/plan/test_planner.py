import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.errors import FileFormatError, NemoError
from nemo_dali.kernels.plan.rows import MINED, PLAN, RANDOM, SINGLE
from nemo_dali.plan.by_epoch import ByEpoch
from nemo_dali.plan.part import Part
from nemo_dali.plan.planner import Planner, ShortPools
from nemo_dali.plan.policy import MosaicPolicy
from tests.helpers.counts import examples
from tests.helpers.plans import make_part

PART = make_part()
FULL = MosaicPolicy(p_mined=0.5, p_random=0.2, grids={2: 1.0, 3: 1.0}, jitter=0.3, max_similarity=0.3, top_k=12)


def plan_all(policy=FULL, epoch=0, count=20_000, parts=(PART,), seed=1, size=480):
    return Planner(parts, policy, seed=seed, size=size).plan(epoch, np.arange(count))


def test_fields_are_the_documented_ones():
    assert PLAN.names == ("position", "ref", "sentence", "kind", "grid", "cell", "images", "center")
    assert [PLAN[name].base.str for name in PLAN.names] == ["<i8", "<i4", "<i4", "|u1", "|u1", "|u1", "<i4", "<i4"]
    assert (PLAN["images"].shape, PLAN["center"].shape) == ((9,), (2,))


def philox(seed, epoch, position, count):
    return [int(word) for word in np.random.Philox(key=[seed, epoch], counter=[0, position, 0, 0]).random_raw(count)]


def oracle(part, policy, seed, epoch, position, size, ref=None):
    """One row by NumPy's own generator and plain Python: the specification in the module's docstring."""

    refs = len(part.ref_image)
    if ref is None:
        ref = sorted(range(refs), key=lambda item: philox(seed, epoch, item, 1))[position % refs]
    word = philox(seed, epoch, position, 16)

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


@pytest.mark.fuzz
@settings(max_examples=examples(50), deadline=None)
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
    short = ShortPools.of(planner.draw(0, np.arange(100))[1])
    assert (short.last_valid, short.random) == (100, 100)
    low = Planner([make_part(seed=6)], MosaicPolicy(p_mined=1, max_similarity=-1), seed=0, size=64)
    rows, met = low.draw(0, np.arange(100))
    short = ShortPools.of(met)
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


def substitute_oracle(part, policy, seed, epoch, position, size, bad):
    """One row without the photos in the set ``bad``, in plain Python from the module's docstring, and what changed."""
    refs = len(part.ref_image)
    order = sorted(range(refs), key=lambda item: philox(seed, epoch, item, 1))
    for further in range(refs):
        ref = order[(position + further) % refs]
        row = oracle(part, policy, seed, epoch, position, size, ref=ref)
        _, sentence, kind, grid, cell, images, center = row
        lines = [[size * j // grid for j in range(grid + 1)] for _ in range(2)]
        if grid == 2:
            lines = [[0, center[axis], size] for axis in range(2)]
        empty = [
            lines[0][c % grid] == lines[0][c % grid + 1] or lines[1][c // grid] == lines[1][c // grid + 1]
            for c in range(grid * grid)
        ]
        if empty[cell] or images[cell] not in bad:
            break
    else:
        return None
    words = philox(seed, epoch, position, 16 + 8 * 64)
    cells = 0
    for k, c in enumerate(c for c in range(grid * grid) if c != cell):
        if empty[c] or images[c] not in bad:
            continue
        asked = []
        if kind == MINED:
            pairs = zip(part.neighbors[sentence], part.similarity[sentence], strict=True)
            valid = [(int(n), float(s)) for n, s in pairs if n >= 0]
            tau = np.inf if policy.max_similarity is None else policy.max_similarity
            window = [n for n, s in valid if s <= tau][: policy.top_k]
            last = [n for n, _ in valid][-(grid * grid - 1) :]
            if len(window) < grid * grid - 1:
                window = last
            behind = window.index(images[c]) + 1 if images[c] in window else 0
            asked += window[behind:] + window[:behind] + last[::-1]
        asked += [word * part.photos >> 64 for word in words[16 + k :: 8]]
        asked += [(asked[-1] + i) % part.photos for i in range(part.photos)]
        good = [photo for photo in asked if photo not in bad and photo not in images]
        if not good:
            return None
        images[c] = good[0]
        cells += 1
    return (ref, sentence, kind, grid, cell, images, center), further > 0, cells


SMALL = make_part(refs=40, photos=20, depth=15, seed=3)
JITTERED = MosaicPolicy(p_mined=0.6, p_random=0.2, grids={2: 2.0, 3: 1.0}, jitter=0.5, max_similarity=0.3, top_k=9)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_substituted_rows_equal_the_plain_python_specification(share, dtype):
    part = make_part(refs=40, photos=20, depth=15, seed=3, dtype=dtype)
    bad = np.random.default_rng(8).permutation(20) < share * 20
    size = 8  # so small that jitter leaves cells without pixels
    planner = Planner([part], JITTERED, seed=11, size=size)
    rows = planner.plan(0, np.arange(120))
    before = rows.copy()
    made, replaced = planner.substitute(0, rows, bad)
    assert np.array_equal(rows, before)
    targets = negatives = 0
    for row in made:
        expected = substitute_oracle(part, JITTERED, 11, 0, int(row["position"]), size, set(np.flatnonzero(bad)))
        (ref, sentence, kind, grid, cell, images, center), moved, cells = expected
        assert row.tolist()[1:6] == (ref, sentence, kind, grid, cell)
        assert row["images"].tolist() == images + [-1] * (9 - len(images))
        assert row["center"].tolist() == center
        targets, negatives = targets + moved, negatives + cells
    assert (replaced.targets, replaced.negatives) == (targets, negatives) and targets and negatives
    assert np.array_equal(made["position"], rows["position"])


def visible(row, size):
    """Cells that have pixels."""
    if row["grid"] != 2:
        return list(range(row["grid"] ** 2))
    x, y = row["center"]
    widths, heights = (x, size - x), (y, size - y)
    return [cell for cell in range(4) if widths[cell % 2] and heights[cell // 2]]


@pytest.mark.slow
@pytest.mark.fuzz
@settings(max_examples=examples(60), deadline=None)
@given(st.sets(st.integers(0, 19), max_size=11), st.integers(0, 2), st.randoms(use_true_random=False))
def test_faults_met_one_by_one_lead_to_the_rows_of_faults_known_before(bad, epoch, random):
    """Whichever bad photos are noticed, and whatever else was known from other samples."""
    size = 8
    planner = Planner([SMALL], JITTERED, seed=5, size=size)
    rows = planner.plan(epoch, np.arange(60))
    everything = np.isin(np.arange(20), list(bad))
    expected, _ = planner.substitute(epoch, rows, everything)
    for row, want in zip(rows, expected, strict=True):
        known = {photo for photo in bad if random.random() < 0.2}
        while True:
            mask = np.isin(np.arange(20), list(known))
            (made,), _ = planner.substitute(epoch, row[None], mask)
            met = [int(made["images"][cell]) for cell in visible(made, size) if int(made["images"][cell]) in bad]
            if not met:
                break
            known |= set(random.sample(met, random.randint(1, len(met))))
        assert made == want


def test_a_substitute_is_another_photo_and_of_the_same_data_set():
    other = make_part(refs=100, photos=50, seed=9)
    planner = Planner([PART, other], FULL, seed=1, size=480)
    bad = np.random.default_rng(0).random(140) < 0.3
    rows, replaced = planner.substitute(0, planner.plan(0, np.arange(planner.length)), bad)
    assert replaced.targets > 50 and replaced.negatives > 100
    photo_of = np.concatenate([PART.ref_image, other.ref_image + 90])
    for row in rows:
        used = row["images"][: row["grid"] ** 2]
        assert not bad[used].any() and len(set(used.tolist())) == len(used) and used.min() >= 0
        assert len(set((used >= 90).tolist())) == 1
        assert row["images"][row["cell"]] == photo_of[row["ref"]]


def test_rows_without_bad_photos_stay_as_they_are():
    planner = Planner([PART], FULL, seed=1, size=480)
    rows = planner.plan(0, np.arange(2000))
    bad = np.zeros(90, bool)
    bad[17] = True
    made, _ = planner.substitute(0, rows, bad)
    hit = (rows["images"] == 17).any(axis=1)
    assert np.array_equal(made[~hit], rows[~hit]) and (made[hit] != rows[hit]).all()


def test_a_substituted_mined_photo_is_the_next_candidate():
    """Then, as the window is used up, the table's last ones, then the photos that the table does not have."""
    neighbors = np.array([[5, 1, 2, 3, 4, 6, 7, 8, 9]], np.int32)
    part = Part(
        ref_image=np.zeros(1, np.int32),
        sentence_begin=np.zeros(1, np.int64),
        sentence_count=np.ones(1, np.int32),
        sentences=1,
        empty=np.zeros(1, np.uint8),
        photos=12,
        neighbors=neighbors,
        similarity=np.linspace(0.5, 0.1, 9, dtype=np.float32)[None],
    )
    planner = Planner([part], MosaicPolicy(p_mined=1, top_k=5), seed=0, size=64)
    rows = planner.plan(0, [0])
    shown = [int(photo) for photo in rows["images"][0, :4] if photo]
    window = [5, 1, 2, 3, 4]
    gone = shown[0]
    ring = window[window.index(gone) + 1 :] + window[: window.index(gone)]
    expected = next(photo for photo in ring if photo not in shown)
    bad = np.zeros(12, bool)
    bad[gone] = True
    made, _ = planner.substitute(0, rows, bad)
    assert [int(photo) for photo in made["images"][0, :4] if photo] == [expected, *shown[1:]]
    bad[window] = True
    made, replaced = planner.substitute(0, rows, bad)
    assert [int(photo) for photo in made["images"][0, :4] if photo] == [9, 8, 7] and replaced.negatives == 3
    bad[[7, 8, 9]] = True
    made, _ = planner.substitute(0, rows, bad)
    assert sorted(int(photo) for photo in made["images"][0, :4] if photo) == [6, 10, 11]


def test_random_substitutes_are_spread_over_all_photos_even_behind_a_run_of_bad_ones():
    planner = Planner([PART], MosaicPolicy(p_mined=0, p_random=1), seed=1, size=480)
    rows = planner.plan(0, np.arange(20_000))
    bad = np.arange(90) < 40
    made, replaced = planner.substitute(0, rows, bad)
    before, after = rows["images"][:, :4], made["images"][:, :4]
    moved = (rows["ref"] == made["ref"])[:, None] & (before != after)
    share = np.bincount(after[moved], minlength=90)[40:] / moved.sum()
    assert replaced.negatives > 10_000 and abs(share * 50 - 1).max() < 0.2


def test_when_no_photo_is_left_the_error_says_so():
    planner = Planner([SMALL], MosaicPolicy(p_mined=1, grids={3: 1}), seed=0, size=64)
    rows = planner.plan(0, np.arange(40))
    with pytest.raises(NemoError, match="None of the 40 samples has a photo that can be read"):
        planner.substitute(0, rows, np.ones(20, bool))
    bad = np.ones(20, bool)
    bad[[*range(7), int(SMALL.ref_image[0])]] = False
    with pytest.raises(NemoError, match="Too few of a data set's 20 photos"):
        planner.substitute(0, rows, bad)


def test_expressions_without_a_target_have_a_bound_of_their_own():
    """Refs with ``empty`` draw from what lies below ``max_similarity_no_target``, the others below the usual one."""
    part = make_part(seed=5)
    empty = np.zeros(len(part.ref_image), np.uint8)
    empty[::2] = 1
    part = Part(**{**vars(part), "empty": empty})
    policy = MosaicPolicy(p_mined=1, top_k=8, max_similarity=0.45, max_similarity_no_target=0.2)
    rows = Planner([part], policy, seed=0, size=64).plan(0, np.arange(4000))
    seen = {0: 0.0, 1: 0.0}
    for row in rows:
        kind = int(empty[row["ref"]])
        neighbors = part.neighbors[row["sentence"]].tolist()
        similarity = part.similarity[row["sentence"]]
        shown = [similarity[neighbors.index(photo)] for photo in row["images"][:4] if photo in neighbors]
        window = (similarity <= (0.2 if kind else 0.45)) & (similarity > -np.inf)
        if window.sum() >= 3:
            seen[kind] = max(seen[kind], *shown)
    assert 0.15 < seen[1] <= 0.2 < seen[0] <= 0.45
    same = Planner([part], MosaicPolicy(p_mined=1, top_k=8, max_similarity=0.45), seed=0, size=64)
    plain = Planner([Part(**{**vars(part), "empty": 0 * empty})], policy, seed=0, size=64)
    assert np.array_equal(same.plan(0, np.arange(500)), plain.plan(0, np.arange(500)))


def test_a_substitute_of_a_mined_photo_keeps_to_the_bound_of_its_expression():
    part = make_part(seed=6, depth=30)
    part = Part(**{**vars(part), "empty": np.ones(len(part.ref_image), np.uint8)})
    policy = MosaicPolicy(p_mined=1, top_k=8, max_similarity=0.45, max_similarity_no_target=0.2)
    planner = Planner([part], policy, seed=0, size=64)
    rows = planner.plan(0, np.arange(800))
    bad = np.zeros(part.photos, bool)
    bad[:4] = True
    substituted, replaced = planner.substitute(0, rows, bad)
    assert replaced.negatives
    for row in substituted:
        neighbors, similarity = part.neighbors[row["sentence"]].tolist(), part.similarity[row["sentence"]]
        if ((similarity <= 0.2) & (similarity > -np.inf)).sum() < 12:
            continue  # the window may be used up
        assert all(similarity[neighbors.index(photo)] <= 0.2 for photo in row["images"][:4] if photo in neighbors)


@pytest.mark.parametrize(
    ("epoch", "positions", "message"),
    [
        (0, [10**30], r"^positions \(1000000000000000000000000000000\) must be >= 0 and <= 9223372036854775807$"),
        (0, [10**5000], r"^positions \(an integer of 16610 bits\) must be >= 0 and <= 9223372036854775807$"),
        (0, [2**63], r"^positions \(9223372036854775808\) must be >= 0 and <= "),
        (0, np.array([2**64 - 1], np.uint64), r"^positions \(18446744073709551615\) must be >= 0 and <= "),
        (0, [0, -1], r"^positions \(-1\) must be >= 0$"),
        (0, [0.5], r"^positions \(0\.5\) must be an integer$"),
        (0, ["a"], r"^positions \('a'\) must be an integer$"),
        (0, None, r"^positions \(None\) must be an integer$"),
        (0, [True, False], r"^positions \(True\) must be an integer$"),
        (0, [[1], [1, 2]], r"^positions \(a list\) must be one integer, or integers in one dimension$"),
        (0, np.zeros((2, 2), int), r"^positions \(a ndarray\) must be one integer, or integers in one dimension$"),
        (2**300, [0], r"^epoch \(an integer of 301 bits\) must be >= 0 and <= 9223372036854775807$"),
        (-1, [0], r"^epoch \(-1\) must be >= 0$"),
        ("0", [0], r"^epoch \('0'\) must be an integer$"),
    ],
)
def test_bad_positions_and_epochs_are_told(epoch, positions, message):
    with pytest.raises(ValueError, match=message):
        Planner((PART,), FULL, seed=1, size=480).plan(epoch, positions)


def test_positions_of_every_kind_of_integer():
    planner = Planner((PART,), FULL, seed=1, size=480)
    expected = planner.plan(0, [3])
    for given_as in (3, [3], (3,), np.int32(3), np.array([3], np.uint64), np.array([3], object), range(3, 4)):
        assert np.array_equal(planner.plan(0, given_as), expected)
    assert len(planner.plan(0, [])) == 0 and len(planner.plan(0, [2**63 - 1])) == 1


# --- by epoch --------------------------------------------------------------------------------------------------------

CHANGING = MosaicPolicy(
    p_mined=ByEpoch({0: 0.0, 2: 0.6, 6: 0.3}),
    p_random=ByEpoch({0: 0.1, 6: 0.4}, "linear"),
    mine_after_epoch=3,
    top_k=ByEpoch({0: 30, 7: 9}, "linear"),
    max_similarity=ByEpoch({0: None, 4: 0.3, 5: 0.2}),
    grids={2: 2.0, 3: 1.0},
    jitter=0.5,
)


def test_an_epoch_is_planned_as_by_its_own_policy_alone():
    changing, kinds = Planner([PART], CHANGING, seed=3, size=101), []
    for epoch in (0, 1, 2, 3, 4, 5, 6, 7, 8, 1000):
        own = CHANGING.at(epoch)
        rows, short = changing.draw(epoch, np.arange(2000))
        expected, expected_short = Planner([PART], own, seed=3, size=101).draw(epoch, np.arange(2000))
        assert rows.tobytes() == expected.tobytes() and short.tobytes() == expected_short.tobytes()
        kinds.append(np.bincount(rows["kind"], minlength=3) / 2000)
    single, random, mined = np.transpose(kinds)
    assert (mined[:3] == 0).all() and single[0] == pytest.approx(0.9, abs=0.03)
    assert random[2] == pytest.approx(0.8, abs=0.03) and mined[3] == pytest.approx(0.6, abs=0.04)
    assert random[8] == pytest.approx(0.4, abs=0.04) and mined[8] == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("epoch", [0, 2, 3, 4, 5, 9])
def test_rows_of_an_epoch_equal_the_plain_python_specification(epoch):
    part = make_part(refs=40, photos=20, depth=15, seed=3)
    for row in Planner([part], CHANGING, seed=11, size=101).plan(epoch, np.arange(60)):
        expected = oracle(part, CHANGING.at(epoch), 11, epoch, int(row["position"]), 101)
        ref, sentence, kind, grid, cell, images, center = expected
        assert row.tolist()[1:6] == (ref, sentence, kind, grid, cell)
        assert row["images"].tolist() == images + [-1] * (9 - len(images))
        assert row["center"].tolist() == center


@pytest.mark.parametrize(("mined", "random"), [(0.5, 0.0), (0.6, 0.3), (0.1, 0.2)])
def test_mine_after_epoch_is_one_of_them(mined, random):
    late = MosaicPolicy(p_mined=mined, p_random=random, mine_after_epoch=5, top_k=9)
    steps = MosaicPolicy(p_mined=ByEpoch({0: 0.0, 5: mined}), p_random=ByEpoch({0: mined + random, 5: random}), top_k=9)
    for epoch in (0, 4, 5, 6):
        assert plan_all(late, epoch).tobytes() == plan_all(steps, epoch).tobytes()
    assert (plan_all(late, 4)["kind"] != MINED).all() and (plan_all(late, 5)["kind"] == MINED).any()


def test_bad_photos_are_replaced_by_the_chances_of_their_epoch():
    bad = np.random.default_rng(8).random(PART.photos) < 0.3
    changing, mined = Planner([PART], CHANGING, seed=3, size=64), 0
    for epoch in (1, 2, 3, 5, 8):
        rows = changing.plan(epoch, np.arange(600))
        made, replaced = changing.substitute(epoch, rows, bad)
        alone = Planner([PART], CHANGING.at(epoch), seed=3, size=64)
        expected, expected_replaced = alone.substitute(epoch, rows, bad)
        assert made.tobytes() == expected.tobytes() and replaced == expected_replaced
        assert replaced.targets and replaced.negatives
        mined += (made["kind"] == MINED).sum()
    assert mined


def test_what_any_epoch_needs_is_asked_for_when_the_planner_is_made():
    bare = Part(**{**vars(PART), "neighbors": None, "similarity": None})
    late = ByEpoch({0: 0.0, 50: 0.5})
    with pytest.raises(NemoError, match="no negative table"):
        Planner([bare], MosaicPolicy(p_mined=late), seed=0, size=64)
    Planner([bare], MosaicPolicy(p_mined=ByEpoch({0: 0.0, 50: 0.0}), p_random=late), seed=0, size=64)
    with pytest.raises(NemoError, match="A 3x3 mosaic needs 9 photos, but a data set has 8"):
        few = make_part(refs=20, photos=8, depth=7)
        Planner([few], MosaicPolicy(p_mined=0, p_random=late, grids={3: 1.0}), seed=0, size=64)
    assert Planner([PART], MosaicPolicy(p_mined=late), seed=0, size=64).grids == {1, 2}
