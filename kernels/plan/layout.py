"""Tile records of plan rows' cells: their boxes, what is shown there, and where they lie in memory."""

import numpy as np

from nemo_dali.kernels.arrays import I32, I64, U64
from nemo_dali.kernels.jit import jit
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.kernels.tile import TileRecords, cell_edge


@jit()
def write_boxes(rows: PlanRows, size: int, tiles: TileRecords, sample: I64, photo: I64) -> int:
    """Give each cell of plan rows a record with its box; cells without pixels get none.

    Args:
        rows: dtype ``plan.PLAN`` [B].
        size: frame height and width in pixels.
        tiles: dtype ``TILE`` [n]; ``run_count`` becomes 1 in the targets' cells and 0 in the others.
        sample, photo: int64 [n], the row that a record belongs to, and its photo.

    Returns:
        How many records there are.
    """
    n = 0
    for i in range(rows.size):
        row = rows[i]
        grid = np.int64(row.grid)
        for cell in range(grid * grid):
            y, x = cell // grid, cell % grid
            tile = tiles[n]
            tile.y0 = cell_edge(grid, y, row.center[1], size)
            tile.x0 = cell_edge(grid, x, row.center[0], size)
            tile.y1 = cell_edge(grid, y + 1, row.center[1], size)
            tile.x1 = cell_edge(grid, x + 1, row.center[0], size)
            if tile.y0 < tile.y1 and tile.x0 < tile.x1:
                tile.run_count = cell == row.cell
                sample[n], photo[n] = i, row.images[cell]
                n += 1
    return n


@jit()
def describe(
    tiles: TileRecords, sample: I64, photo: I64, run_count: I64, runs: U64, photo_height: I32, photo_width: I32
) -> None:
    """Add to records from ``write_boxes`` their photos' sizes, and to the targets' their run lengths.

    Args:
        tiles, photo: from ``write_boxes``, [n].
        sample: int64 [n], of the record.
        run_count, runs: int64 and uint64 [samples], how many run lengths of the target, and at which address.
        photo_height, photo_width: int32 [photos].
    """
    for i in range(tiles.size):
        tile = tiles[i]
        tile.photo_height, tile.photo_width = photo_height[photo[i]], photo_width[photo[i]]
        if tile.run_count:
            tile.run_count, tile.runs = run_count[sample[i]], runs[sample[i]]


@jit()
def by_sample(tiles: TileRecords, sample: I64, table: TileRecords) -> None:
    """Copy records [n], of samples in ascending order, to ``table`` [B, cells]; behind a sample's it stays as it is."""
    cell = 0
    for i in range(tiles.size):
        cell = cell + 1 if i and sample[i] == sample[i - 1] else 0
        table[sample[i], cell] = tiles[i]


@jit()
def place(tiles: TileRecords, sample: I64, image: int, image_bytes: int, mask: int, mask_bytes: int) -> None:
    """Say where each record's frame and mask lie.

    Args:
        sample: int64 [n], of each record.
        image, mask: addresses of sample 0's. image_bytes, mask_bytes: of one.
    """
    for i in range(tiles.size):
        tiles[i].image, tiles[i].mask = image + sample[i] * image_bytes, mask + sample[i] * mask_bytes
