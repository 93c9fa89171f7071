"""The loader beside decode-only DALI and a PyTorch DataLoader: the stream, both resamplings, and resident tiles.

    python benchmarks/loader.py                              generated photos of about 640x480
    python benchmarks/loader.py F.ris.h5 F.neg.h5            your own

Prints the medians and writes <mode>.<resample>.json. The ratios count; samples per second vary from day to day.
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path

from common import RESULTS, generate, revision

from nemo_dali.commands.bench import bench_loader, timed_start
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles

STARVE = 200.0  # milliseconds of a training step


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("negatives", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.dataset is not None and options.negatives is None:
        parser.error("a data set needs its negative table")
    measured = revision()  # before the results change the tree
    options.output.mkdir(parents=True, exist_ok=True)
    policy = MosaicPolicy(p_mined=1.0)
    with tempfile.TemporaryDirectory() as folder:
        files = (options.dataset, options.negatives) if options.dataset else generate(Path(folder))
        tiles = Path(folder) / "f.tiles.h5"
        make_tiles(files[0], size=480, output=tiles, grids=(2,))
        for resample, more in (("cv2-linear", {}), ("pillow-bilinear", {}), ("cv2-linear", {"tiles": tiles})):
            make = functools.partial(
                Loader, *files, batch_size=options.batch_size, policy=policy, num_threads=2, resample=resample, **more
            )
            timed_start(make)[0].close()  # compiles what this machine has not compiled yet
            loader, seconds = timed_start(make)
            result = bench_loader(loader, pairs=options.pairs, steps=options.steps, baseline=True, starve=STARVE)
            result |= {"start_up_s": round(seconds, 3), "revision": measured}
            path = options.output / f"{loader.mode}.{resample}.json"
            path.write_text(json.dumps(result, indent=2) + "\n")
            rates = ("samples_per_s", "decode_only", "baseline", "ratio_decode_only", "ratio_baseline")
            print(path.name, {name: result[name]["median"] for name in rates}, "waiting", result["waiting"])


if __name__ == "__main__":
    main()
