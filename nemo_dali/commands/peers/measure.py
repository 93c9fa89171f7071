"""One row in a process of its own: started, then checked and timed on request."""

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import permutations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.commands.peers.rows import BY_NAME
from nemo_dali.commands.peers.work import Row, Setting, Work
from nemo_dali.errors import NemoError

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
WARM_UP = 6  # batches at least, as in ``bench loader``
LEAST_SECONDS = 1.0  # that a timing takes
LEAST_IOU = 0.99  # of all masks of a batch together
EXACT = 1e-3  # levels of 255, from normalising and back
QUIET_S, LONGEST_WAIT_S = 0.2, 20.0  # until workers have filled what they may


@dataclass
class Timing:
    """One timing of a row."""

    samples_per_s: float
    cpu_s: float  # of all of its processes, per sample
    others: float  # cores that other processes kept busy meanwhile
    memory_mib: float  # PSS of all of its processes
    own_mib: float  # of that, what no file backs, so no libraries or mapped tiles
    taken: int  # batches since the start, including these


TIME, CHECK = "time", "check"  # what a row may be asked for


def serve(name: str, work: Work, setting: Setting, steps: int, end: Connection) -> None:
    """Start a row and check its first batch, then time it or check the next batch whenever it is asked to.

    Sends what it finds, and ends when nobody is left to ask.
    """
    batches: Any = iter(())
    taken = 1
    try:
        row = BY_NAME[name]
        for module in row.modules:
            import_module(module)
        started = time.perf_counter()
        batches = row.start(work, setting)
        first = next(batches)
        seconds = time.perf_counter() - started
        found: Any = (round(seconds, 3), check(row, work, *first))
        while True:
            settle()  # before another row is timed
            end.send(found)
            if end.recv() == TIME:
                found = timed(batches, work, steps, row.ahead(setting), setting.get("workers", 1))
                taken = found.taken = taken + found.taken
            else:
                found = check(row, work, *next(batches), step=taken % work.steps)
                taken += 1
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # nobody is left to ask
        pass
    except NemoError as error:
        end.send(error)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def timed(batches: Iterator[Any], work: Work, steps: int, ahead: int, workers: int) -> Timing:
    """Time at least ``steps`` batches, after as many as may have been made ahead."""
    warm_up = max(ahead, WARM_UP)  # so that no batch that was ready is counted
    for _ in range(warm_up):
        next(batches)
    busy, cpu, start, done = _busy(), tree_cpu(), time.perf_counter(), 0
    # Workers that start together end together, so whole rounds are timed.
    while done < steps or time.perf_counter() - start < LEAST_SECONDS or done % workers:
        next(batches)
        done += 1
    seconds, cpu, busy = time.perf_counter() - start, tree_cpu() - cpu, _busy() - busy
    samples = done * work.batch_size
    memory, own = tree_memory()
    return Timing(samples / seconds, cpu / samples, max(busy - cpu, 0) / seconds, memory, own, warm_up + done)


# --- what a sample must be -------------------------------------------------------------------------------------------


def check(row: Row, work: Work, image: Any, mask: Any, *, step: int = 0) -> dict[str, Any]:
    """Compare a row's batch with the Loader's of the same step.

    Returns:
        ``difference``, the mean absolute difference of the images in levels of 255, and ``worst``, that of the worst
        cell, with what is ``allowed`` and ``worst_allowed``; ``iou``, of all masks together.

    Raises:
        NemoError: they are not the same samples, so their speeds cannot be compared.
    """
    import torch

    frame = (work.batch_size, 3, work.size, work.size)
    wanted = torch.uint8 if work.dtype == "uint8" else torch.float32
    if tuple(image.shape) != frame or image.dtype != wanted or not image.is_contiguous():
        raise NemoError(f"{row.label} gives images of {image.dtype} {tuple(image.shape)}, not {wanted} {frame}.")
    levels, masks = _levels(work, image), mask.numpy()
    files = [work.expected(resample, step) for resample in (row.image, row.mask)]
    expected = np.load(files[0])["image"], np.load(files[1])["mask"]
    if not row.is_placed:
        levels, masks = _placed(work, levels, masks, *expected)
    far = np.abs(levels - expected[0])
    difference = float(far.mean())
    worst = max(float(far[:, :, *work.place(cell)].mean((1, 2, 3)).max()) for cell in range(4))
    both, either = (int(join(masks > 0, expected[1] > 0).sum()) for join in (np.logical_and, np.logical_or))
    iou = both / max(either, 1)
    within = difference <= row.tolerance + EXACT and worst <= row.worst + EXACT
    if not within or iou < LEAST_IOU or masks.max() > 1:
        raise NemoError(
            f"{row.label} makes different samples than the Loader in batch {step}: images differ by {difference:.2f} "
            f"levels of 255, the worst cell by {worst:.2f}, {row.tolerance} and {row.worst} allowed; the IoU of masks "
            f"is {iou:.3f}."
        )
    found = {"difference": round(difference, 4), "allowed": row.tolerance}
    return found | {"worst": round(worst, 4), "worst_allowed": row.worst, "iou": round(iou, 4)}


def save_expected(work: Work, steps: Collection[int] = (0,)) -> None:
    """Save the Loader's batches of some steps with either resampling, for ``check``."""
    for resample in sorted({row.image for row in BY_NAME.values()} | {row.mask for row in BY_NAME.values()}):
        loader = work.loader(resample)
        for step in steps:
            loader.load_state_dict(loader.state_dict() | {"epoch": 0, "samples_seen": step * work.batch_size})
            batch = next(iter(loader))
            levels, masks = _levels(work, batch.image), batch.mask.numpy()
            np.savez(work.expected(resample, step), image=levels, mask=masks)
        loader.close()


def _levels(work: Work, image: Any) -> npt.NDArray[np.float32]:
    """Images [B, 3, S, S] as levels of 255."""
    pixels: npt.NDArray[np.float32] = image.numpy().astype(np.float32)
    if work.dtype != "uint8":
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (work.mean, work.std))
        pixels = 255 * (pixels * std + mean)
    return pixels


def _placed(work: Work, levels: Any, masks: Any, image: Any, mask: Any) -> tuple[Any, Any]:
    """Samples with their cells in the order that is nearest to the expected images."""
    levels, masks = levels.copy(), masks.copy()
    places = [work.place(cell) for cell in range(4)]
    for sample in range(len(levels)):
        made = [(levels[sample][:, *place].copy(), masks[sample][place].copy()) for place in places]
        far = np.array([[np.abs(one - image[sample][:, *place]).mean() for place in places] for one, _ in made])
        best = min(permutations(range(4)), key=lambda order: sum(far[one, place] for place, one in enumerate(order)))
        for place, one in zip(places, best, strict=True):
            levels[sample][:, *place], masks[sample][place] = made[one]
    return levels, masks


# --- this process and those that it started --------------------------------------------------------------------------


def tree() -> list[int]:
    """This process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def _stat(process: int) -> list[str]:
    """Fields of a process from its state on; none once it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree_cpu() -> float:
    """CPU seconds that the processes have used."""
    return TICK_S * sum(int(fields[11]) + int(fields[12]) for process in tree() if (fields := _stat(process)))


def tree_memory() -> tuple[float, float]:
    """MiB of the processes together: PSS, where what they share counts once; and of that, what no file backs."""
    total = own = 0
    for process in tree():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # gone
            continue
        kib = {fields[0]: int(fields[1]) for line in lines if len(fields := line.split()) == 3}
        total += kib["Pss:"]
        own += kib.get("Pss_Anon:", 0) + kib.get("Pss_Shmem:", 0)
    return round(total / 1024, 1), round(own / 1024, 1)


def _busy() -> float:
    """CPU seconds that all processes of the machine have used."""
    user, nice, system, _, _, irq, softirq, *_ = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return TICK_S * sum(map(int, (user, nice, system, irq, softirq)))


def settle() -> None:
    """Wait until workers have made all that they may make ahead."""
    until = time.monotonic() + LONGEST_WAIT_S
    used = _but_this_thread()
    while time.monotonic() < until:
        time.sleep(QUIET_S)
        before, used = used, _but_this_thread()
        if used - before <= 1.5 * TICK_S:  # one tick: the clock's resolution
            return


def _but_this_thread() -> float:
    """CPU seconds of the processes without what it takes to read them."""
    return tree_cpu() - time.thread_time()
