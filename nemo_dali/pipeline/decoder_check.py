"""Which photos DALI's decoder refuses: photos that it refuses together are divided until each is tried alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.data.decoding import is_wrong_size
from nemo_dali.kernels.mosaic.cpu import DONE
from nemo_dali.kernels.tile import tile_records
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.paths import encode_path


def refused(
    paths: Sequence[str], width: npt.NDArray[Any], height: npt.NDArray[Any], *, num_threads: int
) -> dict[int, str | None]:
    """Read and decode photos with DALI's CPU decoder, and find out why it refuses some of them.

    Args:
        paths: of n photos, n > 0.
        width, height: int [n], in pixels, as they should be stored.

    Returns:
        DALI's message for each photo refused, by its index in ``paths``; None for a photo of the wrong size.
    """
    tiles = tile_records(len(paths), 0, 0)  # with empty boxes: only sizes are compared
    tiles["photo_width"], tiles["photo_height"] = width, height
    encoded = [encode_path(path) for path in paths]
    found: dict[int, str | None] = {}
    pipeline: StreamPipeline[None] = StreamPipeline(max_cells=len(paths), num_threads=num_threads, prefetch=1)

    def look(begin: int, end: int) -> None:
        pipeline.feed(encoded[begin:end], tiles[begin:end], None)
        try:
            status = pipeline.wait()
        except RuntimeError as error:
            if end - begin == 1:
                found[begin] = None if is_wrong_size(error) else str(error)
                return
            middle = (begin + end) // 2
            look(begin, middle)
            look(middle, end)
            return
        found.update((begin + int(index), None) for index in np.flatnonzero(status != DONE))

    try:
        look(0, len(paths))
    finally:
        pipeline.close()
    return found
