"""Where resident tiles lie in memory, and which of them a sample's cells show."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nemo_dali.corpus import Corpus, PathLike
from nemo_dali.policy import MosaicPolicy
from nemo_dali.tiles import TileFile


def grids_of(policy: MosaicPolicy) -> set[int]:
    """The grids that a policy shows; 1 for single photos."""
    grids = {1} if policy.p_mined + policy.p_random < 1 else set()
    if policy.p_mined + policy.p_random > 0:
        grids |= {grid for grid, weight in policy.grids.items() if weight > 0}
    return grids


class HostTiles:
    """The mapped tile files of a corpus: one copy per node, in the page cache.

    Args:
        paths: one .tiles.h5 file per data set, in the same order.
        size, resample, policy: of the loader.

    Raises:
        ValueError: lists of different lengths, or a jittered crossing: its cells have no fixed size.
        FileFormatError: a file that does not fit the data set, the size, the resampling or the policy's grids.
    """

    def __init__(
        self, paths: Sequence[PathLike], corpus: Corpus, *, size: int, resample: str, policy: MosaicPolicy
    ) -> None:
        if len(paths) != len(corpus.datasets):
            raise ValueError(f"tiles ({len(paths)} given) must be one per data set ({len(corpus.datasets)})")
        if policy.jitter > 0 and 2 in grids_of(policy):
            raise ValueError(
                f"jitter ({policy.jitter}) must be 0 with tiles, whose sizes are fixed. Leave tiles out to decode each "
                "photo as it is needed."
            )
        self.files = [TileFile.open(path) for path in paths]
        for file, dataset in zip(self.files, corpus.datasets, strict=True):
            file.check_dataset(dataset)
            file.check(size=size, resample=resample, grids=grids_of(policy))
        shapes = set.intersection(*(set(file.arrays) for file in self.files))
        self._addresses = {shape: self._joined(*shape) for shape in shapes}

    def _joined(self, height: int, width: int) -> npt.NDArray[np.uint64]:
        """Address of each photo's tile, uint64 [photos]."""
        parts = []
        for file in self.files:
            base, nbytes = file.address(height, width)
            parts.append(np.uint64(base) + np.arange(len(file.digest), dtype=np.uint64) * np.uint64(nbytes))
        return np.concatenate(parts)

    def addresses(
        self, heights: npt.NDArray[np.int32], widths: npt.NDArray[np.int32], photos: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint64]:
        """Of the tiles of photos [n] at given sizes [n], uint64 [n]."""
        found = np.empty(len(photos), np.uint64)
        for shape in set(zip(heights.tolist(), widths.tolist(), strict=True)):
            wanted = (heights == shape[0]) & (widths == shape[1])
            found[wanted] = self._addresses[shape][photos[wanted]]
        return found
