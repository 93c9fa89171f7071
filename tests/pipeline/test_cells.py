import numpy as np
import pytest

from nemo_dali.kernels.plan.rows import PLAN
from nemo_dali.pipeline.cells import lay_out


def plan_row(grid, cell=0, center=(-1, -1), images=None):
    row = np.zeros(1, PLAN)
    row["grid"], row["cell"], row["center"], row["images"] = grid, cell, center, -1
    row["images"][0, : grid * grid] = range(10, 10 + grid * grid) if images is None else images
    return row


def boxes(tiles):
    return [tuple(tile) for tile in zip(*(tiles[name].tolist() for name in ("y0", "y1", "x0", "x1")), strict=True)]


@pytest.mark.parametrize("size", [1, 7, 96, 480, 481])
@pytest.mark.parametrize(("grid", "center"), [(1, (-1, -1)), (2, (None, None)), (2, (0, 1)), (3, (-1, -1))])
def test_cells_tile_the_frame_exactly(size, grid, center):
    center = tuple(size // 2 if value is None else value for value in center)
    tiles, sample, photo = lay_out(plan_row(grid, center=center), size)
    covered = np.zeros((size, size), int)
    for y0, y1, x0, x1 in boxes(tiles):
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).all()
    assert (sample == 0).all() and len(photo) <= grid * grid


def test_a_single_is_one_cell_and_a_3x3_nine():
    rows = np.concatenate([plan_row(1), plan_row(3, cell=4), plan_row(2, cell=2, center=(240, 240))])
    tiles, sample, photo = lay_out(rows, 480)
    assert np.bincount(sample).tolist() == [1, 9, 4]
    assert photo.tolist() == [10, *range(10, 19), *range(10, 14)]
    assert np.flatnonzero(tiles["run_count"]).tolist() == [0, 1 + 4, 1 + 9 + 2]
    assert boxes(tiles)[0] == (0, 480, 0, 480)
    assert boxes(tiles)[1 + 5] == (160, 320, 320, 480)
    assert boxes(tiles)[-2] == (240, 480, 0, 240)


def test_edges_are_size_times_j_over_grid():
    tiles, _, _ = lay_out(plan_row(3), 100)
    assert boxes(tiles)[4] == (33, 66, 33, 66)
    tiles, _, _ = lay_out(plan_row(2, center=(30, 80)), 100)
    assert boxes(tiles) == [(0, 80, 0, 30), (0, 80, 30, 100), (80, 100, 0, 30), (80, 100, 30, 100)]


def test_cells_without_pixels_are_neither_read_nor_decoded():
    tiles, _, photo = lay_out(plan_row(2, center=(0, 100)), 100)
    assert boxes(tiles) == [(0, 100, 0, 100)]
    assert photo.tolist() == [11]
