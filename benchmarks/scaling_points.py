"""The points that ``scaling.py`` measures, and the files that each needs."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from repeat import repeat_dataset, repeat_tiles, spread_table

from nemo_dali.data.dataset import Dataset
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles
from nemo_dali.tiles.file import TileFile

DEPTH = 100  # of the tables: the policy's top_k, so that a table of 100,000 photos is written quickly; or a larger K
SENTENCES = 7  # a photo, as in RefCOCO
MIB = 2**20


@dataclass(frozen=True)
class Point:
    """What is measured.

    Attributes:
        loaders: ranks, each in a process of its own, that share the files and the machine's cores.
        top_k, max_similarity: of the policy.
        sentences: of the data set; 0: ``SENTENCES`` a photo.
        rate: samples/s that each loader is asked for, as a training would; 0: as many as it can give.
    """

    batch_size: int = 16
    size: int = 480
    photos: int = 1000
    loaders: int = 1
    top_k: int = 100
    max_similarity: float = 0.35
    sentences: int = 0
    rate: int = 0

    @property
    def policy(self) -> MosaicPolicy:
        """All mosaics, of mined negatives."""
        return MosaicPolicy(p_mined=1.0, top_k=self.top_k, max_similarity=self.max_similarity)

    @property
    def rows(self) -> int:
        """How many sentences there are."""
        return self.sentences or SENTENCES * self.photos

    @property
    def depth(self) -> int:
        """Depth of the table."""
        return max(DEPTH, self.top_k)


@dataclass(frozen=True)
class Plan:
    """All that is measured, and for how long."""

    sweeps: dict[str, list[Point]]  # by the field of Point that varies
    rounds: int = 2
    windows: int = 3  # timed in each round
    seconds: float = 1.0  # per window; the warm-up takes as long
    distinct: int = 400  # generated photos


FULL = Plan(
    {
        "loaders": [Point(loaders=n) for n in (1, 2, 4, 8)],
        "top_k": [Point(top_k=n) for n in (10, 100, 1000)],
        "max_similarity": [Point(max_similarity=tau) for tau in (0.3, 0.35, 0.4)],
        "sentences": [Point(sentences=n) for n in (10_000, 100_000, 1_000_000)],
        "rate": [Point(loaders=8, rate=n) for n in (16, 64, 256)],
        "batch_size": [Point(batch_size=n) for n in (1, 4, 16, 64, 128)],
        "size": [Point(size=n) for n in (224, 336, 480, 640, 1024)],
        "photos": [Point(size=224, photos=n) for n in (1000, 3000, 10_000, 30_000, 100_000)],
    }
)
SMALL = Point(batch_size=4, size=96, photos=60)
QUICK = Plan(
    {
        "batch_size": [SMALL, replace(SMALL, batch_size=8)],
        "size": [SMALL],
        "photos": [SMALL],
        "loaders": [SMALL, replace(SMALL, loaders=2)],
        "top_k": [SMALL],
        "max_similarity": [SMALL],
        "sentences": [SMALL],
        "rate": [replace(SMALL, loaders=2, rate=20)],
    },
    rounds=1,
    windows=2,
    seconds=0.2,
    distinct=40,
)


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """The files of every point, made when first asked for, in one folder; removed with it."""

    folder: Path
    source: Path  # .ris.h5
    copies: Path = field(init=False)

    def __post_init__(self) -> None:
        self.copies = self.folder / "photos"

    def of(self, point: Point, mode: str) -> dict[str, Path]:
        """Arguments for the Loader."""
        name = f"{point.photos}.{point.rows}"
        dataset, negatives = self.folder / f"{name}.ris.h5", self.folder / f"{name}.{point.depth}.neg.h5"
        if not dataset.exists():
            source = Dataset.open(self.source)
            repeat_dataset(source, dataset, photos=point.photos, sentences=point.rows, copies=self.copies)
        if not negatives.exists():
            spread_table(Dataset.open(dataset), negatives, depth=point.depth)
        files = {"dataset": dataset, "negatives": negatives}
        if mode == "stream":
            return files
        tiles = self._tiles(point)
        if not tiles.exists():
            once = self.folder / f"source.{point.size}.tiles.h5"
            if not once.exists():
                make_tiles(self.source, size=point.size, output=once, grids=(2,))
            repeat_tiles(TileFile.open(once), Dataset.open(dataset), tiles)
        return files | {"tiles": tiles}

    def discard(self, point: Point, *, least: int = 2**30) -> None:
        """Remove a point's tiles if they take ``least`` bytes: the disk need not hold those of all points at once."""
        tiles = self._tiles(point)
        if tiles.exists() and tiles.stat().st_size >= least:
            tiles.unlink()

    def _tiles(self, point: Point) -> Path:
        return self.folder / f"{point.photos}.{point.rows}.{point.size}.tiles.h5"

    def nbytes(self, point: Point) -> int:
        """Bytes of a point's photos, tiles and table: what its modes keep in the page cache, at most."""
        photos = self.photos()
        photo = sum(path.stat().st_size for path in photos) // len(photos) + 3 * point.size**2 // 4
        return point.photos * photo + 8 * point.rows * min(point.depth, point.photos - 1)

    def photos(self) -> list[Path]:
        """The source's photos."""
        source = Dataset.open(self.source)
        return [Path(source.photo_path(row)) for row in range(len(source.images.id))]

    def warm(self, files: dict[str, Path]) -> None:
        """Read what a loader will read, so that it comes from the page cache."""
        buffer = bytearray(MIB)
        row = Dataset.open(files["dataset"]).photo_path if "tiles" not in files else None
        photos = [row(i) for i in range(len(Dataset.open(files["dataset"]).images.id))] if row else []
        for path in [*files.values(), *photos]:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


@dataclass
class Progress:
    """Results of the points so far, one line each in a file, so that an interrupted run can continue.

    Attributes:
        path: of the file; None: nothing is kept.
        of: what must be the same for a run to continue.
    """

    path: Path | None
    of: dict[str, Any]
    done: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        if lines and json.loads(lines[0]) == json.loads(json.dumps(self.of)):
            complete = [line for line in lines[1:] if line.endswith("\n")]  # the last line may be cut off
            self.done = {name: result for name, result in map(json.loads, complete)}
        content = json.dumps(self.of) + "\n" + "".join(json.dumps(one) + "\n" for one in self.done.items())
        self.path.write_text(content)

    @staticmethod
    def name(turn: int, mode: str, point: Point) -> str:
        """What a result is called."""
        return f"{turn} {mode} {json.dumps(asdict(point))}"

    def add(self, name: str, result: Any) -> None:
        """Keep a result."""
        self.done[name] = result
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps([name, result]) + "\n")
                file.flush()
                os.fsync(file.fileno())
