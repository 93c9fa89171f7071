"""Generated data for ``gpu_check.py``: a data set with a table of random similarities, and its tiles.

python benchmarks/gpu_data.py FOLDER [--images 200]
"""

import argparse
from pathlib import Path

from common import generate

from nemo_dali.tiles.build import make_tiles

SIZE, GRID = 480, 2


def main() -> None:
    """Write data.ris.h5, data.neg.h5 and data.tiles.h5, the last one with the GPU's decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    dataset, _ = generate(options.folder, images=options.images)
    tiles = options.folder / "data.tiles.h5"
    make_tiles(dataset, size=SIZE, output=tiles, grids=(GRID,), device="cuda")
    print(tiles)


if __name__ == "__main__":
    main()
