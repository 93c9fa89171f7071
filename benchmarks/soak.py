"""A long run with bad photos that is killed every few seconds and continues: is every sample right, and is none lost?

    python benchmarks/soak.py --minutes 30 [--json FILE]

One process trains under ``on_error="substitute"``: it writes down each batch and then the loader's state. It is killed
by SIGKILL, SIGTERM or SIGINT, at random, and the next one continues from the last state, with a random number of ranks
and of batches made ahead. What was written down must be the epochs in order without a gap, and every row the one that
follows from knowing all bad photos beforehand; one sample of each batch is also compared with one made by OpenCV
or Pillow, and pycocotools. A second process is never killed: it makes a new loader for each epoch, and its memory must
not grow.

Prints a line a minute and JSON at the end; the exit code is 1 if anything was wrong.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from common import generate, revision

from nemo_dali.commands.bench import machine, versions
from nemo_dali.commands.torch_baseline import Samples
from nemo_dali.kernels.plan.rows import PLAN
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.planner import Planner, Replaced
from nemo_dali.plan.policy import MosaicPolicy

POLICY = MosaicPolicy(p_mined=0.5, p_random=0.25, grids={2: 1.0, 3: 1.0}, jitter=0.5, max_similarity=0.9, top_k=20)
GLOBAL_BATCH, SIZE = 16, 224
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RECORD = np.dtype([("epoch", "i8"), ("row", PLAN)])
ENDING = 30.0  # seconds after which a process that should have ended counts as hanging
FIRST_BATCH = 120.0  # seconds after which a process that has made no batch, or no epoch, counts as hanging
GROWTH = 1.05  # of the memory, from the second third of the run to the last, that still counts as flat
# Each new pipeline brings new threads, and glibc gives these more arenas, each with gaps of its own: without the
# bound, memory grows by about 20 % more until it levels off after a hundred loaders, with or without bad photos.
ONE_HEAP = {"MALLOC_ARENA_MAX": "2"}


class Wrong(Exception):
    """What the soak is there to find."""


@dataclass(frozen=True)
class Folder:
    """What the processes share."""

    path: Path

    def loader(self, **options: Any) -> Loader:
        """A loader as all processes make it."""
        files = self.path / "data.ris.h5", self.path / "data.neg.h5"
        options = {"batch_size": GLOBAL_BATCH, "on_error": "substitute", "drop_last": False} | options
        return Loader(*files, policy=POLICY, size=SIZE, dtype="uint8", num_threads=2, **options)

    @property
    def log(self) -> Path:
        """RECORD after RECORD."""
        return self.path / "log"

    @property
    def memory(self) -> Path:
        """MiB at the end of each epoch, a line each."""
        return self.path / "memory"

    def read_state(self) -> dict[str, Any] | None:
        """The last state: the loader's, how many records it covers, how many samples were compared."""
        path = self.path / "state.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_state(self, state: dict[str, Any]) -> None:
        """Write the state atomically."""
        new = self.path / "state.new"
        new.write_text(json.dumps(state))
        new.replace(self.path / "state.json")


def damage(loader: Loader, share: float, random: Random) -> np.ndarray:
    """Damage a share of the photos, but at least one in each way; returns which, bool [photos]."""
    bad = np.zeros(len(loader.corpus.photo_width), bool)
    ways = (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no photo" * 100),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(other.read_bytes()),  # most likely of another size
    )
    other, *photos = random.sample(range(len(bad)), 1 + max(round(share * len(bad)), len(ways)))
    width, height = loader.corpus.photo_width, loader.corpus.photo_height
    size = width[other], height[other]
    other = Path(loader.corpus.photo_path(other))
    for number, photo in enumerate(photos):
        path = Path(loader.corpus.photo_path(photo))
        way = number % len(ways)
        if way == 4 and (width[photo], height[photo]) == size:
            way = 0
        ways[way](path)
        bad[photo] = True
    return bad


def train(folder: Folder, world: int, prefetch: int) -> None:
    """Continue from the last state, until killed."""
    state = folder.read_state() or {"loader": None, "records": 0, "compared": 0}
    ranks = [
        folder.loader(batch_size=GLOBAL_BATCH // world, rank=rank, world_size=world, prefetch=prefetch)
        for rank in range(world)
    ]
    if state["loader"] is not None:
        for loader in ranks:
            loader.load_state_dict(state["loader"])
    log = os.open(folder.log, os.O_WRONLY | os.O_CREAT)
    os.ftruncate(log, state["records"] * RECORD.itemsize)
    os.lseek(log, 0, os.SEEK_END)
    while True:
        for batches in zip(*ranks, strict=True):
            rows = np.concatenate([batch.plan for batch in batches])
            compare(ranks[0], batches[0], int(rows["position"][0]) % len(batches[0].plan))
            records = np.zeros(len(rows), RECORD)
            records["epoch"], records["row"] = ranks[0].epoch, rows
            os.write(log, records.tobytes())
            done = {"records": state["records"] + len(rows), "compared": state["compared"] + 1}
            state = {"loader": ranks[0].state_dict(), **done}
            folder.write_state(state)


def compare(loader: Loader, batch: Any, sample: int) -> None:
    """Compare one sample with OpenCV's, Pillow's and pycocotools'."""
    made = (batch.image, batch.mask, batch.tokens, batch.attention_mask)
    for name, one, other in zip(batch.__dataclass_fields__, made, Samples(loader, batch.plan)[sample], strict=False):
        if not (one[sample] == other).all():
            raise Wrong(f"{name} of {batch.plan[sample]} differs from an independent recomputation")


def watch(folder: Folder) -> None:
    """Run epochs, each with a new loader that meets the bad photos again, and write down the memory in use."""
    epoch = 0
    while True:
        loader = folder.loader()
        loader.set_epoch(epoch)
        if sum(1 for _ in loader) != len(loader):
            raise Wrong(f"epoch {epoch} ended early")
        loader.close()
        epoch += 1
        status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
        with folder.memory.open("a") as file:
            file.write(f"{int(status['RssAnon'].split()[0]) / 1024:.1f}\n")


@dataclass
class Check:
    """Goes through the log as it grows.

    Attributes:
        planner: of the undisturbed run.
        bad: bool [photos].
        epoch, position: of the next record.
        records: how many were checked. replaced: what was replaced in them.
    """

    planner: Planner
    bad: np.ndarray
    epoch: int = 0
    position: int = 0
    records: int = 0
    replaced: Replaced = field(default_factory=Replaced)

    def look(self, records: np.ndarray) -> None:
        """Check the next records, RECORD [n]: no gap, nothing twice, and each row the right one."""
        length = -(-self.planner.length // GLOBAL_BATCH) * GLOBAL_BATCH
        while len(records):
            part, records = np.split(records, [min(length - self.position, len(records))])
            expected = np.arange(self.position, self.position + len(part))
            gap = (part["epoch"] != self.epoch) | (part["row"]["position"] != expected)
            if gap.any():
                raise Wrong(f"epoch {self.epoch} does not go on at position {expected[gap][0]}")
            rows, replaced = self.planner.substitute(self.epoch, self.planner.plan(self.epoch, expected), self.bad)
            other = part["row"] != rows
            if other.any():
                raise Wrong(f"the sample at position {expected[other][0]} of epoch {self.epoch} is another")
            self.replaced += replaced
            self.records += len(part)
            self.position += len(part)
            if self.position == length:
                self.epoch, self.position = self.epoch + 1, 0


@dataclass
class Run:
    """The parent's side."""

    folder: Folder
    check: Check
    random: Random
    kills: Counter[str] = field(default_factory=Counter)
    seen: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()))  # epochs of the other process; when

    def start(self, part: str, *arguments: int, **environment: str) -> subprocess.Popen[bytes]:
        """Start this script to run another part of it."""
        command = [sys.executable, __file__, "--folder", self.folder.path, part, *map(str, arguments)]
        with (self.folder.path / f"errors{part}").open("wb") as errors:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=os.environ | environment)

    def ended(self, part: str, process: subprocess.Popen[bytes]) -> Wrong:
        """What to raise if a process ended by itself."""
        return Wrong(f"the process {part} ended by itself, code {process.returncode}: {self.errors(part)}")

    def errors(self, part: str) -> str:
        """The end of what a process wrote to its standard error."""
        return (self.folder.path / f"errors{part}").read_text(errors="replace")[-3000:]

    def live(self) -> None:
        """One life of the process that trains, mostly ended a few seconds after its first batch."""
        world, prefetch = self.random.choice([1, 2, 4]), self.random.randint(1, 4)
        before = self.folder.read_state()
        process = self.start("--train", world, prefetch)
        begin, short = time.monotonic(), self.random.random() < 1 / 6
        end = begin + (self.random.uniform(0.5, 5) if short else FIRST_BATCH)
        while process.poll() is None and time.monotonic() < end and self.folder.read_state() == before:
            time.sleep(0.1)
        if process.poll() is None and not short and self.folder.read_state() == before:
            process.kill()
            raise Wrong(f"training made no batch in {FIRST_BATCH:.0f} s: {self.errors('--train')}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self.random.uniform(0, 6))
        if process.poll() is not None:
            raise self.ended("--train", process)
        kind = self.random.choice(SIGNALS)
        self.kills[kind.name] += 1
        for _ in range(2):
            process.send_signal(kind)
            before = self.folder.read_state()
            try:
                process.wait(ENDING)
                return
            except subprocess.TimeoutExpired:
                # Python drops an interrupt in a destructor, and some libraries drop one during their import: training
                # then continues, and a person would press Ctrl+C again.
                if kind != signal.SIGINT or self.folder.read_state() == before:
                    break
                self.kills["SIGINT dropped"] += 1
        process.kill()
        raise Wrong(f"training did not end within {ENDING:.0f} s of {kind.name}: {self.errors('--train')}")

    def look(self) -> None:
        """Check what was written down since the last check."""
        if (state := self.folder.read_state()) is None:
            return
        records = np.fromfile(self.folder.log, RECORD, count=state["records"])
        self.check.look(records[self.check.records :])

    def look_at(self, witness: subprocess.Popen[bytes]) -> None:
        """Check that the process that is never killed still makes epochs."""
        if witness.poll() is not None:
            raise self.ended("--watch", witness)
        if len(memory := self.memory()) > self.seen[0]:
            self.seen = len(memory), time.monotonic()
        elif time.monotonic() > self.seen[1] + FIRST_BATCH:
            raise Wrong(f"the process --watch made no epoch in {FIRST_BATCH:.0f} s: {self.errors('--watch')}")

    def memory(self) -> list[float]:
        """MiB that the second process held after each epoch."""
        lines = self.folder.memory.read_text().splitlines() if self.folder.memory.exists() else []
        return [float(line) for line in lines]


def check_memory(memory: list[float]) -> None:
    """Compare the last third of a run with the one before, MiB after each epoch; short runs are not checked."""
    third = len(memory) // 3
    if third < 4:
        return
    if statistics.median(memory[-third:]) > GROWTH * statistics.median(memory[third : 2 * third]):
        raise Wrong(f"memory grew, MiB after each epoch: {memory}")


def soak(folder: Folder, options: argparse.Namespace) -> dict[str, Any]:
    """The whole run; returns what it found.

    Raises:
        Wrong: a sample was wrong or lost, a process did not end when told or ended by itself, or memory grew.
    """
    random = Random(options.seed)
    generate(folder.path, images=options.images)
    loader = folder.loader()
    bad = damage(loader, options.share, random)
    run = Run(folder, Check(loader._planner, bad), random)
    begin = time.monotonic()
    until, minute = begin + 60 * options.minutes, 1
    witness = run.start("--watch", **ONE_HEAP)
    try:
        while time.monotonic() < until or run.check.records < options.samples:
            run.live()
            run.look()
            run.look_at(witness)
            if time.monotonic() > begin + 60 * minute:
                minute += 1
                kept, memory = f"{run.check.records} samples kept, epoch {run.check.epoch}", run.memory()
                print(f"{time.monotonic() - begin:.0f} s: {dict(run.kills)}, {kept}, {memory[-1:]} MiB", flush=True)
        run.look_at(witness)
    finally:
        witness.kill()
        witness.wait()
    memory = run.memory()
    check_memory(memory)
    state = folder.read_state()
    return {
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "photos": len(bad),
        "bad_photos": int(bad.sum()),
        "kills": dict(run.kills),
        "samples": run.check.records,
        "epochs": run.check.epoch,
        "replaced": {"targets": run.check.replaced.targets, "negatives": run.check.replaced.negatives},
        "compared": state["compared"] if state else 0,
        "memory_mib": memory[:: max(len(memory) // 30, 1)],
        "machine": machine(),
        "versions": versions(),
        "revision": revision(),
    }


def main() -> None:
    """Run the soak, or the part of it that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--samples", type=int, default=0, help="to be kept at least, however long it takes")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--share", type=float, default=0.01, help="of bad photos; at least one of each of five kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the result goes; it is printed besides")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    if options.train:
        train(Folder(options.folder), *options.train)
    if options.watch:
        watch(Folder(options.folder))
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = soak(Folder(Path(folder)), options)
        except Wrong as error:
            sys.exit(f"Wrong: {error}")
    text = json.dumps(result)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
