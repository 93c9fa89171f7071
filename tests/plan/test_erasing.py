"""RMSIN's black squares: how many samples have some, how many those have, and where."""

import numpy as np

from nemo_dali.plan.erasing import FEWEST, MOST, SIDE, black_squares

POSITIONS = np.arange(3000)


def drawn(positions=POSITIONS, width=800, **options):
    widths = np.full(len(positions), width, np.int32)
    return black_squares(positions, widths, **{"seed": 5, "epoch": 1, "share": 0.2} | options)


def test_share_number_and_places_are_uniform():
    found = drawn()
    assert {(squares.dtype, squares.shape[1]) for squares in found} == {(np.dtype(np.float32), 2)}
    counts = np.array([len(squares) for squares in found])
    some = counts[counts > 0]
    assert abs(len(some) / len(counts) - 0.2) < 3 * np.sqrt(0.2 * 0.8 / len(counts))
    assert (some.min(), some.max()) == (FEWEST, MOST) == (20, 60) and len(set(some.tolist())) == 41
    corners = np.concatenate(found)
    assert (corners == corners.astype(int)).all()
    assert corners.min(axis=0).tolist() == [0, 0] and corners.max(axis=0).tolist() == [800 - SIDE] * 2
    for axis in (0, 1):
        share = np.histogram(corners[:, axis], bins=8, range=(0, 800 - SIDE))[0] / len(corners)
        assert np.abs(share - 1 / 8).max() < 0.01
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.02


def test_squares_depend_on_seed_epoch_and_position_and_on_nothing_else():
    whole = drawn()
    for positions in (POSITIONS[::-1], POSITIONS[7::11]):
        for position, squares in zip(positions, drawn(positions), strict=True):
            np.testing.assert_array_equal(squares, whole[position])
    for other in ({"seed": 6}, {"epoch": 2}, {"seed": 2**64 - 1, "epoch": 2**62}):
        same = [np.array_equal(a, b) for a, b in zip(whole, drawn(**other), strict=True)]
        assert 0.5 < np.mean(same) < 0.8  # those without squares in both


def test_shares_of_none_and_all_and_photos_narrower_than_a_square():
    assert sum(map(len, drawn(share=0.0))) == 0
    assert all(len(squares) >= FEWEST for squares in drawn(share=1.0))
    for width in (1, 31, 32):
        assert not np.concatenate(drawn(width=width, share=1.0)).any()
    assert set(np.concatenate(drawn(width=33, share=1.0)).ravel().tolist()) == {0, 1}
