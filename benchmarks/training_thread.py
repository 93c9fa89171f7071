"""What a step costs the training thread: CPU time of the thread that asks for batches, resident tiles on the CPU.

    python benchmarks/training_thread.py                     this checkout
    python benchmarks/training_thread.py --beside CHECKOUT   this and another one in turn, and their ratio

Steps of 64 2x2 mosaics, of 8,000 photos that repeat generated refs and tiles. Frames are small, so that DALI's thread,
which writes them, is rarely what is waited for. Each turn is a separate process, and the median of its rounds counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHOTOS, SENTENCES, SIZE, BATCH = 8000, 50_000, 64, 64
ROUNDS, STEPS = 7, 258  # an epoch has 258 steps


def measure(folder: Path) -> dict[str, float]:
    """Microseconds per step in this process: CPU time of this thread and of all threads, and wall time."""
    from nemo_dali import Loader, MosaicPolicy

    files = [folder / f"large.{end}.h5" for end in ("ris", "neg", "tiles")]
    policy = MosaicPolicy(p_mined=1.0)
    options = {"batch_size": BATCH, "size": SIZE, "policy": policy, "num_threads": 1, "infinite": True}
    batches = iter(Loader(*files[:2], tiles=files[2], **options))
    for _ in range(STEPS):  # every checksum is compared once
        next(batches)
    clocks = {"thread": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
    taken: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(ROUNDS):
        begin = {name: clock() for name, clock in clocks.items()}
        for _ in range(STEPS):
            next(batches)
        for name, clock in clocks.items():
            taken[name].append((clock() - begin[name]) / STEPS * 1e6)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, to be measured in turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    # Not imported above: a turn of another checkout has its own package.
    from common import ROOT, generate
    from startup import make_files

    checkouts = [ROOT] if options.beside is None else [options.beside.resolve(), ROOT]
    turns: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        source, _ = generate(Path(folder))
        make_files(Path(folder), source, photos=PHOTOS, sentences=SENTENCES, size=SIZE)
        for _ in range(options.turns):
            for checkout in checkouts:
                command = [sys.executable, __file__, "--measure", folder]
                environment = {**os.environ, "PYTHONPATH": str(checkout)}
                run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                turns[checkout].append(json.loads(run.stdout))
    for checkout, found in turns.items():
        medians = {name: round(statistics.median(turn[name] for turn in found)) for name in found[0]}
        print(checkout.name, "us a step:", medians)
    if options.beside is not None:
        before, after = turns.values()
        for name in before[0]:
            ratios = [new[name] / old[name] for old, new in zip(before, after, strict=True)]
            print(f"{name}: {statistics.median(ratios):.2f} of the other's ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
