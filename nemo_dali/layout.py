"""From plan rows to tile records: which photo goes to which box of which frame."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.kernels.tile import TILE

Ints = npt.NDArray[np.int64]


def cell_edges(grid: Ints, line: Ints, center: Ints, size: int) -> Ints:
    """Pixel of grid line ``line`` (0 to grid) along one axis: ``size * line // grid``, or the crossing of a 2x2."""
    edges: Ints = np.where((grid == 2) & (line == 1), center, size * line // grid)
    return edges


def lay_out(rows: npt.NDArray[Any], size: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Lay out the cells of a batch. A cell without pixels, left by a jittered crossing, is left out.

    Args:
        rows: dtype ``plan.PLAN`` [B].
        size: frame height and width in pixels.

    Returns:
        tiles: dtype ``TILE`` [cells] with frame size and box set, everything else 0.
        sample: int64 [cells], the row that each cell belongs to.
        photo: int64 [cells], row in /images.
        ``tiles["run_count"]`` is 1 in the target's cell and 0 elsewhere, for the caller to replace.
    """
    cells = rows["grid"].astype(np.int64) ** 2
    sample = np.repeat(np.arange(len(rows)), cells)
    cell = np.arange(len(sample)) - np.repeat(np.cumsum(cells) - cells, cells)
    grid = rows["grid"][sample].astype(np.int64)
    center = rows["center"][sample].astype(np.int64)
    y, x = cell // grid, cell % grid
    tiles = np.zeros(len(sample), TILE)
    tiles["frame_height"] = tiles["frame_width"] = size
    tiles["x0"] = cell_edges(grid, x, center[:, 0], size)
    tiles["x1"] = cell_edges(grid, x + 1, center[:, 0], size)
    tiles["y0"] = cell_edges(grid, y, center[:, 1], size)
    tiles["y1"] = cell_edges(grid, y + 1, center[:, 1], size)
    tiles["run_count"] = cell == rows["cell"][sample]
    photo = rows["images"][sample, cell].astype(np.int64)
    kept = (tiles["x0"] < tiles["x1"]) & (tiles["y0"] < tiles["y1"])
    return tiles[kept], sample[kept], photo[kept]
