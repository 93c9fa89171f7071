"""examples/train_ddp.py: killed in the middle of an epoch, gone on with by fewer ranks, and none the worse for it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.files import make_files
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.process, pytest.mark.slow]

SCRIPT = ROOT / "examples/train_ddp.py"
REFS, GLOBAL_BATCH, EPOCHS = 404, 8, 2
STEPS = REFS // GLOBAL_BATCH  # of an epoch; 4 refs are left out
OPTIONS = {"epochs": EPOCHS, "global-batch": GLOBAL_BATCH, "size": 32, "max-similarity": 0.4, "save-every": 7}


def arguments(files, out):
    options = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    return [str(files.dataset), str(files.negatives), "--out", str(out), *options]


def start(files, out, ranks):
    """The example under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*command, str(SCRIPT), *arguments(files, out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_here(files, out, *more):
    """The example by this process alone."""
    spec = importlib.util.spec_from_file_location("train_ddp", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only suffers from more
    try:
        example.main([*arguments(files, out), *more])
    finally:
        torch.set_num_threads(threads)


def seen(out, begin, ranks):
    """Epoch, positions and refs of the global step by step number, of the run that began behind ``begin``."""
    lines = [(out / f"seen-from-{begin}-rank-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    found = {}
    for parts in zip(*lines, strict=False):  # a killed rank may be a line short
        parts = [json.loads(part) for part in parts]
        assert len({(part["step"], part["epoch"]) for part in parts}) == 1
        joined = [[one for part in parts for one in part[name]] for name in ("positions", "refs")]
        found[parts[0]["step"]] = (parts[0]["epoch"], *joined)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("ddp"), photos=101, refs_per_photo=4)


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
    """What one process saw, and its last checkpoint."""
    out = tmp_path_factory.mktemp("uninterrupted")
    run_here(files, out)
    return seen(out, 0, 1), torch.load(out / "checkpoint.pt", weights_only=True)


def test_the_uninterrupted_run_shows_every_epoch_in_order(uninterrupted):
    steps, last = uninterrupted
    assert list(steps) == list(range(1, EPOCHS * STEPS + 1))
    for epoch in range(EPOCHS):
        shown = [position for number, positions, _ in steps.values() if number == epoch for position in positions]
        assert shown == list(range(STEPS * GLOBAL_BATCH))
    assert (last["loader"]["epoch"], last["step"]) == (EPOCHS - 1, EPOCHS * STEPS)


def test_killed_in_mid_epoch_and_resumed_by_one_rank(files, uninterrupted, tmp_path):
    job = start(files, tmp_path, 2)
    try:
        log = tmp_path / "seen-from-0-rank-1.jsonl"
        while job.poll() is None and not (
            log.exists() and log.read_text().count("\n") >= 2 * OPTIONS["save-every"] + 3
        ):
            time.sleep(0.01)
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(workers) == 2, job.communicate()[0]
        os.kill(int(workers[1]), signal.SIGKILL)
        said = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode == 1 and "Signal 9" in said, said  # torchrun ends the other rank too

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    begin = saved["step"]
    first = seen(tmp_path, 0, 2)
    assert begin >= 14 and begin % STEPS and max(first) < EPOCHS * STEPS  # in the middle of an epoch, and of the run
    assert saved["loader"]["samples_seen"] == begin % STEPS * GLOBAL_BATCH

    run_here(files, tmp_path, "--resume")
    second = seen(tmp_path, begin, 1)
    assert min(second) == begin + 1
    steps, last = uninterrupted
    assert {step: first[step] for step in range(1, begin + 1)} | second == steps
    assert all(first[step] == steps[step] for step in first)  # those that were lost too

    ended = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert ended["loader"] == last["loader"] and ended["step"] == last["step"]
    for name, weight in last["model"].items():
        torch.testing.assert_close(ended["model"][name], weight, rtol=1e-3, atol=1e-4)
        assert (saved["model"][name] - weight).abs().max() > 1e-3  # it has learned since
