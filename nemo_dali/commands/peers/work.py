"""The work that all rows of the comparison are given, and what each of them says about itself.

The Loader is imported where it is used: its memory must not count as its peers'.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nemo_dali._choices import PeerDType, Resample
from nemo_dali.errors import NemoError

if TYPE_CHECKING:
    from nemo_dali.loader.loader import Loader

# 2x2 mosaics of four equal cells, nothing else; bounded by 1, as timings do not depend on which photos are drawn.
POLICY: dict[str, Any] = {"p_mined": 1.0, "grids": {2: 1.0}, "max_similarity": 1.0}
MOST_TIMED = 10_000  # pairs, and batches of a timing, as in ``bench loader``
Setting = dict[str, Any]  # by name; JSON-able


@dataclass(frozen=True)
class Work:
    """Mosaics of 2x2 photos with the target's mask, by the rows of a Loader's plan."""

    files: dict[str, Any]  # for the Loader
    tiles: Path  # for its mode "host"
    folder: Path  # of masks: REF.png, uint8 {0, 1} of the photo's size, one per referent
    photos: tuple[str, ...]  # path by photo row
    megapixels: float  # mean size of the photos
    rows: npt.NDArray[np.void]  # dtype PLAN [steps * batch_size], which are shown again and again
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    size: int
    dtype: PeerDType
    cores: int  # each row uses as many workers or threads

    @property
    def cell(self) -> int:
        """Height and width of a cell."""
        return self.size // 2

    def paths(self, index: int) -> list[str]:
        """The four photos of a sample, row by row of the mosaic."""
        return [self.photos[row] for row in self.rows["images"][index % len(self.rows), :4]]

    def mask(self, index: int) -> str:
        """The mask file of a sample's referent."""
        return str(self.folder / f"{self.rows['ref'][index % len(self.rows)]}.png")

    def target(self, index: int) -> int:
        """The target's cell, 0 to 3."""
        return int(self.rows["cell"][index % len(self.rows)])

    def place(self, cell: int) -> tuple[slice, slice]:
        """Where a cell is in the frame: y, x."""
        y, x = self.cell * (cell // 2), self.cell * (cell % 2)
        return slice(y, y + self.cell), slice(x, x + self.cell)

    @property
    def steps(self) -> int:
        """Batches until the first is shown again."""
        return len(self.rows) // self.batch_size

    def expected(self, resample: Resample, step: int) -> Path:
        """Where the Loader's batch of a step is kept."""
        return self.folder / f"{resample}.{step}.npz"

    def loader(self, resample: Resample = "cv2-linear", **options: Any) -> "Loader":
        """The Loader of these rows."""
        from nemo_dali.loader.loader import Loader
        from nemo_dali.plan.policy import MosaicPolicy

        return Loader(
            **self.files,
            batch_size=self.batch_size,
            policy=MosaicPolicy(**POLICY),
            size=self.size,
            dtype=self.dtype,
            mean=self.mean,
            std=self.std,
            num_threads=self.cores,
            resample=resample,
            **options,
        )


@dataclass(frozen=True)
class Row:
    """One row of the comparison: the Loader in a mode, or a peer."""

    name: str
    label: str  # for people
    start: Callable[[Work, Setting], Iterator[Any]]  # image and mask of batch after batch, in the order of the rows
    image: Resample  # the Loader's resampling that images are nearest to
    mask: Resample  # the same for masks
    tolerance: float = 0.0  # mean absolute difference of images, levels of 255
    worst: float = 0.0  # the same for any one cell of a batch
    is_peer: bool = True
    is_placed: bool = True  # photos go into the cells that the plan row names
    modules: tuple[str, ...] = ("torch",)  # that it imports
    packages: tuple[str, ...] = ("torch",)  # whose versions are recorded
    settings: Callable[[Work], list[Setting]] = field(default=lambda work: [{"threads": work.cores}])
    ahead: Callable[[Setting], int] = field(default=lambda setting: 3)  # most batches that it makes ahead
    masks: str = "PNG"  # what masks are read from
    cannot: tuple[str, ...] = ()


def make_work(  # the options of the command
    files: dict[str, Any],
    tiles: Path,
    folder: Path,
    *,
    batch_size: int,
    size: int,
    dtype: PeerDType,
    cores: int,
) -> Work:
    """Work on the rows of the first epoch; writes the masks of their referents into ``folder``.

    Raises:
        NemoError: photos are not local, or turned by their EXIF orientation, which peers would not do.
    """
    from PIL import Image

    from nemo_dali.data.s3 import is_remote
    from nemo_dali.loader.loader import Loader
    from nemo_dali.plan.policy import MosaicPolicy

    policy = MosaicPolicy(**POLICY)
    loader = Loader(**files, batch_size=batch_size, policy=policy, size=size, dtype=dtype, num_threads=cores)
    corpus = loader.corpus
    if any(is_remote(dataset.image_root) for dataset in corpus.datasets):
        raise NemoError("Peers read local photos. Say where they are with --images.")
    if corpus.photo_turn is not None and (corpus.photo_turn > 1).any():
        raise NemoError("Peers show photos as stored, and this data set turns some. Index it with --exif ignore.")
    rows = loader.plan(0, np.arange(len(loader) * batch_size))
    for ref in np.unique(rows["ref"]).tolist():
        Image.fromarray(corpus.mask(ref)).save(folder / f"{ref}.png")
    photos = tuple(corpus.photo_path(row) for row in range(len(corpus.photo_width)))
    megapixels = float((corpus.photo_width.astype(np.int64) * corpus.photo_height).mean() / 1e6)
    mean, std = tuple(map(float, loader.mean)), tuple(map(float, loader.std))
    loader.close()
    return Work(files, tiles, folder, photos, megapixels, rows, mean, std, batch_size, size, dtype, cores)
