"""A process that trains for long does not grow."""

import json
import subprocess
import sys

import pytest

from nemo_dali.tiles.build import make_tiles

pytestmark = pytest.mark.slow

SIZE = 96
WARM_UP, EPOCHS = 6, 20
GROWTH = 0.01
# Trains on batches that may be kept; says how much memory the process has after each epoch.
TRAINING = """
import json, sys
from pathlib import Path
from nemo_dali import Loader, MosaicPolicy

files, options, epochs, keep = json.loads(sys.argv[1])
loader = Loader(*files, **options, batch_size=8, num_threads=2, policy=MosaicPolicy(p_mined=1.0, max_similarity=0.4))
kept, resident = [], []
for _ in range(epochs):
    for batch in loader:
        if keep:
            kept.append(batch.mask)  # looks into the block that holds the images too
    status = Path("/proc/self/status").read_text()
    resident.append(int(status.split("VmRSS:")[1].split()[0]) * 1024)
print(json.dumps(resident))
"""


def growth(files, *, keep=False, **options):
    """Of the resident memory over ``EPOCHS``, as a share, of a process of its own."""
    arguments = json.dumps(
        [[str(files.dataset), str(files.negatives)], options | {"size": SIZE}, WARM_UP + EPOCHS, keep]
    )
    run = subprocess.run([sys.executable, "-c", TRAINING, arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    resident = json.loads(run.stdout)
    return resident[-1] / resident[WARM_UP - 1] - 1


@pytest.fixture(scope="module")
def tiles(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "f.tiles.h5"
    make_tiles(files.dataset, size=SIZE, output=path, grids=(2,))
    return str(path)


def test_the_stream_does_not_grow(files):
    assert growth(files) < GROWTH


def test_resident_tiles_do_not_grow(files, tiles):
    assert growth(files, tiles=tiles) < GROWTH


def test_batches_that_are_kept_would_be_seen(files, tiles):
    assert growth(files, tiles=tiles, keep=True) > 3 * GROWTH
