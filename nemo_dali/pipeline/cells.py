"""From plan rows to tile records: which photo goes to which box of which frame."""

from typing import Any

import numpy as np

from nemo_dali.kernels.arrays import I64
from nemo_dali.kernels.plan.layout import write_boxes
from nemo_dali.kernels.plan.rows import PlanRows
from nemo_dali.kernels.tile import TileRecords, tile_records


def lay_out(rows: PlanRows, size: int, **frame: Any) -> tuple[TileRecords, I64, I64]:
    """Lay out the cells of plan rows. A cell without pixels, from a jittered crossing, is left out.

    Args:
        rows: dtype ``plan.PLAN`` [B].
        size: frame height and width in pixels.
        frame: how frames are written, see ``tile_records``.

    Returns:
        tiles: dtype ``TILE`` [cells] from ``tile_records``, with their boxes.
        sample: int64 [cells], the row that each cell belongs to.
        photo: int64 [cells], row in /images.
        ``tiles["run_count"]`` is 1 in the target's cell and 0 elsewhere, for the caller to replace.
    """
    most = int((rows["grid"].astype(np.int64) ** 2).sum())
    tiles, sample, photo = tile_records(most, size, size, **frame), np.empty(most, np.int64), np.empty(most, np.int64)
    cells = write_boxes(rows, size, tiles, sample, photo)
    return tiles[:cells], sample[:cells], photo[:cells]
