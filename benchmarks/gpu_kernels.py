"""The CUDA kernels, each checked against the CPU's and then timed, as a share of what the GPU reaches when it copies.

    python benchmarks/gpu_kernels.py [--quick]

It writes gpu_kernels.<device>.json; a single wrong byte ends it with exit code 1.

Times are the GPU's own (CUDA events), in microseconds per launch: median and quartiles over rounds of launches in a
row, which are queued while the GPU is kept busy, so that they exclude the host's time. The launches cycle through
batches that together are three times as large as the GPU's L2 cache. ``share_of_copy_rate`` is the bytes that a kernel
must move, over its time, over the rate (bytes read and written) of a device-to-device copy in the same run. For a
mosaic these are the photo rows that a cell needs, in full width, and the frame; for masks the tables and the mask; for
a gather the tiles and the frame. For pinned tiles they are the tiles alone, over the rate of a copy from page-locked
memory.
``with_upload_microseconds`` is for the launch as the pipeline makes it, with its tables uploaded each time, and
``host_microseconds`` is what this costs the calling thread.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import RESULTS, described, require_gpu, revision, save
from kernel_batches import Case, Photos, Work, cases, image_work, least_bytes, mask_work, masks_of, masks_on_cpu

from nemo_dali.commands.bench import Spread
from nemo_dali.errors import NemoError
from nemo_dali.kernels.device import current
from nemo_dali.kernels.mask import gpu as mask_gpu
from nemo_dali.pipeline import gpu

BATCHES = (8, 16, 32, 64, 128, 256)  # with smaller ones, filling L2 would take more launches than a stream queues
DTYPES = ("float16", "float32", "uint8")
TIMES_L2 = 3
LAUNCHES = 8  # at least, in a round: its two events cost a microsecond or two
WARM_UP = 2  # rounds
CYCLES = 20_000  # about 10 us for which the GPU is kept busy for each launch to be queued; doubled if too few
DOUBLINGS = 10  # at most; the GPU is then busy for 10 ms a launch, more than any host needs to queue one
IN_STEP = (
    "The GPU begins before a round is queued, however long it is kept busy: the host waits for each launch. "
    "Unset CUDA_LAUNCH_BLOCKING, and run under no debugger or profiler."
)
COPY_BYTES = 1 << 30
UNWRITTEN = 0xA5  # in every byte of an output before its check

Times = npt.NDArray[np.float64]  # microseconds a launch, one for each round


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="batches of 8, float16, three rounds")
    parser.add_argument("--revision", help="where there is no git repository to ask")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    batches, dtypes, rounds = options.batches, DTYPES, options.rounds
    if min(batches) < BATCHES[0]:
        parser.error(f"--batches ({min(batches)}) must be >= {BATCHES[0]}")
    if rounds < 1:
        parser.error(f"--rounds ({rounds}) must be >= 1")
    if options.quick:
        batches, dtypes, rounds = BATCHES[:1], DTYPES[:1], 3
    device = require_gpu()
    import torch

    measured = options.revision or revision()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), current(device, stream.cuda_stream):
        try:
            result = measure(cases(batches, dtypes), rounds=rounds, device=device, stream=stream.cuda_stream)
        except NemoError as error:
            sys.exit(str(error))
    print(save(described(device, measured) | result, "gpu_kernels", options.output))


def measure(todo: Sequence[Case], *, rounds: int, device: int, stream: int) -> dict[str, Any]:
    """Check and time all cases on torch's and CuPy's current stream, whose address is ``stream``."""
    import torch

    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    rates = {
        "device": 2 * COPY_BYTES / timed([copying(device)], rounds=rounds)[0] / 1e3,
        "pinned": COPY_BYTES / timed([copying(device, pinned=True)], rounds=rounds)[0] / 1e3,
    }
    counts = {case: batch_count(least_bytes(case), l2) for case in todo}
    shown = {case: count * case.batch * case.grid**2 for case, count in counts.items() if case.kernel != "mask"}
    photos = {
        placement: Photos(max(shown[case] for case in shown if case.placement == placement), placement, device)
        for placement in rates
    }
    rows = []
    for case, count in counts.items():
        if case.kernel == "mask":
            works = [mask_work(case, device=device, stream=stream) for _ in range(count)]
        else:
            where = photos[case.placement]
            works = [image_work(case, i, where, device=device, stream=stream) for i in range(count)]
        for work in works:
            check(case, work)
        alone, _ = timed([work.run for work in works], rounds=rounds)
        whole, host = timed([work.run_whole for work in works], rounds=rounds, ahead=False)
        rate = float(np.median(rates[case.placement]))
        rows.append(row(case, works[0].bytes, rate, alone=alone, whole=whole, host=host))
        print(*asdict(case).values(), rows[-1]["microseconds"], "us", rows[-1]["share_of_copy_rate"], flush=True)
    masks = next(case for case in todo if case.kernel == "mask" and case.grid == 1)
    costs = launch_costs(masks, rounds=rounds, device=device, stream=stream)
    return document(rates, l2, rows, costs)


def copying(device: int, *, pinned: bool = False) -> Callable[[], Any]:
    """A copy of random bytes to the device, out of its own or out of page-locked memory."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=gpu.place(device)).random_()
    target = torch.empty_like(source)
    if pinned:
        source = source.cpu().pin_memory()
    return lambda: target.copy_(source, non_blocking=True)


def batch_count(size: int, l2: int) -> int:
    """How many batches of ``size`` bytes are timed in turn."""
    return max(2, -(-TIMES_L2 * l2 // size))


def check(case: Case, work: Work) -> None:
    """Exit if a byte is not what the CPU kernel writes."""
    expected = work.expected()
    for run in (work.run, work.run_whole):
        work.output.fill_(UNWRITTEN)
        run()
        if wrong := int((work.output.cpu().numpy() != expected).sum()):
            sys.exit(f"{case} is wrong in {wrong} of {expected.size} bytes.")


def timed(launches: Sequence[Callable[[], Any]], *, rounds: int, ahead: bool = True) -> tuple[Times, Times]:
    """The GPU's and the host's time of a launch.

    Args:
        ahead: queue a round's launches before the GPU starts on them; otherwise it may have to wait for the host.

    Raises:
        NemoError: the host cannot get ahead of the GPU.
    """
    import torch

    launches = [*launches] * -(-LAUNCHES // len(launches))
    cycles, doublings = CYCLES * len(launches), 0
    here, there = [], []
    while len(there) < rounds + WARM_UP:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(cycles)
        begin.record()
        start = time.perf_counter()
        for run in launches:
            run()
        seconds = time.perf_counter() - start
        late = ahead and begin.query()  # the GPU has begun already
        end.record()
        end.synchronize()
        if late:
            if doublings == DOUBLINGS:
                raise NemoError(IN_STEP)
            cycles, doublings = 2 * cycles, doublings + 1
            continue
        here.append(seconds * 1e6 / len(launches))
        there.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return np.array(there[WARM_UP:]), np.array(here[WARM_UP:])


def launch_costs(case: Case, *, rounds: int, device: int, stream: int) -> dict[str, Any]:
    """The host's time for a launch of the mask kernel: by CuPy as the pipeline does it, by CuPy alone, by Numba."""
    from numba import cuda as numba_cuda

    from nemo_dali.kernels.mask.kernel import write_masks

    runs, shown, (targets, ends) = masks_of(case)
    expected = masks_on_cpu(case, runs, shown)
    masks = numba_cuda.device_array(expected.size, np.uint8)
    arrays = [numba_cuda.to_device(targets.view(np.int32)), numba_cuda.to_device(ends), masks]
    addresses = [array.__cuda_array_interface__["data"][0] for array in arrays]
    blocks = mask_gpu.grid(case.batch, case.size, case.size)
    threads, shared = mask_gpu.THREADS, mask_gpu.shared_bytes()
    numbers = [np.int32(number) for number in (case.size, case.size, mask_gpu.BAND)]
    kernel, numba_stream = mask_gpu.load_kernel(case.dtype, device), numba_cuda.external_stream(stream)
    frame = {"frame_height": case.size, "frame_width": case.size}
    ways = {
        "cupy": lambda: mask_gpu.write_masks(*addresses, case.batch, **frame, device=device, stream=stream),
        "cupy_kernel": lambda: kernel(blocks, (threads,), (*addresses, *numbers), shared_mem=shared),
        "numba": lambda: write_masks[blocks, threads, numba_stream, shared](*arrays, *numbers),
    }
    costs = {}
    for name, launch_once in ways.items():
        masks.copy_to_device(np.full(expected.size, UNWRITTEN, np.uint8))
        launch_once()
        numba_cuda.synchronize()
        if wrong := int((masks.copy_to_host() != expected).sum()):
            sys.exit(f"{case}, launched by {name}, is wrong in {wrong} of {expected.size} bytes.")
        costs[name] = asdict(Spread.of(timed([launch_once] * 100, rounds=rounds)[1]))
    return costs


def row(case: Case, size: int, copy_rate: float, *, alone: Times, whole: Times, host: Times) -> dict[str, Any]:
    """A case's entry in the document.

    Args:
        size: bytes that the kernel must move. copy_rate: of a copy that moves such bytes, in GB/s.
        alone: of the kernel; whole: with its upload; host: what the latter costs the host.
    """
    kernel = Spread.of(alone)
    rate = size / kernel.median / 1e3
    return asdict(case) | {
        "microseconds": kernel.median,
        "microseconds_p25": kernel.p25,
        "microseconds_p75": kernel.p75,
        "bytes": size,
        "gb_s": round(rate, 1),
        "share_of_copy_rate": round(rate / copy_rate, 4),
        "with_upload_microseconds": asdict(Spread.of(whole)),
        "host_microseconds": asdict(Spread.of(host)),
    }


def document(
    rates: dict[str, npt.ArrayLike], l2: int, rows: list[dict[str, Any]], costs: dict[str, Any]
) -> dict[str, Any]:
    """What is written, except where it was measured. Times are in microseconds, rates in GB/s, 1e9 bytes a second."""
    device, pinned = Spread.of(rates["device"]), Spread.of(rates["pinned"])
    return {
        "copy_rate_gb_s": device.median,
        "copy_rate_p25": device.p25,
        "copy_rate_p75": device.p75,
        "pinned_copy_rate_gb_s": asdict(pinned),
        "l2_bytes": l2,
        "cases": rows,
        "launch_host_microseconds": costs,
    }


if __name__ == "__main__":
    main()
