"""How much of its time a real training waits for the Loader, beside what ``bench loader --starve`` says for such steps.

    python benchmarks/waiting.py                              128 pixels in batches of 16, 480 in batches of 8
    python benchmarks/waiting.py --sizes 128 --modes host     only one case; the others' results stay in the file

The training is that of examples/train_ris.py, half of its samples mosaics, on generated photos. On a machine without a
GPU it computes on the same cores as the loader: the time of a step on a batch that is already there shows what that
costs. These are timed in turn, window by window:

    alone   steps on one batch over and over, while the loader has nothing to do
    real    steps on the loader's batches: the time inside ``next()``, and the time outside
    played  the same with each step slept through, as ``--starve`` has it, for as long as the real ones took

Each case is a process of its own. Writes waiting.json.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, generate, in_a_process, revision

from nemo_dali.commands.bench import Spread, machine, versions
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles

sys.path.append(str(ROOT / "examples"))
from train_ris import WORDS, Training

BATCH_SIZES = {128: 16, 480: 8}
POLICY = MosaicPolicy(max_similarity=0.9)
WARM_UP = 2  # steps until the full number of batches is in flight


def wait(batches: Iterator[Any], steps: int, work: Any) -> tuple[float, float]:
    """Seconds inside and outside ``next()`` over some steps, after ``WARM_UP`` that are not counted."""
    inside, begin = 0.0, 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            inside, begin = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        inside += time.perf_counter() - asked
        work(batch)
    return inside, time.perf_counter() - begin - inside


def measure(options: dict[str, Any], windows: int, steps: int, end: Connection) -> None:
    """Time one case in a process of its own, and send what was found."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    placement = "pinned" if gpu and "tiles" in options else "host"
    loader = Loader(**options, policy=POLICY, context_length=WORDS, device=str(device), placement=placement)
    training = Training(device, learning_rate=1e-3, steps=10_000, warm_up=100)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    found: dict[str, list[float]] = {name: [] for name in ("step_s", "step_alone_s", "waiting", "waiting_played")}

    def learn(batch: Any) -> None:
        training.learn(batch)
        if gpu:
            torch.cuda.synchronize()

    for _ in range(windows):
        same = itertools.repeat(next(batches))
        found["step_alone_s"].append(wait(same, steps, learn)[1] / steps)
        inside, outside = wait(batches, steps, learn)
        found["step_s"].append(outside / steps)
        found["waiting"].append(inside / (inside + outside))
        seconds = outside / steps
        inside, outside = wait(batches, steps, lambda _, seconds=seconds: time.sleep(seconds))
        found["waiting_played"].append(inside / (inside + outside))
    row = {name: asdict(Spread.of(values)) for name, values in found.items()}
    end.send({**row, "num_threads": loader.num_threads, "torch_threads": torch.get_num_threads()})
    loader.close()


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--modes", nargs="+", choices=("stream", "host"), default=["stream", "host"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of a window")
    parser.add_argument("--images", type=int, default=400, help="photos to generate")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    path, measured = options.output / "waiting.json", revision()
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    where = {"device": "cuda" if torch.cuda.is_available() else "cpu", "machine": machine(), "versions": versions()}
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        dataset, negatives = generate(Path(name), images=options.images)
        for size in options.sizes:
            for mode in options.modes:
                case = {"size": size, "batch_size": BATCH_SIZES.get(size, 8)}
                arguments: dict[str, Any] = case | {"dataset": dataset, "negatives": negatives}
                if mode == "host":
                    arguments["tiles"] = Path(name) / f"{size}.tiles.h5"
                    make_tiles(dataset, size=size, output=arguments["tiles"], grids=(1, 2))
                case["mode"] = mode
                print(case, flush=True)
                case |= in_a_process(measure, arguments, options.windows, options.steps)
                case |= {"windows": options.windows, "steps": options.steps, "revision": measured}
                print(json.dumps(case), flush=True)
                rows = [row for row in rows if (row["size"], row["mode"]) != (size, mode)] + [case]
                path.write_text(json.dumps({"rows": rows, **where}, indent=2) + "\n")


if __name__ == "__main__":
    main()
