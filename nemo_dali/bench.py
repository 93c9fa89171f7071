"""``nemo-dali bench loader``: samples per second of the Loader beside a DALI pipeline that only reads and decodes.

Both read the photos of the same plan with the same number of threads, in turn, several times: on a machine whose speed
drifts only the ratio within a pair means something.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nemo_dali.layout import lay_out
from nemo_dali.loader import Loader
from nemo_dali.pipeline import encode_path
from nemo_dali.progress import progress

PACKAGES = ("nemo-dali", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "torch", "numba", "numpy", "h5py", "pillow")

WARM_UP = 6  # batches until every block of frames and every buffer of DALI has been touched once


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of several measurements."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> "Spread":
        """Of one-dimensional measurements."""
        return cls(*(round(float(q), 4) for q in np.quantile(np.asarray(values), (0.5, 0.25, 0.75))))


def bench_loader(loader: Loader, *, pairs: int = 7, steps: int = 20) -> dict[str, Any]:
    """Time a loader against decode-only DALI, in turn.

    Args:
        pairs: how many times each is timed, >= 1.
        steps: batches per timing, >= 1, after ``WARM_UP`` that are not counted; they go on into later epochs.

    Returns:
        JSON-able: ``samples_per_s`` and ``decode_only`` as ``{median, p25, p75}``, ``ratio_decode_only`` likewise (the
        ratio of each pair), ``config``, ``machine``, ``versions``.
    """
    for name, value in (("pairs", pairs), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be >= 1")
    ours, theirs = [], []
    for _ in progress(range(pairs), total=pairs, what="timing", unit="pair"):
        ours.append(steps * loader.batch_size / _seconds(_delivered(loader), steps))
        loader.close()
        theirs.append(steps * loader.batch_size / _seconds(_decode_only(loader, steps), steps))
    return {
        "mode": "stream",
        "samples_per_s": asdict(Spread.of(ours)),
        "decode_only": asdict(Spread.of(theirs)),
        "ratio_decode_only": asdict(Spread.of(np.divide(ours, theirs))),
        "config": {
            "batch_size": loader.batch_size,
            "size": loader.size,
            "dtype": loader.dtype,
            "resample": loader.resample,
            "num_threads": loader.num_threads,
            "policy": json.loads(loader.policy.to_json()),
            "pairs": pairs,
            "steps": steps,
            "datasets": [dataset.name for dataset in loader.corpus.datasets],
            "photos": len(loader.corpus.photo_width),
            "megapixels_a_photo": round(_megapixels(loader), 3),
        },
        "machine": machine(),
        "versions": versions(),
    }


def _megapixels(loader: Loader) -> float:
    """Mean size of the photos: what decoding costs goes with it, what writing frames costs does not."""
    return float((loader.corpus.photo_width.astype(np.int64) * loader.corpus.photo_height).mean() / 1e6)


def _seconds(batches: Iterator[Any], steps: int) -> float:
    """Time of ``steps`` batches in a row, with as many in the making at the end as at the beginning."""
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return time.perf_counter() - start


def _delivered(loader: Loader) -> Iterator[Any]:
    loader.set_epoch(0)
    while True:
        yield from loader


def _decode_only(loader: Loader, steps: int) -> Iterator[Any]:
    """Read and decode the photos that the loader would, in its order, and nothing else: paths are made beforehand."""
    from nvidia.dali import Pipeline, fn, types

    def paths(step: int) -> list[npt.NDArray[np.uint8]]:
        epoch, step = divmod(step, len(loader))
        positions = step * loader.world_size * loader.batch_size + loader.rank * loader.batch_size
        rows = loader.plan(epoch, np.arange(positions, positions + loader.batch_size))
        _, _, photos = lay_out(rows, loader.size)
        return [encode_path(loader.corpus.photo_path(row)) for row in photos.tolist()]

    cells = loader.batch_size * loader.policy.largest_grid**2
    depth = loader.prefetch
    pipe = Pipeline(cells, loader.num_threads, None, prefetch_queue_depth=depth)
    with pipe:
        source = fn.external_source(name="paths", ndim=1, dtype=types.UINT8)
        encoded = fn.io.file.read(source, dont_use_mmap=True)
        pipe.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False))
    pipe.build()
    batches = [paths(step) for step in range(depth + steps + WARM_UP)]
    for batch in batches[:depth]:
        pipe.feed_input("paths", batch)
    pipe.schedule_run()
    for batch in batches[depth:]:
        pipe.share_outputs()
        pipe.release_outputs()
        pipe.feed_input("paths", batch)
        pipe.schedule_run()
        yield None


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
