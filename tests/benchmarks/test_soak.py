"""The soak in small, and that it would notice what it is there to notice."""

import importlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_dali.plan.planner import Planner
from tests.helpers.paths import ROOT
from tests.helpers.plans import make_part

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where a script finds what it shares with others
soak = importlib.import_module("soak")

PLANNER = Planner([make_part(refs=50, photos=40, depth=30)], soak.POLICY, seed=0, size=soak.SIZE)
BAD = np.arange(40) % 7 == 0


def epochs(count):
    """The log of an undisturbed run, RECORD [n]."""
    padded = -(-PLANNER.length // soak.GLOBAL_BATCH) * soak.GLOBAL_BATCH
    records = np.zeros((count, padded), soak.RECORD)
    for epoch in range(count):
        records[epoch]["epoch"] = epoch
        records[epoch]["row"] = PLANNER.substitute(epoch, PLANNER.plan(epoch, np.arange(padded)), BAD)[0]
    return records.ravel()


def test_a_whole_log_passes_in_whatever_pieces_it_comes():
    log, check = epochs(3), soak.Check(PLANNER, BAD)
    for piece in np.split(log, [16, 32, 80, 100]):
        check.look(piece)
    assert (check.records, check.epoch, check.position) == (192, 3, 0)
    assert check.replaced.targets > 0 and check.replaced.negatives > 0


def other_photo(log):
    log[70]["row"]["images"][0] += 1


def unmended(log):
    log["row"][64:128] = PLANNER.plan(1, np.arange(64))


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (lambda log: np.delete(log, slice(16, 32)), "does not go on at position 16"),
        (lambda log: np.concatenate([log[:32], log[16:]]), "does not go on at position 32"),
        (lambda log: np.delete(log, slice(64, 128)), "epoch 1 does not go on"),
        (other_photo, "the sample at position 6 of epoch 1 is another"),
        (unmended, r"the sample at position \d+ of epoch 1 is another"),
    ],
)
def test_what_is_lost_repeated_or_wrong_is_noticed(tamper, told):
    log = epochs(3)
    tampered = tamper(log)
    with pytest.raises(soak.Wrong, match=told):
        soak.Check(PLANNER, BAD).look(log if tampered is None else tampered)


def test_memory_that_grows_is_noticed():
    soak.check_memory([400, 500, 550, 560, *[600, 610] * 4, *[620, 605] * 3])
    soak.check_memory([100, 200, 300])  # too short to tell
    with pytest.raises(soak.Wrong, match="memory grew"):
        soak.check_memory([500 + 10 * epoch for epoch in range(18)])


@pytest.mark.parametrize("part", ["live", "look_at"])
def test_a_process_that_hangs_is_noticed(tmp_path, monkeypatch, part):
    always = SimpleNamespace(choice=lambda _: 1, randint=lambda *_: 1, random=lambda: 1.0)
    run = soak.Run(soak.Folder(tmp_path), soak.Check(PLANNER, BAD), always)
    monkeypatch.setattr(soak, "FIRST_BATCH", 0.3)
    for name in ("errors--train", "errors--watch"):
        (tmp_path / name).write_text("still compiling")
    with subprocess.Popen(["sleep", "60"]) as asleep:
        monkeypatch.setattr(run, "start", lambda *_: asleep)
        time.sleep(0.4)
        try:
            with pytest.raises(soak.Wrong, match=r"made no (batch|epoch) in 0 s: still compiling"):
                run.live() if part == "live" else run.look_at(asleep)
        finally:
            asleep.kill()


def test_a_short_soak_finds_nothing_wrong(tmp_path):
    result = tmp_path / "result.json"
    length = ["--minutes", "0.4", "--samples", "64", "--images", "60"]
    command = [sys.executable, BENCHMARKS / "soak.py", *length, "--json", result]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert sum(found["kills"].values()) >= 1 and found["samples"] >= 64 and found["compared"] > 0
    assert found["bad_photos"] == 5 and min(found["replaced"].values()) > 0
    assert found["memory_mib"]
