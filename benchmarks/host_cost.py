"""What a batch on a GPU costs the host: CPU time of the training thread and of DALI's, without a GPU.

    python benchmarks/host_cost.py                     this checkout
    python benchmarks/host_cost.py --beside CHECKOUT   this and another one in turn, and their ratio

Batches of 64 2x2 mosaics, 480 x 480 in float16, in ``device`` mode and, for comparison, in ``stream`` mode. Everything
that calls CUDA is replaced by something that returns at once and does nothing: torch's streams, events, copies and
memory, CuPy's launches and DALI's decoder; the CPU replaces DALI's GPU. So the times are those of Python and compiled
code, without the calls into the driver (about 5 us for each launch or copy). Each turn is a separate process, and the
median of its rounds counts. Each checkout makes its own files; any checkout with ``benchmarks/startup.py`` can be
compared. Writes host_cost.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PHOTOS, SENTENCES, SIZE, BATCH = 1000, 20_000, 480, 64
ROUNDS, WARM_UP, STEPS = 7, 200, {"device": 300, "stream": 60}
MODES = tuple(STEPS)
PLANNING = "nemo-dali plan"  # the thread that draws the next steps


# --- a GPU that does nothing -----------------------------------------------------------------------------------------


class _Stream:
    """A stream, and an event on it, without anything to do."""

    cuda_stream = ptr = 1

    def _event(self, *_: Any, **__: Any) -> "_Stream":
        return self

    record_event = record = _event

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait_event = wait_stream = wait = synchronize = _nothing

    def query(self) -> bool:
        return True


class _Kernel:
    """A kernel, and a module of kernels."""

    def load(self, code: bytes) -> None:
        """Load a module's machine code."""

    def __init__(self, **_: Any) -> None:
        self.kernel = self

    def __call__(self, *_: Any, **__: Any) -> None:
        pass

    def compile(self) -> None:
        pass

    def get_function(self, _: str) -> "_Kernel":
        return self


class _Device:
    """CuPy's device, as a context."""

    compute_capability = "90"

    def __init__(self, _: int = 0) -> None:
        pass

    def __enter__(self) -> "_Device":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def play_cuda() -> None:
    """Replace CUDA with things that do nothing, in this process."""
    _play_torch()
    _play_cupy()
    _play_dali()


def _play_torch() -> None:
    import torch

    stream, nothing = _Stream(), nullcontext()
    cuda: Any = torch.cuda
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "current_stream": stream,
        "default_stream": stream,
        "ExternalStream": stream,
        "Stream": stream,
        "Event": stream,
        "stream": nothing,
        "device": nothing,
        "synchronize": None,
        "mem_get_info": (2**40, 2**40),
        "memory_reserved": 0,
        "memory_allocated": 0,
    }.items():
        setattr(cuda, name, _giving(value))
    known: dict[Any, Any] = {}

    def is_cuda(place: Any) -> bool:
        return place.startswith("cuda") if isinstance(place, str) else place is not None and place.type == "cuda"

    def allocator(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Any:
            if not pin_memory and not is_cuda(device):
                return function(*arguments, **options)
            key = (arguments, *options.values())
            if key not in known:  # the same memory again, as torch's allocators reuse theirs
                known[key] = function(*arguments, **options)
            return known[key]

        return call

    def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, device: Any = None, **options: Any) -> Any:
            return function(*arguments, **options)

        return call

    copy_to = torch.Tensor.to

    def to(tensor: Any, *arguments: Any, **options: Any) -> Any:
        where = arguments[0] if arguments else options.get("device")
        if isinstance(where, torch.device | str) and is_cuda(where):
            return tensor
        return copy_to(tensor, *arguments, **options)

    there: Any = torch
    there.empty = allocator(torch.empty)
    there.zeros, there.tensor = on_host(torch.zeros), on_host(torch.tensor)
    there.Tensor.to, there.Tensor.pin_memory = to, lambda tensor: tensor
    there.Tensor.record_stream = _giving(None)


def _giving(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _play_cupy() -> None:
    import cupy

    class Stream(_Stream):
        from_external = staticmethod(_giving(nullcontext()))

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

    there: Any = cupy
    there.RawModule = there.cuda.Module = _Kernel
    there.cuda.Device, there.cuda.Stream, there.cuda.ExternalStream = _Device, Stream, Stream
    there.cuda.runtime.memcpyAsync = _giving(None)


def _play_dali() -> None:
    import nvidia.dali
    import nvidia.dali.python_function_plugin as plugin
    from nvidia.dali import fn, types

    there: Any = nvidia.dali
    pipeline, call = there.Pipeline, fn.dl_tensor_python_function
    share = pipeline.share_outputs
    there.Pipeline = lambda **options: pipeline(**options | {"device_id": None})
    pipeline.share_outputs = lambda self, cuda_stream=None: share(self)
    plugin.current_dali_stream = _giving(1)
    operators: Any = fn

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*batch: Any) -> Any:
            _calling.add(threading.get_native_id())
            return function(*batch)

        return noted

    operators.dl_tensor_python_function = lambda *inputs, function, device="cpu", **options: call(
        *inputs, function=noting(function), **options
    )
    # A photo of the right size and without content.
    operators.decoders.image = lambda encoded, **_: fn.zeros(
        shape=fn.peek_image_shape(encoded, dtype=types.INT32), dtype=types.UINT8
    )


# --- the clocks ------------------------------------------------------------------------------------------------------


_calling: set[int] = set()  # DALI's threads that call Python; its others read and decode, or hand work on


def thread_times() -> dict[str, float]:
    """Seconds of CPU time so far, for each kind of thread in this process."""
    kinds = dict.fromkeys(_calling, "dali") | {os.getpid(): "training"}
    kinds |= {t.native_id: "planning" for t in threading.enumerate() if t.native_id and t.name.startswith(PLANNING)}
    found = {"training": 0.0, "dali": 0.0, "planning": 0.0, "others": 0.0}
    for task in os.listdir("/proc/self/task"):
        number = int(task)
        try:
            taken = time.clock_gettime(~number << 3 | 6)  # Linux's clock of any thread, as pthread_getcpuclockid has it
        except OSError:  # it is gone
            continue
        found[kinds.get(number, "others")] += taken
    return found


def measure(folder: Path, mode: str) -> dict[str, float]:
    """Microseconds per batch for each kind of thread, in this process."""
    play_cuda()
    from nemo_dali import Loader, MosaicPolicy

    files = [folder / f"large.{end}.h5" for end in ("ris", "neg", "tiles")]
    options: dict[str, Any] = {"batch_size": BATCH, "size": SIZE, "dtype": "float16", "device": "cuda"}
    if mode == "device":
        options |= {"tiles": files[2], "placement": "device"}
    loader = Loader(*files[:2], **options, policy=MosaicPolicy(p_mined=1.0), num_threads=1)

    def delivered() -> Any:
        while True:
            yield from loader

    batches, steps = delivered(), STEPS[mode]
    for _ in range(min(WARM_UP, steps)):
        next(batches)
    taken: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        begin = thread_times()
        for _ in range(steps):
            next(batches)
        for name, end in thread_times().items():
            taken.setdefault(name, []).append((end - begin[name]) / steps * 1e6)
    loader.close()
    return {name: statistics.median(values) for name, values in taken.items()}


# --- turns -----------------------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Make the files with the benchmarks of the checkout whose package is imported."""
    from common import generate
    from startup import make_files

    make_files(folder, generate(folder)[0], photos=PHOTOS, sentences=SENTENCES, size=SIZE)


def run(checkout: Path, *arguments: str) -> str:
    """This script's output in a process that has another checkout's package and benchmarks."""
    paths = [str(checkout), str(checkout / "benchmarks")]
    return subprocess.run(
        [sys.executable, "-P", __file__, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


def label(checkout: Path) -> str:
    """A checkout's git revision; its folder's name if there is none."""
    run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=checkout, capture_output=True, text=True)
    return run.stdout.strip() or checkout.name


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the turns of each checkout, and the ratios of the last one's turns to the first one's, in pairs."""
    result: dict[str, Any] = {}
    for turns in found.values():
        for turn in turns:
            turn["both"] = turn["training"] + turn["dali"]
    for checkout, turns in found.items():
        result[checkout] = {name: round(statistics.median(turn[name] for turn in turns), 1) for name in turns[0]}
    if len(found) > 1:
        before, after = found.values()
        ratios = [new["both"] / old["both"] for old, new in zip(before, after, strict=True)]
        result["ratio_of_both"] = {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        }
    return result


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, to be measured in turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--output", type=Path, help="folder for host_cost.json; benchmarks/results if not given")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make(options.make)
        return
    if options.measure is not None:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    # Not imported above: a turn of another checkout has its own package, and none of these benchmarks.
    from common import RESULTS, ROOT, machine, versions

    checkouts = [ROOT] if options.beside is None else [options.beside.resolve(), ROOT]
    labels = [label(checkout) for checkout in checkouts]
    if len(set(labels)) < len(labels):
        parser.error(f"--beside ({options.beside}) must be a checkout of another revision")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, checkout in enumerate(checkouts):
            (Path(folder) / str(number)).mkdir()
            run(checkout, "--make", f"{folder}/{number}")
        for mode in options.modes:
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in labels}
            for _ in range(options.turns):
                for number, checkout in enumerate(checkouts):
                    found = json.loads(run(checkout, "--measure", f"{folder}/{number}", mode))
                    turns[labels[number]].append(found)
            result[mode] = summary(turns)
            print(mode, "us a batch:", json.dumps(result[mode]), flush=True)
    config = {"batch_size": BATCH, "size": SIZE, "dtype": "float16", "grid": 2, "turns": options.turns}
    output = options.output or RESULTS
    output.mkdir(parents=True, exist_ok=True)
    document = {**result, "config": config, "machine": machine(), "versions": versions(), "revision": labels[-1]}
    (output / "host_cost.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
