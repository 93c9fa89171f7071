"""The stream loader beside decode-only DALI, for both resamplings; results go to benchmarks/results/.

    python benchmarks/stream.py                              generated photos of about 640x480
    python benchmarks/stream.py F.ris.h5 F.neg.h5            one's own

Prints the medians and writes stream.<resample>.json. The ratio counts; samples per second depend on the machine's day.
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import RESULTS, generate, revision

from nemo_dali.bench import bench_loader
from nemo_dali.loader import Loader
from nemo_dali.policy import MosaicPolicy


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("negatives", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.dataset is not None and options.negatives is None:
        parser.error("a data set needs its negative table")
    measured = revision()  # before the results change the tree
    with tempfile.TemporaryDirectory() as folder:
        files = (options.dataset, options.negatives) if options.dataset else generate(Path(folder))
        for resample in ("cv2-linear", "pillow-bilinear"):
            loader = Loader(
                *files,
                batch_size=options.batch_size,
                policy=MosaicPolicy(p_mined=1.0),
                num_threads=2,
                resample=resample,
            )
            result = bench_loader(loader, pairs=options.pairs, steps=options.steps)
            result["revision"] = measured
            options.output.mkdir(parents=True, exist_ok=True)
            path = options.output / f"stream.{resample}.json"
            path.write_text(json.dumps(result, indent=2) + "\n")
            medians = {name: result[name]["median"] for name in ("samples_per_s", "decode_only", "ratio_decode_only")}
            print(resample, medians, path)


if __name__ == "__main__":
    main()
