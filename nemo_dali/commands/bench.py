"""``nemo-dali bench loader``: samples per second of the Loader, beside a DALI pipeline that only reads and decodes.

A PyTorch DataLoader can run beside both. All show the photos of the same plan with the same number of threads, in turn,
several times: on a machine whose speed drifts only the ratio within a pair means something.
"""

import ctypes
import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import integer
from nemo_dali.commands.doctor.driver import read_driver
from nemo_dali.commands.torch_baseline import IN_FLIGHT, check_equal, dataloader
from nemo_dali.data.s3 import is_remote
from nemo_dali.errors import NemoError
from nemo_dali.io.progress import progress
from nemo_dali.io.terminal import say
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.table import NegativeTable
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.buffer_pool import BufferPool
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.pipeline.graphs import StreamPipeline
from nemo_dali.pipeline.graphs_gpu import CudaStreamPipeline
from nemo_dali.pipeline.overlap import Fed, in_flight
from nemo_dali.pipeline.paths import encode_path
from nemo_dali.plan.policy import MosaicPolicy, read_policy, warn_if_tuned_elsewhere

PACKAGES = (
    "nemo-dali",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "torch",
    "numba",
    "numba-cuda",
    "numpy",
    "h5py",
    "pillow",
)

RESULT = "a result of 'nemo-dali bench loader'"
MOST_TIMED = 10_000
LEAST_SECONDS = 1.0  # that a timing takes
NOTHING = SimpleNamespace(status=np.empty(0, np.uint8))  # the work of a batch that is only decoded
WARM_UP = 6  # batches until every block of frames and every buffer of DALI has been touched once


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> "Spread":
        """The spread of one-dimensional measurements."""
        return cls(*(round(float(q), 4) for q in np.quantile(np.asarray(values), (0.5, 0.25, 0.75))))


def is_result(head: bytes) -> bool:
    """Whether a file that begins like this is a result of ``bench_loader``, as JSON."""
    return re.match(rb'\{\s*"mode": "\w+",\s*"device": "[\w:]+",\s*"samples_per_s": ', head) is not None


def timed_policy(path: Path, table: Path) -> MosaicPolicy:
    """A policy file's policy as it is timed: the same in all epochs, so that timings of several can be compared.

    One that changes with the epoch is timed as it is in the epoch with the most mosaics, and a line says so.
    """
    policy, tuned_for = read_policy(path)
    warn_if_tuned_elsewhere(path, tuned_for, [NegativeTable.open(table).fingerprint])
    if policy.breakpoints == [0]:
        return policy

    def mosaics(epoch: int) -> tuple[float, float]:
        now = policy.difficulty(epoch)
        return now.p_mined + now.p_random, now.p_mined

    epoch = max(policy.turns, key=mosaics)
    say(f"The policy changes with the epoch. It is timed as it is in epoch {epoch}, which has the most mosaics.")
    return policy.at(epoch)


def timed_start(make: Callable[[], Loader]) -> tuple[Loader, float]:
    """Make a loader and wait for its first batch; return the loader, and the seconds that took without imports."""
    import nvidia.dali.plugin.numba  # noqa: F401  # imported here so as not to be timed
    import torch  # noqa: F401  # likewise

    start = time.perf_counter()
    loader = make()
    next(iter(loader))
    return loader, time.perf_counter() - start


def bench_loader(
    loader: Loader, *, pairs: int = 7, steps: int = 20, baseline: bool = False, starve: float | None = None
) -> dict[str, Any]:
    """Time a loader against decode-only DALI and, if wanted, a PyTorch DataLoader, in turn.

    Args:
        pairs: how many times each is timed, 1 to ``MOST_TIMED``.
        steps: batches per timing, also 1 to ``MOST_TIMED``, after ``WARM_UP`` that are not counted; more where they
            take less than ``LEAST_SECONDS``. They continue into later epochs.
        baseline: time ``torch_baseline.dataloader`` too, exactly ``steps`` batches at a time, after a check that its
            batches are the loader's.
        starve: milliseconds of a training step, simulated by sleeping; the share of the time that such a training
            waits for batches is reported.

    Returns:
        JSON-able: ``samples_per_s``, ``decode_only`` and ``baseline`` as ``{median, p25, p75}``, ``ratio_decode_only``
        and ``ratio_baseline`` likewise (the ratio of each pair), with mode "host" also ``memset`` and ``ratio_memset``:
        filling the same memory with as many threads; ``waiting`` (the share, 0 to 1), ``config``,
        ``device``, ``peak_memory_mib``, ``machine``, ``versions``. What was not asked for is None.

    Raises:
        NemoError: the baseline's batches are not the loader's, or its photos are not local.
    """
    pairs = integer("pairs", pairs, least=1, most=MOST_TIMED)
    steps = integer("steps", steps, least=1, most=MOST_TIMED)
    if starve is not None and not 0 < starve < math.inf:
        raise ValueError(f"starve ({starve}) must be a number of milliseconds > 0")
    if baseline and any(is_remote(dataset.image_root) for dataset in loader.corpus.datasets):
        raise NemoError("The baseline reads local photos. Say where they are with --images, or leave --baseline out.")
    timings: dict[str, list[float]] = {"samples_per_s": [], "decode_only": [], "baseline": [], "memset": []}
    memory: dict[str, float] = {}
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    theirs = _Baseline(loader, steps) if baseline else None
    for _ in progress(range(pairs), total=pairs, what="timing", unit="pair"):
        timings["samples_per_s"].append(_rate(_delivered(loader), steps, loader.device_id) * loader.batch_size)
        memory.setdefault("loader", _peak_memory(os.getpid()))
        loader.close()
        timings["decode_only"].append(_rate(_decode_only(loader, steps), steps, loader.device_id) * loader.batch_size)
        if loader.mode == "host":
            timings["memset"].append(_rate(_memset(loader), steps, None) * loader.batch_size)
        if theirs is not None:
            timings["baseline"].append(theirs.rate() * loader.batch_size)
    if theirs is not None:
        memory["baseline_worker"] = max(_peak_memory(worker.pid or 0) for worker in active_children())
    ours = timings["samples_per_s"]
    spreads = {name: asdict(Spread.of(values)) if values else None for name, values in timings.items()}
    ratios = {
        f"ratio_{name}": asdict(Spread.of(np.divide(ours, timings[name]))) if timings[name] else None
        for name in ("decode_only", "baseline", "memset")
    }
    return {
        "mode": loader.mode,
        "device": "cpu" if loader.device_id is None else f"cuda:{loader.device_id}",
        **spreads,
        **ratios,
        "waiting": None if starve is None else _waiting(_delivered(loader), steps, starve / 1000),
        "config": {
            "batch_size": loader.batch_size,
            "size": loader.size,
            "dtype": loader.dtype,
            "resample": loader.resample,
            "num_threads": loader.num_threads,
            "policy": json.loads(loader.policy.to_json()),
            "pairs": pairs,
            "steps": steps,
            "starve_ms": starve,
            "datasets": [dataset.name for dataset in loader.corpus.datasets],
            "photos": len(loader.corpus.photo_width),
            "megapixels_a_photo": round(_megapixels(loader), 3),
        },
        "peak_memory_mib": memory,
        "machine": machine(),
        "versions": versions(),
    }


def _megapixels(loader: Loader) -> float:
    """Mean size of the photos: the cost of decoding depends on it, the cost of writing frames does not."""
    return float((loader.corpus.photo_width.astype(np.int64) * loader.corpus.photo_height).mean() / 1e6)


def _rate(batches: Iterator[Any], steps: int, device_id: int | None) -> float:
    """Batches per second, with as many in flight at the end as at the beginning; a GPU is waited for."""
    for _ in range(WARM_UP):
        next(batches)
    _settle(device_id)
    start, done = time.perf_counter(), 0
    while done < steps or time.perf_counter() - start < LEAST_SECONDS:
        next(batches)
        done += 1
    _settle(device_id)
    return done / (time.perf_counter() - start)


def _settle(device_id: int | None) -> None:
    if device_id is not None:
        gpu.synchronize(device_id)


def _waiting(batches: Iterator[Any], steps: int, step_seconds: float) -> float:
    """Share of the time that a training with steps of this length spends waiting."""
    for _ in range(WARM_UP):
        next(batches)
    waited = 0.0
    for _ in range(steps):
        time.sleep(step_seconds)
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
    return round(waited / (waited + steps * step_seconds), 4)


def _peak_memory(process: int) -> float:
    """Peak resident memory of a process in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    return round(int(text.split("VmHWM:")[1].split()[0]) / 1024, 1)


def _delivered(loader: Loader) -> Iterator[Any]:
    loader.set_epoch(0)
    while True:
        yield from loader


class _Baseline:
    """Times the PyTorch DataLoader. Its workers live as long as this; between two timings they have nothing to do."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self._steps = steps
        rows = loader.plan(0, np.arange(len(loader) * loader.batch_size))
        asked = WARM_UP + steps + IN_FLIGHT * loader.num_threads
        self._batches = dataloader(loader, rows, batches=asked)
        self._device_id = loader.device_id
        check_equal(next(_delivered(loader)), next(iter(self._batches)), exact=loader.decoder == "cpu")

    def _next(self, delivered: Iterator[Any]) -> None:
        for tensor in next(delivered):
            if self._device_id is not None:
                tensor.to(gpu.place(self._device_id), non_blocking=True)

    def rate(self) -> float:
        """Batches per second, with as many in flight at the end as at the beginning."""
        delivered = iter(self._batches)
        for _ in range(WARM_UP):
            self._next(delivered)
        _settle(self._device_id)
        start = time.perf_counter()
        for _ in range(self._steps):
            self._next(delivered)
        _settle(self._device_id)
        seconds = time.perf_counter() - start
        for _ in delivered:  # the rest, so that nothing keeps running
            pass
        return self._steps / seconds


def _decode_only(loader: Loader, steps: int) -> Iterator[None]:
    """Read and decode the photos that the loader would, in its order, and nothing else: paths are made beforehand."""

    def paths(step: int) -> list[npt.NDArray[np.uint8]]:
        epoch, step = divmod(step, len(loader))
        positions = step * loader.world_size * loader.batch_size + loader.rank * loader.batch_size
        rows = loader.plan(epoch, np.arange(positions, positions + loader.batch_size))
        _, _, photos = lay_out(rows, loader.size)
        return [encode_path(loader.corpus.photo_path(row)) for row in photos.tolist()]

    depth = loader.prefetch
    batches = itertools.cycle([Fed(paths(step), NOTHING, None) for step in range(depth + steps + WARM_UP)])
    cells = loader.batch_size * loader.policy.largest_grid**2
    options: dict[str, Any] = {"max_cells": cells, "num_threads": loader.num_threads, "prefetch": depth}
    pipeline: StreamPipeline[None]
    if loader.device_id is None:
        pipeline = HostDecodeOnly(**options)
    else:
        pipeline = DecodeOnly(device_id=loader.device_id, hw_decoder_load=loader.hw_decoder_load, **options)
    with closing(pipeline):
        for _ in in_flight(pipeline, batches, prefetch=depth):
            yield None


def _memset(loader: Loader) -> Iterator[None]:
    """Fill the memory of batches, as much of it as the loader has in use, with the loader's number of threads."""
    nbytes = loader.batch_size * loader.sample_bytes
    pool = BufferPool(nbytes, most=0)
    blocks = [pool.take() for _ in range(loader.prefetch + 2)]
    begins = np.linspace(0, nbytes, loader.num_threads + 1).astype(np.int64).tolist()
    parts = list(itertools.pairwise(begins))
    with ThreadPoolExecutor(loader.num_threads) as threads:
        for block in itertools.cycle(blocks):
            fills = (threads.submit(ctypes.memset, block.ctypes.data + a, 1, b - a) for a, b in parts)
            for fill in list(fills):
                fill.result()
            yield None


class _ReadAndDecode(StreamPipeline[None]):
    """The loader's reading and decoding, and nothing else: the photos are delivered, and dropped."""

    def _graph(self) -> Any:
        from nvidia.dali import fn, types

        paths = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
        return self._decode(fn.io.file.read(paths, dont_use_mmap=True))

    def _photo_sizes(self, work: Any) -> None:
        """None: nothing looks at them."""


class HostDecodeOnly(_ReadAndDecode):
    """On the CPU."""

    def _feed(self, work: Any) -> None:
        """Nothing but paths."""

    def _result(self, outputs: Any) -> None:
        """Nothing."""


class DecodeOnly(_ReadAndDecode, CudaStreamPipeline[None]):
    """On a GPU."""

    def _feed(self, work: Any) -> None:
        self._to_deliver.append(work)


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB; the GPUs, their driver and the newest CUDA it supports."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}
    if (driver := read_driver()) and driver.gpus:
        found |= {"gpus": [gpu.name for gpu in driver.gpus], "driver": driver.version, "cuda": driver.cuda}
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
