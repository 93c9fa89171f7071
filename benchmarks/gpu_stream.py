"""The stream loader on a GPU beside decode-only DALI, what a batch costs the host, and how nvJPEG's pixels differ.

    python benchmarks/gpu_stream.py [--quick]                    generated photos
    python benchmarks/gpu_stream.py F.ris.h5 F.neg.h5            your own

It writes gpu_stream.<device>.json. Samples per second are for 2x2 mosaics in float16, and in ``single`` for single
photos; each is timed in turn with the same graph without the Python function, fed with the same photos and consumed on
the same stream. The ratio of each pair is what counts.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, described, generate, require_gpu, revision, save
from stream_measures import compare, decode_difference, host_costs, memory_peak, next_while_busy

from nemo_dali.errors import NemoError
from nemo_dali.io.threads import thread_count
from nemo_dali.loader.loader import Loader
from nemo_dali.pipeline.gpu import hardware_share
from nemo_dali.pipeline.paths import encode_path
from nemo_dali.plan.policy import MosaicPolicy

POLICIES = {"2x2": MosaicPolicy(p_mined=1.0), "single": MosaicPolicy(p_mined=0.0)}
LOADS = (0.0, 0.65, 1.0)  # of the hardware decoder, in addition to the chosen one; 0.65 is DALI's default


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("negatives", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-threads", type=int, default=thread_count())
    parser.add_argument("--quick", action="store_true", help="60 photos, batches of 8, one pair of two steps, no sweep")
    parser.add_argument(
        "--no-sweep", dest="sweep", action="store_false", help="one number of threads, one share of JPEGs"
    )
    parser.add_argument("--revision", help="where there is no git repository to ask")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.dataset is not None and options.negatives is None:
        parser.error("a data set needs its negative table")
    for name in ("pairs", "steps", "batch_size", "num_threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be >= 1")
    if options.quick:
        options.pairs, options.steps, options.batch_size = 1, 2, 8
    device = require_gpu()
    measured = options.revision or revision()
    with tempfile.TemporaryDirectory() as folder:
        files = (options.dataset, options.negatives)
        if options.dataset is None:
            files = generate(Path(folder), images=60 if options.quick else 400)
        try:
            result = measure(files, options, device)
        except NemoError as error:
            sys.exit(str(error))
    medians = {name: result[name]["median"] for name in ("samples_per_s", "decode_only", "ratio_decode_only")}
    print(medians, save(described(device, measured) | result, "gpu_stream", options.output))


def measure(files: tuple[Path, Path], options: argparse.Namespace, device: int) -> dict[str, Any]:
    """Everything that is written, except where it was measured. Times are in microseconds."""
    chosen = round(hardware_share(options.num_threads), 4)
    sizes = {"pairs": options.pairs, "steps": options.steps}

    def loader(policy: str, *, num_threads: int = options.num_threads, load: float = chosen) -> Loader:
        return Loader(
            *files,
            batch_size=options.batch_size,
            policy=POLICIES[policy],
            device="cuda",
            dtype="float16",
            num_threads=num_threads,
            hw_decoder_load=load,
        )

    memory = memory_peak(loader("2x2"), options.steps, device)
    rates = {policy: compare(loader(policy), chosen, device, **sizes) for policy in POLICIES}
    costs = host_costs(lambda: loader("2x2"), options.steps)
    busy = next_while_busy(loader("2x2"), device)
    corpus = loader("single").corpus
    photos = [encode_path(corpus.photo_path(row)) for row in range(min(len(corpus.photo_width), 200))]
    differences = {load: decode_difference(photos, options.num_threads, load, device) for load in (0.0, chosen, 1.0)}
    by_hardware = decode_difference(photos, options.num_threads, 1.0, device, beside=0.0)
    sweep = []
    if options.sweep and not options.quick:
        for threads in sorted({max(options.num_threads // part, 1) for part in (4, 2, 1)}):
            for load in sorted({*LOADS, round(hardware_share(threads), 4)}):
                one = compare(loader("2x2", num_threads=threads, load=load), load, device, pairs=1, steps=10)
                rate, decoded = (one[name]["median"] for name in ("samples_per_s", "decode_only"))
                point = {"num_threads": threads, "hw_decoder_load": load, "samples_per_s": rate, "decode_only": decoded}
                sweep.append(point)
                print(point, flush=True)
    return {
        "mode": "stream",
        **rates["2x2"],
        "single": rates["single"],
        "host_microseconds": costs,
        "next_while_busy": busy,
        "memory_mib": memory,
        "decode_difference": [{"hw_decoder_load": load, **found} for load, found in differences.items()],
        "hardware_difference": by_hardware,
        "sweep": sweep,
        "config": {
            "batch_size": options.batch_size,
            "size": 480,
            "dtype": "float16",
            "resample": "cv2-linear",
            "num_threads": options.num_threads,
            "hw_decoder_load": chosen,
            **sizes,
            "datasets": [dataset.name for dataset in corpus.datasets],
            "photos": len(corpus.photo_width),
            "megapixels_a_photo": round(float((corpus.photo_width * 1e-6 * corpus.photo_height).mean()), 3),
        },
    }


if __name__ == "__main__":
    main()
