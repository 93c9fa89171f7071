"""How the Loader scales: samples/s, memory and start-up against everything that may grow.

    python benchmarks/scaling.py                  generated photos of about 640x480, repeated; 20 minutes on two cores
    python benchmarks/scaling.py F.ris.h5         your own photos, repeated
    python benchmarks/scaling.py --quick          on a small scale, under a minute: the figures mean nothing
    python benchmarks/scaling.py --work DIR --seconds 200     a part; repeat to continue until all is measured

What grows: batch, frame, photos, sentences, K and tau of the policy, and the ranks on one machine that share one tile
file, as fast as they can and at a training's pace. Makes scaling.json and, from that alone, docs/scaling.svg
(plots.py). Every point runs in its own processes. Their first batches, made before anything is timed, must be equal in
all modes. All points are measured in turn, and then again. ``scaling_points.py`` lists them.
"""

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, file_name, generate, revision
from scaling_points import FULL, MIB, QUICK, Files, Plan, Point, Progress

from nemo_dali.commands.bench import Spread, machine, timed_start, versions
from nemo_dali.data.dataset import Dataset
from nemo_dali.loader.loader import Loader

MEMORY_BATCHES = 12  # over which memory is measured, after the timing
PLAN_ROWS = 4096  # that are planned at once
PLANS = 20  # the first is not timed
SUMMED = ("pss_mib", "cpu_cores")  # over the loaders; of everything else, the maximum counts


# --- one process -----------------------------------------------------------------------------------------------------


def run_loader(point: Point, mode: str, rank: int, files: dict[str, Path], plan: Plan, end: Connection) -> None:
    """One of a point's loaders, in a process of its own.

    Sends the digest of its first batch, receives the time to begin at, sends its rates (samples/s in each window), the
    share of time that it waited, what it read from the disk meanwhile and its memory; and ends when told to.
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
            **files, **options, batch_size=point.batch_size, size=point.size, policy=point.policy, num_threads=threads
        )

    make().close()  # not timed, because the first start makes the tokens
    loader, start_up = timed_start(make)
    batches = delivered(loader)
    end.send(digest(next(batches)))
    own, _, _ = memory()
    pace = Pace(batches, loader, point.rate, gpu)
    pace.run(time.monotonic() + plan.seconds)
    end.send("warm")
    begin = end.recv()
    pace.run(begin)  # until all are ready
    before, pace.waited, start = resource.getrusage(resource.RUSAGE_SELF), 0.0, time.monotonic()
    rates = [pace.run(begin + (i + 1) * plan.seconds) for i in range(plan.windows)]
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = [(own, 0, 0)]
    for _ in range(MEMORY_BATCHES):
        next(batches)
        found.append(memory())
    own, mapped, share = np.max(found, axis=0)
    result = {
        "rates": rates,
        "start_up_s": start_up,
        "waiting": pace.waited / seconds,
        "cpu_cores": cpu / seconds,
        "read_mib": (after.ru_inblock - before.ru_inblock) * 512 / MIB,
        "own_mib": own / MIB,
        "mapped_mib": mapped / MIB,
        "pss_mib": share / MIB,
        "num_threads": threads,
        **plan_rates(loader),
    }
    if gpu:
        free, there = torch.cuda.mem_get_info(options["device"])
        result["gpu_mib"] = (there - free) / MIB
    end.send(result)
    end.recv()  # once all have measured their memory, which some of them share
    loader.close()
    if point.loaders > 1:
        torch.distributed.destroy_process_group()


class Pace:
    """Takes batches as fast as they come (``rate`` 0), or as a training of ``rate`` samples/s would.

    Attributes:
        waited: seconds spent in ``next``.
    """

    def __init__(self, batches: Iterator[Any], loader: Loader, rate: int, gpu: bool) -> None:
        self._batches, self._size, self._gpu = batches, loader.batch_size, gpu
        self._step = loader.batch_size / rate if rate else 0.0  # seconds
        self.waited = 0.0

    def run(self, until: float) -> float:
        """Samples per second until that time of ``time.monotonic``; takes at least one batch."""
        start, done = time.monotonic(), 0
        while not done or time.monotonic() < until:
            asked = time.monotonic()
            next(self._batches)
            there = time.monotonic()
            self.waited += there - asked
            done += 1
            if self._step:
                time.sleep(self._step)  # the training step, which begins when its batch is there
        if self._gpu:
            import torch

            torch.cuda.synchronize()
        return done * self._size / (time.monotonic() - start)


def plan_rates(loader: Loader) -> dict[str, float]:
    """Thousands of plan rows/s: for sentences whose candidates are read for the first time, and afterwards."""
    count = min(PLAN_ROWS, len(loader.dataset))
    seconds = []
    for turn in range(PLANS):
        start = time.perf_counter()
        loader.plan(1, np.arange(count))
        if turn:  # the first draws the epoch's order, too
            seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    loader.plan(1, np.arange(count) + count)
    first = time.perf_counter() - start
    return {"plan_krows_per_s": count / float(np.median(seconds)) / 1e3, "plan_krows_per_s_new": count / first / 1e3}


def delivered(loader: Loader) -> Iterator[Any]:
    """Batches from the beginning of epoch 0 on."""
    loader.set_epoch(0)
    while True:
        yield from loader


def digest(batch: Any) -> str:
    """Digest of everything that a training would see, and of the plan."""
    made = hashlib.sha256(batch.plan.tobytes())
    for tensor in (batch.image, batch.mask, batch.tokens, batch.attention_mask):
        made.update(tensor.cpu().numpy().data)
    return made.hexdigest()


def memory() -> tuple[int, int, int]:
    """Bytes of this process in memory: without the data files it maps, just these, and its share of all (PSS).

    All processes share the data files. A page that n processes map counts as an nth in the PSS of each.
    """
    total = mapped = share = 0
    shared = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            nbytes = int(line.split()[1]) * 1024
            total += nbytes
            mapped += nbytes * shared
        elif line.startswith("Pss:"):
            share += int(line.split()[1]) * 1024
        elif not line.split(" ", 1)[0].endswith(":"):  # where a mapping is, and what it maps
            shared = line.endswith((".h5", ".cache"))  # data sets, tables, tiles and tokens
    return total - mapped, mapped, share


# --- all of them -----------------------------------------------------------------------------------------------------


def run_point(point: Point, mode: str, files: dict[str, Path], plan: Plan, number: int) -> tuple[list[str], Any]:
    """Run a point's loaders at once; returns the digests of their first batches, and their results combined."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(point.loaders)]
    ends = [here for here, _ in pipes]
    processes = [
        context.Process(target=run_loader, args=(point, mode, rank, files, plan, there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for process, (_, there) in zip(processes, pipes, strict=True):
        process.start()
        there.close()  # so that recv() raises if the process dies
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
    for end in ends:
        end.send("done")
    for process in processes:
        process.join()
    together: dict[str, Any] = {"rates": np.sum([result.pop("rates") for result in results], axis=0).tolist()}
    for name in results[0]:
        each = [result[name] for result in results]
        together[name] = sum(each) if name in SUMMED else max(each)
    return first, together


def run(
    plan: Plan,
    source: Path,
    folder: Path,
    *,
    modes: list[str],
    limit: int,
    progress: Progress | None = None,
    until: float = math.inf,
) -> dict[str, Any] | None:
    """Measure every point in every mode, ``plan.rounds`` times in turn; None if the time was up before that.

    Args:
        source: .ris.h5 of the photos to repeat.
        folder: for the files, which are many times as large; not removed.
        limit: points with more bytes of photos, tiles and table than this are left out, and named in the result.
        progress: what was measured already.
        until: by ``time.monotonic``.
    """
    files, progress = Files(folder, source), progress or Progress(None, {})
    points = list(dict.fromkeys(point for sweep in plan.sweeps.values() for point in sweep))
    left_out = [point for point in points if files.nbytes(point) > limit]
    found: dict[tuple[Point, str], list[Any]] = {}
    expected: dict[Point, list[str]] = {}
    number = 0
    for turn in range(plan.rounds):
        for point in points:
            for mode in modes if point not in left_out else []:
                number += 1
                if (name := progress.name(turn, mode, point)) not in progress.done:
                    if (started := time.monotonic()) > until:
                        return None
                    theirs = files.of(point, mode)
                    files.warm(theirs)
                    first, result = run_point(point, mode, theirs, plan, number)
                    progress.add(name, {"first": first, "result": result, "seconds": time.monotonic() - started})
                    print(f"{mode:7} {point}: {np.median(result['rates']):,.0f} samples/s", flush=True)
                first = progress.done[name]["first"]
                if expected.setdefault(point, first) != first:
                    sys.exit(f"The first batches of mode {mode} at {point} are not those of {modes[0]}.")
                found.setdefault((point, mode), []).append(progress.done[name]["result"])
            files.discard(point)
    source_set = Dataset.open(source)
    return {
        "points": [{"mode": mode, **asdict(point), **summary(rounds)} for (point, mode), rounds in found.items()],
        "sweeps": {name: [asdict(point) for point in sweep] for name, sweep in plan.sweeps.items()},
        "left_out": [asdict(point) for point in left_out],
        "config": {
            "policy": json.loads(points[0].policy.to_json()),
            "dtype": "float32",
            "rounds": plan.rounds,
            "windows": plan.windows,
            "window_s": plan.seconds,
            "limit_gib": round(limit / 2**30, 1),
            "distinct_photos": len(source_set.images.id),
            "megapixels_a_photo": round(float((source_set.images.width * source_set.images.height).mean() / 1e6), 3),
            "kib_a_photo": round(float(np.mean([path.stat().st_size for path in files.photos()])) / 1024, 1),
            "page_cache": "read once before each run; read_mib is what came from the disk while it was timed",
            "seconds": round(sum(one["seconds"] for one in progress.done.values())),
        },
        "machine": machine(),
        "versions": versions(),
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """A point in one mode: the spread of all windows, and the maximum of everything else."""
    most = {name: round(max(float(one[name]) for one in rounds), 3) for name in rounds[0] if name != "rates"}
    return {"samples_per_s": asdict(Spread.of(np.concatenate([one["rates"] for one in rounds]))), **most}


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "scaling.svg")
    parser.add_argument("--work", type=Path, help="folder of files and results so far, to go on with; kept")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further point after so long")
    parser.add_argument("--rounds", type=int, help="how often all points are measured")
    parser.add_argument("--sweeps", nargs="+", choices=list(FULL.sweeps), help="only these")
    options = parser.parse_args()
    if math.isfinite(options.seconds) and options.work is None:
        parser.error("--seconds needs --work, where the results so far are kept")
    until = time.monotonic() + options.seconds
    import torch
    from plots import plot_scaling

    plan = QUICK if options.quick else FULL
    if options.rounds is not None:
        plan = replace(plan, rounds=options.rounds)
    plan = replace(plan, sweeps={name: plan.sweeps[name] for name in options.sweeps or plan.sweeps})
    measured = revision()  # before the results change the tree
    gpu = torch.cuda.is_available()
    memory_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        of = {"revision": measured, "machine": machine(), "versions": versions(), "windows": plan.windows}
        made = folder / "data.ris.h5"
        result = run(
            plan,
            options.dataset or (made if made.exists() else generate(folder, images=plan.distinct)[0]),
            folder,
            modes=["stream", "host"] + (["pinned", "device"] if gpu else []),
            limit=memory_here // 3,
            progress=Progress(folder / "progress.jsonl", of | {"window_s": plan.seconds}),
            until=until,
        )
    if result is None:
        print(f"The time is up. The same command goes on; results so far are in {folder}.")
        return
    result["revision"] = measured
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if gpu else None
    path = options.output / (file_name("scaling", device) if device else "scaling.json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    plot_scaling(path, options.plot)
    print(path, options.plot)


if __name__ == "__main__":
    main()
