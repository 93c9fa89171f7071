"""Compiles the CUDA sources for every GPU that is supported; no GPU is needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_dali.kernels import cuda_source

ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]
ONE_FAST = [pytest.param(name, marks=[pytest.mark.slow] * (name != "90")) for name in ARCHITECTURES]
OPTIONS_OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")  # that CuPy adds to those of a RawModule
LARGEST_SHARED = 48 * 1024  # bytes that a block may have without asking for more

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def report_of_nvcc(source, architecture, folder):
    """What nvcc says about the kernels of a source."""
    name = Path(source.file).name
    (folder / name).write_text(cuda_source.text_of(source))
    command = ["nvcc", *cuda_source.OPTIONS, f"-arch=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings"]
    run = subprocess.run([*command, "-cubin", name], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def room_for(size):
    """Bytes for NVRTC to write into: at least two, because Python shares one object for each single byte."""
    return bytes(max(size, 2))


def report_of_run_time_compiler(source, architecture):
    """What NVRTC, to which CuPy hands the text, says about the kernels of a source."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    text, name = cuda_source.text_of(source).encode(), source.file.encode()
    error, program = nvrtc.nvrtcCreateProgram(text, name, 0, [], [])
    options = [
        o.encode() for o in (*cuda_source.OPTIONS, *OPTIONS_OF_CUPY, f"-arch=sm_{architecture}", "--ptxas-options=-v")
    ]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = room_for(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == 0, log.decode()
    return log.rstrip(b"\0").decode()


def check_report(report, title, kernels, *, registers, dynamic_shared=0):
    """Check that every kernel is there, keeps within its limits and spills nothing; print ``make cuda-check``'s table.

    Args:
        registers: the most that a thread may have. dynamic_shared: bytes that a launch may add.
    """
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    assert sorted(name for name, *_ in found) == sorted(kernels), report
    for name, *numbers, rest in sorted(found):
        stack, stores, loads, used = map(int, numbers)
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", rest)))
        assert (stack, stores, loads) == (0, 0, 0), (name, numbers)
        assert shared + dynamic_shared <= LARGEST_SHARED
        assert used <= registers, (name, used)
        print(f"{title} {name}: {used} registers, {shared} bytes shared, no spills")
