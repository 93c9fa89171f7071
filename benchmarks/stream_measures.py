"""What ``gpu_stream.py`` measures: rates, the host's time, memory, waiting, and how nvJPEG's pixels differ."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn

from nemo_dali.commands.bench import NOTHING, WARM_UP, DecodeOnly, HostDecodeOnly, Spread
from nemo_dali.loader._assembly import Assembler
from nemo_dali.loader._steps import StepPlanner
from nemo_dali.loader.loader import Loader
from nemo_dali.pipeline import gpu
from nemo_dali.pipeline.cells import lay_out
from nemo_dali.pipeline.graphs_gpu import CudaStreamPipeline
from nemo_dali.pipeline.overlap import Fed, in_flight
from nemo_dali.pipeline.paths import encode_path

BUSY_MS = 500  # for which the GPU has other work while batches are asked for


# --- how fast --------------------------------------------------------------------------------------------------------


def compare(loader: Loader, hw_decoder_load: float, device: int, *, pairs: int, steps: int) -> dict[str, Any]:
    """Samples per second of a loader and of decode-only DALI, in turn, and the ratio of each pair."""
    pipeline = DecodeOnly(
        device_id=device,
        hw_decoder_load=hw_decoder_load,
        max_cells=loader.batch_size * loader.policy.largest_grid**2,
        num_threads=loader.num_threads,
        prefetch=loader.prefetch,
    )
    photos = [shown(loader, step) for step in range(loader.prefetch + WARM_UP + steps)]
    ours, theirs = [], []
    for _ in range(pairs):
        ours.append(steps * loader.batch_size / seconds(delivered(loader), steps, device))
        theirs.append(steps * loader.batch_size / seconds(decoded(pipeline, photos, loader.prefetch), steps, device))
        pipeline.drain()
    loader.close(), pipeline.close()
    ratio = np.divide(ours, theirs)
    found = {"samples_per_s": ours, "decode_only": theirs, "ratio_decode_only": ratio}
    return {name: asdict(Spread.of(values)) for name, values in found.items()}


def shown(loader: Loader, step: int) -> list[npt.NDArray[np.uint8]]:
    """Paths of the photos that the loader shows in a step, counted from the beginning of epoch 0."""
    epoch, step = divmod(step, len(loader))
    rows = loader.plan(epoch, np.arange(step * loader.batch_size, (step + 1) * loader.batch_size))
    return [encode_path(loader.corpus.photo_path(row)) for row in lay_out(rows, loader.size)[2].tolist()]


def delivered(loader: Loader) -> Iterator[Any]:
    """Batches from the beginning of epoch 0 on."""
    loader.set_epoch(0)
    while True:
        yield from loader


def decoded(pipeline: DecodeOnly, photos: list[Any], prefetch: int) -> Iterator[None]:
    """The same batches, only decoded, in the loader's order of waiting and feeding."""
    for _ in in_flight(pipeline, (Fed(batch, NOTHING, None) for batch in photos), prefetch=prefetch):
        yield


def seconds(batches: Iterator[Any], steps: int, device: int) -> float:
    """Time of ``steps`` batches in a row, from when the GPU has no work left to when it has finished them."""
    for _ in range(WARM_UP):
        next(batches)
    gpu.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    gpu.synchronize(device)
    return time.perf_counter() - start


# --- what it costs ---------------------------------------------------------------------------------------------------


def clocked(function: Callable[..., Any], taken: list[float]) -> Callable[..., Any]:
    """The function, with the time of each call in microseconds appended to a list."""

    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            taken.append((time.perf_counter() - start) * 1e6)

    return call


@contextmanager
def clocks() -> Iterator[dict[str, list[float]]]:
    """Microseconds of each call, by what is called; the loaders to be timed are made inside."""
    taken: dict[str, list[float]] = {name: [] for name in ("plan", "prepare", "feed", "wait", "python_function")}
    methods = {"plan": (StepPlanner, "plan"), "prepare": (Assembler, "prepare")}
    methods |= {name: (CudaStreamPipeline, name) for name in ("feed", "wait")}
    operator = fn.dl_tensor_python_function

    def with_clock(*inputs: Any, function: Callable[..., Any], **options: Any) -> Any:
        return operator(*inputs, function=clocked(function, taken["python_function"]), **options)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(fn, "dl_tensor_python_function", with_clock))
        for name, (owner, method) in methods.items():
            stack.enter_context(mock.patch.object(owner, method, clocked(getattr(owner, method), taken[name])))
        yield taken


def host_costs(make: Callable[[], Loader], steps: int) -> dict[str, Any]:
    """Microseconds per batch: of DALI's thread in the Python function, of the training thread in everything else.

    ``plan``, ``prepare`` and ``feed`` start a batch, ``wait`` waits for one, and ``next`` is all of it. The threads
    share the interpreter's lock, so the time of each includes some waiting for the other.
    """
    with clocks() as taken:
        loader = make()
        batches = delivered(loader)
        taken["next"] = []
        deliver = clocked(lambda: next(batches), taken["next"])
        for _ in range(WARM_UP):
            deliver()
        for values in taken.values():
            values.clear()
        for _ in range(steps):
            deliver()
        loader.close()
    return {name: asdict(Spread.of(values)) for name, values in taken.items()}


def memory_peak(loader: Loader, steps: int, device: int) -> dict[str, float]:
    """The most that the GPU's free memory fell while batches were made, and torch's part of it, in MiB."""
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    free = [torch.cuda.mem_get_info(device)[0]]
    batches = delivered(loader)
    for _ in range(WARM_UP + steps):
        next(batches)
        free.append(torch.cuda.mem_get_info(device)[0])
    loader.close()
    peaks = {"device": free[0] - min(free), "torch": torch.cuda.max_memory_allocated(device)}
    return {name: round(peak / 2**20, 1) for name, peak in peaks.items()}


def next_while_busy(loader: Loader, device: int) -> dict[str, Any]:
    """Milliseconds of each ``next`` while the training stream is busy.

    The batches that are made already must not wait for it. Later ones may: their frames are memory that the training
    stream could still be reading.
    """
    import torch

    batches = delivered(loader)
    for _ in range(WARM_UP):
        next(batches)
    gpu.synchronize(device)
    time.sleep(0.5)  # until the batches ahead are made
    taken: list[float] = []
    deliver = clocked(lambda: next(batches), taken)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(BUSY_MS * 2_000_000)  # cycles; at the 2 GHz of an H100
    end.record()
    for _ in range(2 * loader.prefetch):
        deliver()
    end.synchronize()
    loader.close()
    return waits(np.array(taken) / 1000, begin.elapsed_time(end), loader.prefetch)


def waits(taken: npt.NDArray[np.float64], busy: float, prefetch: int) -> dict[str, Any]:
    """Whether one of the first ``prefetch`` calls waited for a GPU that was busy for ``busy`` milliseconds."""
    return {
        "busy_ms": round(busy, 1),
        "next_ms": taken.round(2).tolist(),
        "synchronises": bool(taken[:prefetch].max() > busy / 2),
    }


# --- what nvJPEG does ------------------------------------------------------------------------------------------------


def decode_difference(
    photos: list[Any], num_threads: int, hw_decoder_load: float, device: int, *, beside: float | None = None
) -> dict[str, Any]:
    """The difference between DALI's decoders on the CPU and on the GPU, in levels of 0 to 255.

    Args:
        beside: the GPU's decoders with this ``hw_decoder_load``, instead of the CPU's.

    Returns:
        ``mean`` and ``max`` of the absolute difference, ``share_differing`` of the values, and how many ``photos``.
    """
    size = min(32, len(photos))
    options = {"max_cells": size, "num_threads": num_threads, "prefetch": 1}
    there = DecodeOnly(device_id=device, hw_decoder_load=hw_decoder_load, **options)
    here = (
        HostDecodeOnly(**options) if beside is None else DecodeOnly(device_id=device, hw_decoder_load=beside, **options)
    )
    total = differing = values = largest = 0
    for begin in range(0, len(photos), size):
        paths = photos[begin : begin + size]
        (ours,), (theirs,) = (pipeline._pipe.run(paths=paths) for pipeline in (there, here))
        for one, other in zip(ours.as_cpu(), theirs.as_cpu(), strict=True):
            difference = np.abs(np.asarray(one).astype(np.int16) - np.asarray(other))
            total += int(difference.sum())
            differing += int(np.count_nonzero(difference))
            values += difference.size
            largest = max(largest, int(difference.max()))
    there.close(), here.close()
    return {
        "mean": round(total / values, 4),
        "max": largest,
        "share_differing": round(differing / values, 4),
        "photos": len(photos),
    }
