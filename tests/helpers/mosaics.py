"""Samples to draw: photos and the arguments of the reference, and how tiles draw them."""

import numpy as np
from hypothesis import strategies as st

from nemo_dali.kernels import reference
from nemo_dali.kernels.plan.rows import PLAN
from nemo_dali.kernels.tile import RESAMPLE
from nemo_dali.pipeline.cells import lay_out

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
DTYPES = ["float32", "float16", "bfloat16", "uint8"]


def runs_of(random, height, width):
    """Run lengths that add up to the photo, with empty runs among them."""
    cuts = np.sort(random.integers(0, height * width + 1, random.integers(0, 12)))
    return np.diff(np.concatenate([[0], cuts, [height * width]])).astype(np.uint32)


def by_tiles(  # noqa: PLR0913  # the reference's own
    write, photos, *, grid, center, counts, cell, size, resample, table, channels_last, recipe=None
):
    """A whole sample: its frame and mask after ``write(tiles, photos, frame, table)``."""
    frame = np.full((size, size, 3) if channels_last else (3, size, size), 99, table.dtype)
    mask = np.full((size, size), 99, np.uint8)
    row = np.zeros(1, PLAN)
    row["grid"], row["cell"], row["center"], row["images"] = grid, cell, center, np.arange(9)
    tiles, _, shown = lay_out(row, size)
    photos = [photos[index] for index in shown]
    tiles["image"], tiles["mask"], tiles["table"] = frame.ctypes.data, mask.ctypes.data, table.ctypes.data
    tiles["frame_height"] = tiles["frame_width"] = size
    tiles["itemsize"], tiles["resample"] = table.itemsize, RESAMPLE[resample]
    tiles["channels_last"] = channels_last
    tiles["recipe"] = 0 if recipe is None else recipe.ctypes.data
    tiles["photo_height"], tiles["photo_width"] = [[photo.shape[axis] for photo in photos] for axis in (0, 1)]
    target = tiles["run_count"] == 1
    tiles["runs"][target], tiles["run_count"][target] = counts.ctypes.data, len(counts)
    write(tiles, photos, frame, table)
    return frame, mask


@st.composite
def samples(draw, largest_photo=120, largest_frame=150):
    """Photos and the arguments of ``reference.mosaic`` for a sample of any kind."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    grid = draw(st.sampled_from([1, 2, 3]))
    size = draw(st.integers(grid, largest_frame))
    shapes = random.integers(1, largest_photo, (grid * grid, 2))
    photos = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    cell = draw(st.integers(0, grid * grid - 1))
    return photos, {
        "grid": grid,
        "center": (draw(st.integers(0, size)), draw(st.integers(0, size))),
        "counts": runs_of(random, *photos[cell].shape[:2]),
        "cell": cell,
        "size": size,
        "resample": draw(st.sampled_from(sorted(RESAMPLE))),
        "table": reference.normalisation_table(MEAN, STD, draw(st.sampled_from(DTYPES))),
        "channels_last": draw(st.booleans()),
    }
