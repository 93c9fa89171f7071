"""Loaders in processes and threads of their own that are interrupted, killed, or end by themselves, in mid-pass."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_dali.errors import FileFormatError
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.tiles.build import make_tiles
from tests.helpers import fork_server
from tests.helpers.lanes import lanes
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.process

OPTIONS = {"batch_size": 4, "size": 64, "dtype": "uint8", "context_length": 16}


def make(files, **options):
    policy = MosaicPolicy(p_mined=0.7, max_similarity=0.4)
    return Loader(files.dataset, files.negatives, **{"policy": policy, **OPTIONS, **options})


def same(batch, other):
    return np.array_equal(batch.plan, other.plan) and torch.equal(batch.image, other.image)


# --- processes -------------------------------------------------------------------------------------------------------

PREPARE = """
import itertools, os, signal, sys, threading, time
from nemo_dali import Loader, MosaicPolicy

def make(**options):
    policy = MosaicPolicy(p_mined=0.7, max_similarity=0.4)
    return Loader({dataset!r}, {negatives!r}, batch_size=4, size=64, prefetch=3, policy=policy, **options)

def for_ever(loader):
    while True:
        yield from loader
"""
TRAIN = """
for step, batch in enumerate(for_ever(make({options}))):
    if step == 20:
        print(os.getpid(), flush=True)
"""
RANKS = """
import torch.multiprocessing

def train(rank):
    for step, batch in enumerate(for_ever(make(rank=rank, world_size=2))):
        if step == 10:
            os.write(1, b"%d\\n" % os.getpid())  # at once: both ranks share the pipe

if __name__ == "__main__":
    torch.multiprocessing.start_processes(train, nprocs=2, start_method="spawn")
"""


@pytest.fixture
def start(files, tmp_path):
    """Starts a program in an empty folder that is its home and its place for temporary files."""
    started = []

    def start(code, *, spawns=False):
        code = PREPARE.format(dataset=str(files.dataset), negatives=str(files.negatives)) + code
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        environment = os.environ | {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT)}
        if spawns:  # what spawn starts reads the program's file
            (tmp_path / "train.py").write_text(code)
            command, pipe = [sys.executable, tmp_path / "train.py"], subprocess.PIPE
            process = subprocess.Popen(command, cwd=home, env=environment, stdout=pipe, stderr=pipe, text=True)
        else:
            process = fork_server.start(code, cwd=home, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        if process.returncode is None:
            process.communicate()
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not list(Path(os.environ["NEMO_DALI_CACHE"]).rglob("*.partial"))


def children(pid):
    """Processes started by any thread of a process."""
    lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [int(child) for one in lists for child in one.split()]


def shared_memory(pid):
    """What a process maps or holds open of POSIX or System V shared memory."""
    opened = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    lines = [*Path(f"/proc/{pid}/maps").read_text().splitlines(), *opened]
    return [line for line in lines if re.search("/dev/shm|/SYSV|/memfd", line)]


def gone(pid):
    """Whether a process has ended; a zombie that nobody waits for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(*pids):
    for _ in range(600):
        if all(map(gone, pids)):
            return
        signal.sigtimedwait([], 0.05)
    pytest.fail(f"still running: {[pid for pid in pids if not gone(pid)]}")


@pytest.fixture(scope="module")
def tiles(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "data.tiles.h5"
    make_tiles(files.dataset, size=64, output=path)
    return path


@pytest.mark.parametrize(
    ("sent", "mode"),
    [(signal.SIGINT, "stream"), (signal.SIGINT, "host"), (signal.SIGTERM, "host"), (signal.SIGKILL, "stream")],
)
def test_a_signal_in_mid_pass_ends_the_process_and_leaves_nothing(start, tiles, sent, mode):
    process = start(TRAIN.format(options=f"tiles={str(tiles)!r}" if mode == "host" else ""))
    pid = int(process.stdout.readline())
    assert children(pid) == []
    assert shared_memory(pid) == []  # so none can run out, and none can be left
    process.send_signal(sent)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == -sent
    if sent == signal.SIGINT:
        assert errors.startswith("Traceback") and errors.endswith("\nKeyboardInterrupt\n")
        assert errors.count("Traceback") == 1 and "ignored" not in errors
    else:
        assert errors == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "parent"])
def test_a_killed_rank_or_parent_takes_the_others_along(start, victim):
    """torch.multiprocessing sees to that: a parent ends the others, and ranks are told of their parent's death."""
    process = start(RANKS, spawns=True)
    ranks = [int(process.stdout.readline()) for _ in range(2)]
    everybody = {process.pid, *children(process.pid), *(child for rank in ranks for child in children(rank))}
    assert everybody >= {process.pid, *ranks}
    os.kill(ranks[0] if victim == "rank" else process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == (1 if victim == "rank" else -signal.SIGKILL)
    assert ("SIGKILL" in errors) == (victim == "rank")
    wait_until_gone(*everybody)


ENDINGS = {
    "a daemon thread in mid-pass": """
loader, ready = make(), threading.Event()
def train():
    for batch in for_ever(loader):
        ready.set()
threading.Thread(target=train, daemon=True).start()
ready.wait()
""",
    "loaders of a thread that has ended, and in a cycle, and a thread that goes on": """
kept, begun = [], threading.Event()
def begin():
    kept.append(iter(make()))
    next(kept[0])
def train():
    for batch in make():
        begun.set()
class Trainer: pass
trainer = Trainer()
trainer.me, trainer.batches = trainer, iter(make())
next(trainer.batches)
thread = threading.Thread(target=begin)
thread.start()
thread.join()
threading.Thread(target=train).start()
begun.wait()
""",
    "sys.exit": """
for batch in make():
    sys.exit(3)
""",
    "an exception": """
for batch in make():
    raise KeyError("the training's own")
""",
    "an exception in a thread": """
def train():
    for batch in make():
        raise KeyError("the training's own")
threading.Thread(target=train).start()
""",
}


@pytest.mark.parametrize("ending", lanes(ENDINGS, fast=["a daemon thread in mid-pass", "sys.exit"]))
def test_the_interpreter_ends_with_batches_in_flight(start, ending):
    process = start(ENDINGS[ending])
    _, errors = process.communicate(timeout=60)
    if "terminate called" in errors:  # once in some hundred times CPython ends a daemon thread inside a C++ function
        process = start(ENDINGS[ending])
        _, errors = process.communicate(timeout=60)
    assert process.returncode == {"sys.exit": 3, "an exception": 1}.get(ending, 0), errors
    if "exception" in ending:
        assert errors.count("Traceback") == 1 and errors.endswith('KeyError: "the training\'s own"\n')
    else:
        assert errors == ""


# --- within a process ------------------------------------------------------------------------------------------------


def test_loaders_in_threads_do_not_disturb_each_other(files, tiles):
    options = [{"seed": 1}, {"seed": 2, "prefetch": 3}, {"seed": 3, "tiles": tiles}]
    expected = [[batch for _ in range(3) for batch in loader] for loader in (make(files, **o) for o in options)]
    found = [[] for _ in options]

    def train(index):
        loader = make(files, **options[index])
        for _ in range(3):
            found[index].extend(loader)

    threads = [threading.Thread(target=train, args=(index,)) for index in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batches, others in zip(found, expected, strict=True):
        assert len(batches) == len(others) == 36
        assert all(map(same, batches, others))


def test_loaders_in_turn_do_not_disturb_each_other(files, tiles):
    loaders = [make(files, seed=1), make(files, seed=2), make(files, seed=1, tiles=tiles)]
    expected = [list(make(files, seed=seed)) for seed in (1, 2, 1)]
    for batches in zip(*loaders, *expected, strict=True):
        assert all(map(same, batches[:3], batches[3:]))


def test_a_loader_may_be_used_in_another_thread_than_it_was_made_in(files):
    loader, passed = make(files), []
    first = next(iter(loader))
    thread = threading.Thread(target=lambda: passed.extend(loader))
    thread.start()
    thread.join()
    expected = list(make(files))
    assert same(first, expected[0]) and all(map(same, passed, expected))


def resources():
    """Threads, descriptors and mappings of files of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), maps.count(".h5")


@pytest.mark.parametrize("mode", ["stream", "host"])
@pytest.mark.parametrize(
    "end", lanes(["close", "del in mid-pass", "a full pass", "never iterated"], fast=["del in mid-pass"])
)
def test_loaders_that_are_gone_leave_neither_threads_nor_files(files, tiles, mode, end):
    def use():
        loader = make(files, num_threads=3, tiles=tiles if mode == "host" else None)
        if end == "never iterated":
            return
        passes = iter(loader)
        next(passes)
        if end == "close":
            loader.close()
        elif end == "a full pass":
            assert len(list(passes)) == 11

    use()  # what a process makes once
    before = resources()
    for _ in range(8):
        use()
    assert resources() == before


# --- files under a running loader ------------------------------------------------------------------------------------


def own_files(files, tiles, folder):
    """The same files, to be changed."""
    own = files._replace(dataset=folder / "own.ris.h5", negatives=folder / "own.neg.h5")
    own.dataset.write_bytes(files.dataset.read_bytes())
    own.negatives.write_bytes(files.negatives.read_bytes())
    (folder / "own.tiles.h5").write_bytes(tiles.read_bytes())
    return own, folder / "own.tiles.h5"


@pytest.mark.parametrize("mode", ["stream", "host"])
def test_files_replaced_by_renaming_change_nothing(files, tiles, tmp_path, mode):
    own, own_tiles = own_files(files, tiles, tmp_path)
    expected = list(make(files))
    loader = make(own, tiles=own_tiles if mode == "host" else None)
    state = loader.state_dict()
    passes = iter(loader)
    batches = [next(passes)]
    for path in (own.dataset, own.negatives, own_tiles):
        other = tmp_path / "other"
        other.write_bytes(b"another file, and a shorter one")
        other.rename(path)
    batches += passes
    assert len(batches) == len(expected) and all(map(same, batches, expected))
    for batch, other in zip(batches, expected, strict=True):  # texts are read only now
        assert (batch.sentences, batch.ref_ids) == (other.sentences, other.ref_ids)
    assert loader.state_dict()["fingerprints"] == state["fingerprints"]


@pytest.mark.parametrize("victim", ["own.ris.h5", "own.neg.h5", "own.tiles.h5"])
def test_a_file_cut_short_under_a_loader_is_told_before_it_is_read(files, tiles, tmp_path, victim):
    """By one byte: more would let the test race against the batches in flight, which SIGBUS might end."""
    own, own_tiles = own_files(files, tiles, tmp_path)
    loader = make(own, tiles=own_tiles)
    passes = iter(loader)
    next(passes)
    length = (tmp_path / victim).stat().st_size
    os.truncate(tmp_path / victim, length - 1)
    with pytest.raises(
        FileFormatError, match=f"{victim} was truncated while it was in use, from {length} to {length - 1}"
    ):
        next(passes)
