"""Runs a GPU benchmark, or a command of nemo-dali, with the host playing the GPU: for ``gpu_check.py --pretend``.

    python benchmarks/pretended_gpu.py gpu_kernels.py|gpu_stream.py|gpu_data.py|nemo_dali ARGUMENTS

A C++ compiler is needed, because the CUDA source is built for the host. Nothing that this prints or writes is a
measurement: kernels are tried on frames of 50 pixels, and the clock says 2 ms for every round.
"""

import importlib
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import common
import torch
from pytest import MonkeyPatch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.helpers.cuda_host import library
from tests.helpers.played_gpu import play
from tests.helpers.played_launches import play_at_once, play_clock

SIZE = 50  # of a frame, in pixels
COPY_BYTES = 1 << 20


def play_kernels(patch: MonkeyPatch) -> None:
    """Small batches, launched by the host. Launches by CuPy and Numba themselves are left out: nothing plays those."""
    kernels, batches = importlib.import_module("gpu_kernels"), importlib.import_module("kernel_batches")
    play_at_once(patch, library(), batches)
    small = [replace(case, size=SIZE) for case in batches.cases(kernels.BATCHES[:1], kernels.DTYPES[:1])]
    patch.setattr(kernels, "cases", lambda *_: small)
    patch.setattr(kernels, "COPY_BYTES", COPY_BYTES)
    patch.setattr(kernels, "launch_costs", lambda case, **_: {})
    patch.setattr(kernels, "current", lambda *_: nullcontext())


def main() -> int | None:
    """Run what the command line says."""
    script, *arguments = sys.argv[1:]
    patch = MonkeyPatch()
    play(patch, library())
    play_clock(patch)
    patch.setattr(common, "require_gpu", lambda: 0)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    patch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=0))
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    sys.argv = [script, *arguments]
    if script == "nemo_dali":
        from nemo_dali.commands.cli import main as command

        return command()
    if script == "gpu_kernels.py":
        play_kernels(patch)
    importlib.import_module(script.removesuffix(".py")).main()
    return None


if __name__ == "__main__":
    sys.exit(main())
