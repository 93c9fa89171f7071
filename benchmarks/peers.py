"""The Loader beside what others would use for the same mosaics: DataLoaders, SPDL and DALI's own operators.

    python benchmarks/peers.py                              generated photos; ten minutes on two cores
    python benchmarks/peers.py F.ris.h5 F.neg.h5            your own
    python benchmarks/peers.py --quick                      in short, as `make bench` runs it

Writes peers.json and, from that alone, docs/peers.svg (plots.py), the tables in docs/peers.md and a line of
README.md (peers_tables.py), if all rows ran. `--quick`, `--output` and `--plot` leave the pages alone. What a row is,
and what it cannot do, is in docs/peers.md.
"""

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nemo_dali.commands.peers.rows import PEERS, ROWS
from nemo_dali.io.threads import thread_count

PHOTOS = 400


def _generated(folder: Path, images: int) -> tuple[Path, Path]:
    from common import generate

    return generate(folder, images=images)


def main() -> None:
    """Run the benchmark as the command line says."""
    # Imported here, because the processes that are measured import this file.
    from nemo_dali.commands.peers.comparison import compare, lines_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("negatives", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="two pairs, one setting each, fewer photos")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--dtype", choices=["float32", "uint8"], default="float32")
    parser.add_argument("--pairs", type=int, help="how many times each is timed; 5, or 2 in short")
    parser.add_argument("--steps", type=int, help="batches that a timing takes at least; 10, or 8 in short")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--output", type=Path, help="folder of the JSON")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.dataset is not None and options.negatives is None:
        parser.error("a data set needs its negative table")
    quick = options.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = (options.dataset, options.negatives)
        if options.dataset is None:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its libraries end with it
                files = pool.submit(_generated, folder, PHOTOS // 10 if quick else PHOTOS).result()
        result = compare(
            dict(zip(("dataset", "negatives"), files, strict=True)),
            folder,
            batch_size=options.batch_size,
            size=options.size,
            dtype=options.dtype,
            cores=thread_count(),
            peers=options.peers,
            pairs=options.pairs or (2 if quick else 5),
            steps=options.steps or (8 if quick else 10),
            tries=1 if quick else 2,
        )
    from common import RESULTS, ROOT, revision

    result["config"]["generated"] = options.dataset is None
    result["revision"] = revision()  # before the results change the tree
    print(*lines_of(result), sep="\n")
    is_recorded = not quick and {row["name"] for row in result["rows"]} == {row.name for row in ROWS}
    output = options.output or (RESULTS if is_recorded else None)
    plot = options.plot or (ROOT / "docs" / "peers.svg" if is_recorded and not options.output else None)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / "peers.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(path)
    if is_recorded and not (options.output or options.plot):
        from peers_tables import write_tables

        write_tables(result)
    if plot is not None:
        from plots import plot_peers

        plot_peers(result, plot)
        print(plot)


if __name__ == "__main__":
    main()
