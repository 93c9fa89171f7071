"""What a batch costs the host: how turns add up, and one small turn of each mode in a process of its own."""

import importlib
import json
import subprocess
import sys

import pytest

from nemo_dali.tiles import make_tiles
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where a script finds what it shares with others
host_cost = importlib.import_module("host_cost")

SMALL = """
import json, sys
from pathlib import Path
import host_cost
host_cost.SIZE, host_cost.BATCH, host_cost.ROUNDS, host_cost.STEPS = 40, 4, 1, {"device": 8, "stream": 8}
print(json.dumps(host_cost.measure(Path(sys.argv[1]), sys.argv[2])))
"""


def test_turns_are_compared_in_pairs():
    turns = {
        "old": [{"training": 90.0, "dali": 10.0}, {"training": 180.0, "dali": 20.0}, {"training": 100.0, "dali": 0.0}],
        "new": [{"training": 30.0, "dali": 0.0}, {"training": 80.0, "dali": 0.0}, {"training": 20.0, "dali": 0.0}],
    }
    found = host_cost.summary(turns)
    assert found["old"] == {"training": 100, "dali": 10, "both": 100}
    assert found["new"] == {"training": 30, "dali": 0, "both": 30}
    assert found["ratio_of_both"] == {"median": 0.3, "min": 0.2, "max": 0.4}
    assert "ratio_of_both" not in host_cost.summary({"new": turns["new"]})


@pytest.mark.process
@pytest.mark.parametrize("mode", host_cost.MODES)
def test_a_turn_tells_the_threads_apart(files, tmp_path, mode):
    make_tiles(files.dataset, size=40, grids=(2,), output=tmp_path / "large.tiles.h5")
    (tmp_path / "large.ris.h5").symlink_to(files.dataset)
    (tmp_path / "large.neg.h5").symlink_to(files.negatives)
    command = [sys.executable, "-c", SMALL, tmp_path, mode]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert set(taken) == {"training", "dali", "planning", "others"}
    assert taken["training"] > 0 and min(taken.values()) >= 0
    assert mode == "device" or taken["dali"] > 0
