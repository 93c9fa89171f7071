"""benchmarks/waiting.py in small: it measures what it says, and keeps what it did not measure anew."""

import importlib
import json
import os
import subprocess
import sys
import time

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where a script finds what it shares with others
waiting = importlib.import_module("waiting")


def test_time_inside_and_outside_of_next_is_told_apart():
    def batches():
        for number in range(waiting.WARM_UP + 4):
            time.sleep(0.5 if number < waiting.WARM_UP else 0.02)
            yield number

    worked = []

    def work(batch):
        worked.append(batch)
        time.sleep(0.04)

    inside, outside = waiting.wait(batches(), 4, work)
    assert 0.08 <= inside < 0.4 and 0.16 <= outside < 0.5
    assert worked == list(range(waiting.WARM_UP + 4))


def test_the_benchmark_in_small(tmp_path):
    def run(*modes):
        small = ["--sizes", "32", "--windows", "2", "--steps", "2", "--images", "30"]
        command = [sys.executable, BENCHMARKS / "waiting.py", *small, "--modes", *modes, "--output", tmp_path]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "waiting.json").read_text())

    found = run("stream", "host")
    assert [(row["size"], row["mode"]) for row in found["rows"]] == [(32, "stream"), (32, "host")]
    assert found["device"] in ("cpu", "cuda") and found["machine"]["cores"] > 0 and "torch" in found["versions"]
    for row in found["rows"]:
        assert 0 < row["step_alone_s"]["median"] and 0 < row["step_s"]["p25"] <= row["step_s"]["p75"]
        assert 0 <= row["waiting"]["median"] < 1 and 0 <= row["waiting_played"]["median"] < 1
        assert row["batch_size"] == 8 and row["steps"] == 2
    again = run("host")
    assert again["rows"][0] == found["rows"][0] and again["rows"][1]["mode"] == "host"
