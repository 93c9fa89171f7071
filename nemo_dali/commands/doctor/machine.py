"""What there is on this machine: packages, driver, limits, and whether a small pipeline gives the right pixels.

Whatever loads a third-party library runs in another process, so that one that raises, crashes, hangs or prints stops
nothing but itself. ``doctor`` judges what is found here.
"""

import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import distributions
from typing import Any, get_args

from nemo_dali._choices import Resample
from nemo_dali._version import __version__
from nemo_dali.commands.doctor.driver import Driver, Gpu, cuda_version, read_driver
from nemo_dali.commands.doctor.self_check import Decoders, Pixels, check_pixels, compare_decoders
from nemo_dali.io.threads import core_quota

DEADLINE = 300  # seconds for a group of steps; the kernels' first compilation on a machine takes about 20
LONGEST = 300  # characters of an error message that are kept
# What is imported ▸ the distributions that provide it, in the normal form of their names.
LIBRARIES = {
    "DALI": r"nvidia-dali(-nightly|-weekly)?-cuda\d+",
    "torch": "torch",
    "CuPy": r"cupy(-cuda\w+|-rocm[\w-]+)?",
    "NumPy": "numpy",
    "Numba": "numba",
    "numba-cuda": "numba-cuda",
    "h5py": "h5py",
    "open_clip": "open-clip-torch",
    "Pillow": "pillow",
    "pycocotools": "pycocotools",
}
MODULES = {
    "DALI": "nvidia.dali",
    "CuPy": "cupy",
    "NumPy": "numpy",
    "Numba": "numba",
    "numba-cuda": "numba_cuda",
    "Pillow": "PIL",
    "pycocotools": "pycocotools.mask",  # its compiled part
}
PIXELS = tuple(
    f"pixels {device} {resample} {photos}"
    for device, photos in (("cpu", "JPEG"), ("cuda", "PNG"), ("cuda", "JPEG"))
    for resample in get_args(Resample)
)
# Each group is a process, and they run side by side: torch takes seconds to import.
GROUPS = (
    ("import DALI", "cache", *PIXELS, "decoders"),
    ("import torch", "import open_clip"),
    ("import NumPy", "import Numba", "import h5py", "import Pillow", "import pycocotools"),
    ("import CuPy", "nvrtc", "import numba-cuda", "nvvm"),
    ("driver",),
)


@dataclass(frozen=True)
class Answer:
    """What a step found, or why it failed."""

    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Package:
    """A library. Its CUDA version is that of the toolkit it was built with, for numba-cuda that of cuda-bindings."""

    wheels: tuple[str, ...] = ()  # installed distributions that provide it
    version: str | None = None  # what it says once imported
    cuda: str | None = None
    error: str | None = None  # why it cannot be imported


@dataclass(frozen=True)
class Facts:
    """Everything that ``doctor`` judges. Sizes are in bytes; None where the system does not say or sets no limit."""

    python: str
    nemo_dali: str
    packages: dict[str, Package]  # by the names of LIBRARIES
    driver: Driver | None  # None: there is none
    nvrtc: Answer  # the CUDA version of CuPy's compiler, once it has compiled a kernel
    nvvm: Answer  # the CUDA version of numba-cuda's linker, once it has linked what NVVM compiled
    cores: int
    core_quota: float | None  # of the control group
    shared_memory: int | None
    open_files: int | None  # the hard limit: a pipeline raises the soft one by itself
    cache: Answer  # the folder of compiled kernels, which was written to
    pixels: dict[str, Answer]  # self_check.Pixels by "device resampling photos", for the devices that there are
    decoders: Answer = Answer()  # self_check.Decoders, where there is a GPU


def gather() -> Facts:
    """Look at this machine; takes about 8 s on two cores, most of it importing torch."""
    with ThreadPoolExecutor(len(GROUPS)) as pool:
        answers = {step: found for group in pool.map(ask, GROUPS) for step, found in group.items()}
    installed = {normal_name(one.metadata["Name"] or ""): one.version for one in distributions()}
    return Facts(
        python=platform.python_version(),
        nemo_dali=__version__,
        packages={name: _package(name, answers[f"import {name}"], installed) for name in LIBRARIES},
        driver=_parse_driver(answers["driver"]),
        nvrtc=answers["nvrtc"],
        nvvm=answers["nvvm"],
        cores=len(os.sched_getaffinity(0)),
        core_quota=core_quota(),
        shared_memory=_folder_size("/dev/shm"),
        open_files=_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        cache=answers["cache"],
        pixels={
            step.removeprefix("pixels "): Answer(found.value and Pixels(**found.value), found.error)
            for step, found in answers.items()
            if step.startswith("pixels ") and found != Answer()
        },
        decoders=Answer(answers["decoders"].value and Decoders(**answers["decoders"].value), answers["decoders"].error),
    )


# --- asking another process ------------------------------------------------------------------------------------------


def ask(steps: tuple[str, ...]) -> dict[str, Answer]:
    """Take steps one after the other in a new process that finds the same modules as this one."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import answer; answer({steps!r})"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=DEADLINE)
        out, err = done.stdout, done.stderr
        by = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        end = f"the process ended with {by}"
    except subprocess.TimeoutExpired as error:
        out, err, end = error.stdout or b"", error.stderr or b"", f"nothing for {DEADLINE} s"
    found = {step: Answer(value, error) for step, value, error in map(json.loads, out.splitlines())}
    for number, step in enumerate(steps[len(found) :]):
        said = err.decode(errors="replace").strip().rpartition("\n")[2]
        found[step] = Answer(error=_one_line(f"not tried, for the step before: {end}" if number else f"{end} {said}"))
    return found


def answer(steps: tuple[str, ...]) -> None:
    """Take steps and print a line ``[step, value, error]`` for each; whatever else is printed goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for step in steps:
            what, *words = step.split()
            try:
                line = [step, _STEPS[what](*words), None]
            except Exception as error:  # a library may raise anything
                line = [step, None, _one_line(f"{type(error).__name__}: {error}")]
            out.write(json.dumps(line) + "\n")
            out.flush()


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


# --- packages --------------------------------------------------------------------------------------------------------


def normal_name(distribution: str) -> str:
    """A distribution's name in the form that all its spellings share."""
    return re.sub("[-_.]+", "-", distribution).lower()


def _package(name: str, found: Answer, installed: dict[str, str]) -> Package:
    wheels = tuple(sorted(wheel for wheel in installed if re.fullmatch(LIBRARIES[name], wheel)))
    version, cuda = found.value or (None, None)
    if found.error is None and version is None and wheels:
        version = installed[wheels[0]]
    return Package(wheels, version, cuda, found.error)


def _import(name: str) -> tuple[str | None, str | None]:
    """Import a library; return its version, if it has one, and that of its CUDA."""
    module = import_module(MODULES.get(name, name))
    cuda = None
    if name == "DALI":
        digits = str(module.__cuda_version__)  # 12.9.86 without the dots
        cuda = f"{digits[:2]}.{digits[2]}"
    elif name == "torch":
        cuda = module.version.cuda
    elif name == "CuPy":
        cuda = cuda_version(module.cuda.runtime.runtimeGetVersion())
    elif name == "numba-cuda":
        import_module("numba.cuda")
        cuda = ".".join(import_module("cuda.bindings").__version__.split(".")[:2])
    return getattr(module, "__version__", None), cuda


def _compile_with_nvrtc() -> str:
    nvrtc = import_module("cupy.cuda").nvrtc
    program = nvrtc.createProgram('extern "C" __global__ void f(float* x) { *x = 1; }', "f.cu", [], [])
    nvrtc.compileProgram(program, ())
    return ".".join(map(str, nvrtc.getVersion()))


def _compile_with_nvvm() -> str:
    """Compile with NVVM to PTX and with nvJitLink to machine code, which fails if their CUDA versions differ."""
    nvvm, core = import_module("cuda.bindings.nvvm"), import_module("cuda.core")
    layout = import_module("numba.cuda.cudadrv.nvvm").NVVM().data_layout
    source = f"""target triple = "nvptx64-nvidia-cuda"
        target datalayout = "{layout}"
        define void @f() {{ ret void }}
        !nvvmir.version = !{{!1}}
        !1 = !{{i32 2, i32 0}}""".encode()
    program = nvvm.create_program()
    nvvm.add_module_to_program(program, source, len(source), "f")
    nvvm.compile_program(program, 0, [])
    ptx = bytearray(nvvm.get_compiled_result_size(program))
    nvvm.get_compiled_result(program, ptx)
    core.Linker(core.ObjectCode.from_ptx(bytes(ptx)), options=core.LinkerOptions(arch="sm_80")).link("cubin")
    return ".".join(map(str, import_module("cuda.bindings.nvjitlink").version()))


# --- the rest --------------------------------------------------------------------------------------------------------


def _read_driver() -> dict[str, Any] | None:
    driver = read_driver()
    return None if driver is None else asdict(driver)


def _write_cache() -> str | None:
    from nemo_dali.kernels.jit import cache_path
    from nemo_dali.kernels.mosaic.cpu import write_tile

    if (folder := cache_path(write_tile)) is None:
        return None
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    return folder


def _there_is_a_gpu() -> bool:
    driver = read_driver()
    return driver is not None and bool(driver.gpus)


def _compare_decoders() -> dict[str, Any] | None:
    return asdict(compare_decoders()) if _there_is_a_gpu() else None


def _check_pixels(device: str, resample: Any, photos: Any) -> dict[str, Any] | None:
    if device == "cuda" and not _there_is_a_gpu():
        return None
    return asdict(check_pixels(device=device, resample=resample, photos=photos))


def _parse_driver(found: Answer) -> Driver | None:
    if found.value is None:
        return Driver(error=found.error) if found.error else None
    gpus = (Gpu(gpu["name"], tuple(gpu["compute_capability"]), gpu["memory"]) for gpu in found.value["gpus"])
    return Driver(**{**found.value, "gpus": tuple(gpus)})


def _folder_size(folder: str) -> int | None:
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


_STEPS: dict[str, Callable[..., Any]] = {
    "import": _import,
    "driver": _read_driver,
    "nvrtc": _compile_with_nvrtc,
    "nvvm": _compile_with_nvvm,
    "cache": _write_cache,
    "pixels": _check_pixels,
    "decoders": _compare_decoders,
}
