"""How long a Loader takes to start at the scale of RefCOCO, and on what: open, map, build, first batch.

    python benchmarks/startup.py                                   17,000 photos, 120,000 sentences, stream and host
    python benchmarks/startup.py --photos 100000 --sentences 700000

Every start is in a fresh process, on a machine that has started such a loader before: kernels are compiled, tokens are
in the cache and files in the page cache. Importing torch and DALI is timed separately. Writes startup.json.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from common import RESULTS, generate, in_a_process, revision
from repeat import repeat_dataset, repeat_tiles, spread_table

from nemo_dali.commands.bench import Spread, machine, timed_start, versions
from nemo_dali.data.dataset import Dataset
from nemo_dali.loader._assembly import Assembler
from nemo_dali.loader._steps import StepPlanner
from nemo_dali.loader.loader import Loader
from nemo_dali.loader.sources import Corpus
from nemo_dali.mining.table import NegativeTable
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles
from nemo_dali.tiles.file import TileFile

POLICY = MosaicPolicy(p_mined=1.0, max_similarity=0.35)
STAGES: dict[str, tuple[Any, str]] = {
    "open data set": (Dataset, "open"),
    "open table": (NegativeTable, "open"),
    "open tiles": (TileFile, "open"),
    "tokens": (Corpus, "tokens"),
    "build graph": (StreamPipeline, "__init__"),
    "plan": (StepPlanner, "plan"),  # of the batches made ahead
    "prepare": (Assembler, "prepare"),
    "feed": (StreamPipeline, "feed"),
    "wait": (StreamPipeline, "wait"),  # for the first batch
}


def make_files(folder: Path, source: Path, *, photos: int, sentences: int, size: int) -> dict[str, Path]:
    """Data set, table and tiles of ``photos`` photos, which repeat the source's."""
    files = {name: folder / f"large.{end}.h5" for name, end in (("dataset", "ris"), ("negatives", "neg"))}
    files["tiles"] = folder / "large.tiles.h5"
    large = repeat_dataset(Dataset.open(source), files["dataset"], photos=photos, sentences=sentences)
    spread_table(large, files["negatives"])
    make_tiles(source, size=size, output=folder / "source.tiles.h5", grids=(2,))
    repeat_tiles(TileFile.open(folder / "source.tiles.h5"), large, files["tiles"])
    return files


def start_once(files: dict[str, Path], options: dict[str, Any], end: Connection) -> None:
    """Start a loader in a process of its own, and send how long that and its stages took."""
    begin = time.perf_counter()
    import nvidia.dali.plugin.numba  # noqa: F401  # timed
    import torch  # noqa: F401  # timed

    imports = time.perf_counter() - begin
    stages = dict.fromkeys(STAGES, 0.0)
    read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    with ExitStack() as stack:
        for name, (owner, method) in STAGES.items():
            timed = _timed(getattr(owner, method), name, stages)
            if isinstance(vars(owner)[method], staticmethod):
                timed = staticmethod(timed)
            stack.enter_context(mock.patch.object(owner, method, timed))
        loader, start_up = timed_start(lambda: Loader(**files, **options, policy=POLICY))
    stages["all else"] = start_up - sum(stages.values())
    read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - read
    end.send({"start_up_s": start_up, "imports_s": imports, "read_mib": read / 2048, "stages_s": stages})
    loader.close()


def _timed(function: Callable[..., Any], name: str, stages: dict[str, float]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            stages[name] += time.perf_counter() - start

    return call


def measure(files: dict[str, Path], options: dict[str, Any], *, starts: int) -> dict[str, Any]:
    """Start loaders in processes one after the other; the first is not counted."""
    found = [in_a_process(start_once, files, options) for _ in range(starts + 1)]
    del found[0]
    return {
        **{name: asdict(Spread.of([one[name] for one in found])) for name in ("start_up_s", "imports_s", "read_mib")},
        "stages_s": {
            name: round(float(np.median([one["stages_s"][name] for one in found])), 4) for name in found[0]["stages_s"]
        },
    }


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=17_000)
    parser.add_argument("--sentences", type=int, default=120_000)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured = revision()  # before the results change the tree
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_files(
            folder, generate(folder)[0], photos=options.photos, sentences=options.sentences, size=options.size
        )
        for mode in ("stream", "host"):
            theirs = {name: path for name, path in files.items() if name != "tiles" or mode == "host"}
            arguments = {"batch_size": options.batch_size, "size": options.size}
            result[mode] = measure(theirs, arguments, starts=options.starts)
            print(mode, json.dumps(result[mode]))
    result |= {
        "config": {"photos": options.photos, "sentences": options.sentences, "policy": json.loads(POLICY.to_json())}
        | {"size": options.size, "batch_size": options.batch_size, "starts": options.starts},
        "machine": machine(),
        "versions": versions(),
        "revision": measured,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "startup.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
