"""How the Loader scales: samples/s and memory against batch size, frame size, number of photos and number of loaders.

    python benchmarks/scaling.py                  generated photos of about 640x480, repeated; 15 minutes on two cores
    python benchmarks/scaling.py F.ris.h5         one's own photos, repeated
    python benchmarks/scaling.py --quick          in small, under a minute: figures of no worth

Writes scaling.json and, from that alone, docs/scaling.svg (plots.py). Every point runs in processes of its own. Their
first batches must be equal in all modes before anything is timed. All points are measured in turn, and then again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, file_name, generate, revision
from repeat import repeat_dataset, repeat_tiles, spread_table

from nemo_dali.commands.bench import Spread, machine, timed_start, versions
from nemo_dali.data.dataset import Dataset
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles
from nemo_dali.tiles.file import TileFile

POLICY = MosaicPolicy(p_mined=1.0, max_similarity=0.35)
DEPTH = 100  # of the tables: the policy's top_k, so that the table of 100,000 photos is soon written
SENTENCES = 7  # a photo, as in RefCOCO
MEMORY_BATCHES = 12  # that are looked at, after the timing
MIB = 2**20


@dataclass(frozen=True)
class Point:
    """What is measured: one batch size, frame size, data set and number of loaders."""

    batch_size: int = 16
    size: int = 480
    photos: int = 1000
    loaders: int = 1


@dataclass(frozen=True)
class Plan:
    """All that is measured, and for how long."""

    sweeps: dict[str, list[Point]]  # by the field of Point that varies
    rounds: int = 2
    windows: int = 4  # timed in each round
    seconds: float = 1.0  # a window; as long is warmed up
    distinct: int = 400  # generated photos


FULL = Plan(
    {
        "batch_size": [Point(batch_size=n) for n in (1, 4, 16, 64, 128)],
        "size": [Point(size=n) for n in (224, 336, 480, 640, 1024)],
        "photos": [Point(size=224, photos=n) for n in (1000, 3000, 10_000, 30_000, 100_000)],
        "loaders": [Point(loaders=n) for n in (1, 2, 4)],
    }
)
SMALL = Point(batch_size=4, size=96, photos=60)
QUICK = Plan(
    {
        "batch_size": [SMALL, replace(SMALL, batch_size=8)],
        "size": [SMALL],
        "photos": [SMALL],
        "loaders": [SMALL, replace(SMALL, loaders=2)],
    },
    rounds=1,
    windows=2,
    seconds=0.2,
    distinct=40,
)


# --- files -----------------------------------------------------------------------------------------------------------


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
        dataset, negatives = self.folder / f"{point.photos}.ris.h5", self.folder / f"{point.photos}.neg.h5"
        if not dataset.exists():
            sentences = SENTENCES * point.photos
            made = repeat_dataset(
                Dataset.open(self.source), dataset, photos=point.photos, sentences=sentences, copies=self.copies
            )
            spread_table(made, negatives, depth=DEPTH)
        files = {"dataset": dataset, "negatives": negatives}
        if mode == "stream":
            return files
        tiles = self.folder / f"{point.photos}.{point.size}.tiles.h5"
        if not tiles.exists():
            once = self.folder / f"source.{point.size}.tiles.h5"
            if not once.exists():
                make_tiles(self.source, size=point.size, output=once, grids=(2,))
            repeat_tiles(TileFile.open(once), Dataset.open(dataset), tiles)
        return files | {"tiles": tiles}

    def nbytes(self, point: Point) -> int:
        """Of the photos and the tiles of a point: what its modes keep in the page cache, at most."""
        photos = self.photos()
        return point.photos * (sum(path.stat().st_size for path in photos) // len(photos) + 3 * point.size**2 // 4)

    def photos(self) -> list[Path]:
        """The source's."""
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


# --- one process -----------------------------------------------------------------------------------------------------


def run_loader(point: Point, mode: str, rank: int, files: dict[str, Path], plan: Plan, end: Connection) -> None:
    """One of a point's loaders, in a process of its own.

    Sends the digest of its first batch, takes the time to begin at, sends its rates (samples/s in each window), what it
    read from the disk meanwhile and its memory.
    """
    import torch

    if point.loaders > 1:
        store = f"file://{files['dataset'].parent}/{os.getppid()}-{end.recv()}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=point.loaders)
    options: dict[str, Any] = {} if mode == "stream" else {"placement": mode}
    if gpu := mode in ("pinned", "device"):
        options["device"] = f"cuda:{rank % torch.cuda.device_count()}"
    threads = max(len(os.sched_getaffinity(0)) // point.loaders, 1)

    def make() -> Loader:
        return Loader(
            **files, **options, batch_size=point.batch_size, size=point.size, policy=POLICY, num_threads=threads
        )

    make().close()  # reads tokens, or makes them: the start that is timed is not the first
    loader, start_up = timed_start(make)
    batches = delivered(loader)
    end.send(digest(next(batches)))
    own, _ = memory()
    _rate(batches, loader, time.monotonic() + plan.seconds, gpu)
    end.send("warm")
    begin = end.recv()
    _rate(batches, loader, begin, gpu)  # until all are there
    read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    rates = [_rate(batches, loader, begin + (i + 1) * plan.seconds, gpu) for i in range(plan.windows)]
    read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - read
    found = [(own, 0)]
    for _ in range(MEMORY_BATCHES):
        next(batches)
        found.append(memory())
    own, mapped = np.max(found, axis=0)
    result = {
        "rates": rates,
        "start_up_s": start_up,
        "read_mib": read * 512 / MIB,
        "own_mib": own / MIB,
        "mapped_mib": mapped / MIB,
        "num_threads": threads,
    }
    if gpu:
        free, there = torch.cuda.mem_get_info(options["device"])
        result["gpu_mib"] = (there - free) / MIB
    end.send(result)
    loader.close()
    if point.loaders > 1:
        torch.distributed.destroy_process_group()


def _rate(batches: Iterator[Any], loader: Loader, until: float, gpu: bool) -> float:
    """Samples per second until that time of the machine's clock; at least one batch."""
    start, done = time.monotonic(), 0
    while not done or time.monotonic() < until:
        next(batches)
        done += 1
    if gpu:
        import torch

        torch.cuda.synchronize()
    return done * loader.batch_size / (time.monotonic() - start)


def delivered(loader: Loader) -> Iterator[Any]:
    """Batches from the beginning of epoch 0 on."""
    loader.set_epoch(0)
    while True:
        yield from loader


def digest(batch: Any) -> str:
    """Of everything that a training would see, and of the plan."""
    made = hashlib.sha256(batch.plan.tobytes())
    for tensor in (batch.image, batch.mask, batch.tokens, batch.attention_mask):
        made.update(tensor.cpu().numpy().data)
    return made.hexdigest()


def memory() -> tuple[int, int]:
    """Bytes of this process in memory: without the data files it maps (all processes share them), and just these."""
    total = mapped = 0
    shared = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            nbytes = int(line.split()[1]) * 1024
            total += nbytes
            mapped += nbytes * shared
        elif not line.split(" ", 1)[0].endswith(":"):  # where a mapping lies, and what it maps
            shared = line.endswith((".h5", ".npy"))  # data sets, tables, tiles and tokens
    return total - mapped, mapped


# --- all of them -----------------------------------------------------------------------------------------------------


def run_point(point: Point, mode: str, files: dict[str, Path], plan: Plan, number: int) -> tuple[list[str], Any]:
    """Run a point's loaders at once; digests of their first batches, and their results added up."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(point.loaders)]
    ends = [here for here, _ in pipes]
    processes = [
        context.Process(target=run_loader, args=(point, mode, rank, files, plan, there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for process, (_, there) in zip(processes, pipes, strict=True):
        process.start()
        there.close()  # so that a process that dies is heard of
    if point.loaders > 1:
        for end in ends:
            end.send(number)
    first = [end.recv() for end in ends]
    for end in ends:
        end.recv()
    begin = time.monotonic() + 0.1
    for end in ends:
        end.send(begin)
    results = [end.recv() for end in ends]
    for process in processes:
        process.join()
    together: dict[str, Any] = {"rates": np.sum([result.pop("rates") for result in results], axis=0).tolist()}
    for name in results[0]:
        together[name] = max(result[name] for result in results)
    return first, together


def run(plan: Plan, source: Path, folder: Path, *, modes: list[str], limit: int) -> dict[str, Any]:
    """Measure every point in every mode, ``plan.rounds`` times in turn.

    Args:
        source: .ris.h5 of the photos to repeat.
        folder: for the files, which are many times as large; not removed.
        limit: points with more bytes of photos and tiles than this are left out, and named in the result.
    """
    files = Files(folder, source)
    points = list(dict.fromkeys(point for sweep in plan.sweeps.values() for point in sweep))
    left_out = [point for point in points if files.nbytes(point) > limit]
    found: dict[tuple[Point, str], list[Any]] = {}
    expected: dict[Point, list[str]] = {}
    started, number = time.monotonic(), 0
    for _ in range(plan.rounds):
        for point in points:
            for mode in modes if point not in left_out else []:
                theirs = files.of(point, mode)
                files.warm(theirs)
                number += 1
                first, result = run_point(point, mode, theirs, plan, number)
                if expected.setdefault(point, first) != first:
                    sys.exit(f"The first batches of mode {mode} at {point} are not those of {modes[0]}.")
                found.setdefault((point, mode), []).append(result)
                print(f"{mode:7} {point}: {np.median(result['rates']):,.0f} samples/s", flush=True)
    source_set = Dataset.open(source)
    return {
        "points": [{"mode": mode, **asdict(point), **summary(rounds)} for (point, mode), rounds in found.items()],
        "sweeps": {name: [asdict(point) for point in sweep] for name, sweep in plan.sweeps.items()},
        "left_out": [asdict(point) for point in left_out],
        "config": {
            "policy": json.loads(POLICY.to_json()),
            "dtype": "float32",
            "rounds": plan.rounds,
            "windows": plan.windows,
            "window_s": plan.seconds,
            "limit_gib": round(limit / 2**30, 1),
            "distinct_photos": len(source_set.images.id),
            "megapixels_a_photo": round(float((source_set.images.width * source_set.images.height).mean() / 1e6), 3),
            "kib_a_photo": round(float(np.mean([path.stat().st_size for path in files.photos()])) / 1024, 1),
            "page_cache": "read once before each run; read_mib is what came from the disk while it was timed",
            "seconds": round(time.monotonic() - started),
        },
        "machine": machine(),
        "versions": versions(),
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a point in one mode: the spread of all windows, and the most of everything else."""
    most = {name: round(max(float(one[name]) for one in rounds), 3) for name in rounds[0] if name != "rates"}
    return {"samples_per_s": asdict(Spread.of(np.concatenate([one["rates"] for one in rounds]))), **most}


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "scaling.svg")
    options = parser.parse_args()
    import torch
    from plots import plot_scaling

    plan = QUICK if options.quick else FULL
    measured = revision()  # before the results change the tree
    gpu = torch.cuda.is_available()
    memory_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = run(
            plan,
            options.dataset or generate(folder, images=plan.distinct)[0],
            folder,
            modes=["stream", "host"] + (["pinned", "device"] if gpu else []),
            limit=memory_here // 3,
        )
    result["revision"] = measured
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if gpu else None
    path = options.output / (file_name("scaling", device) if device else "scaling.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    plot_scaling(path, options.plot)
    print(path, options.plot)


if __name__ == "__main__":
    main()
