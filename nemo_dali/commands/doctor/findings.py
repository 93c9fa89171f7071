"""``nemo-dali doctor``: what is installed, whether it fits this machine, and what to do where it does not.

Every rule is a pure function of ``machine.Facts``, so that machines that are not at hand can be judged.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Any, Literal

from nemo_dali.commands.doctor.machine import LIBRARIES, Answer, Facts, Package, normal_name
from nemo_dali.commands.doctor.self_check import Decoders, Pixels
from nemo_dali.errors import NemoError
from nemo_dali.pipeline.limits import OTHER_FILES

Level = Literal["ok", "warning", "problem"]

# NVIDIA, "CUDA Compatibility", page "Minor Version Compatibility", table 1: within a major version of CUDA the driver
# of its first release is enough, 525 for 12 and 580 for 13. "CUDA Toolkit Release Notes" has the exact numbers.
MIN_DRIVER = {12: "525.60.13", 13: "580.65.06"}
# The oldest GPUs that a major version has code for: "CUDA Toolkit Release Notes", "Deprecated Architectures".
MIN_CAPABILITY = {12: (5, 0), 13: (7, 5)}
# What is installed for a library that depends on CUDA, by CUDA's major version; NumPy and torchvision must fit the
# library next to them.
FOR_CUDA = {
    "DALI": ["nvidia-dali-cuda{}0"],
    "CuPy": ["cupy-cuda{}x"],
    "numba-cuda": ["numba-cuda", "numpy"],
    "torch": ["torch", "torchvision"],
}
ONLY_GPU = ("CuPy", "numba-cuda")
# Libraries of this package's extras: the extra, and what needs it.
OF_EXTRAS = {"open_clip": ("mining", "CLIP models and the tokenizer 'clip' need it")}
# NCCL's user guide, "Shared memory", asks for this much in a container, where the default is 64 MiB.
MIN_SHARED_MEMORY = 1 << 30
MIN_CELLS = 64 * 9  # photos open at once in a batch of 64 mosaics of 3x3, the largest that is common on one GPU
# nvJPEG against libjpeg on the smooth photos of the self-check, in levels of 0 to 255: both round the transform,
# upsampling and colour conversion to a level or so each, and a wrong photo is off by far more.
MAX_MEAN_DIFFERENCE, MAX_DIFFERENCE = 1.0, 16.0


@dataclass(frozen=True)
class Finding:
    """One thing that was judged. ``remedy`` is None where nothing has to be done."""

    level: Level
    what: str
    remedy: str | None = None


def diagnose(facts: Facts) -> list[Finding]:
    """All findings about a machine, in the order in which to fix things."""
    return [finding for rule in _RULES for finding in rule(facts)]


def report(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """JSON-able: ``ok``, ``findings``, ``facts``."""
    return {
        "ok": all(finding.level != "problem" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "facts": asdict(facts),
    }


def render(facts: Facts, findings: list[Finding]) -> str:
    """The same as text for a person to read."""
    lines = [f"{'python':12}{facts.python}", f"{'nemo-dali':12}{facts.nemo_dali}"]
    for name, package in facts.packages.items():
        version = package.version or ("cannot be imported" if package.wheels else "not installed")
        built = f", CUDA {package.cuda}" if package.cuda else ""
        lines.append(f"{name:12}{version}{built}")
    for number, gpu in enumerate(facts.driver.gpus if facts.driver else ()):
        capability = ".".join(map(str, gpu.compute_capability))
        lines.append(f"{f'GPU {number}':12}{gpu.name}, compute capability {capability}, {gpu.memory / 2**30:.1f} GiB")
    lines.append("")
    for finding in findings:
        lines.append(f"{finding.level:9}{finding.what}")
        if finding.remedy is not None:
            lines.append(f"{'':9}-> {finding.remedy}")
    return "\n".join(lines)


def raise_problems(findings: list[Finding]) -> None:
    """Raise an error if there are problems.

    Raises:
        NemoError: names every problem and its remedy.
    """
    problems = [f"{finding.what} -> {finding.remedy}" for finding in findings if finding.level == "problem"]
    if problems:
        raise NemoError(f"{len(problems)} problem{'s' * (len(problems) > 1)} found. {'; '.join(problems)}")


# --- what fits -------------------------------------------------------------------------------------------------------


def fitting_extras(facts: Facts) -> tuple[int, ...]:
    """CUDA major versions whose packages run on this driver and on all GPUs; all of them where there is no GPU."""
    driver = facts.driver
    if driver is None or not driver.gpus:
        return tuple(MIN_DRIVER)
    weakest = min(gpu.compute_capability for gpu in driver.gpus)
    return tuple(major for major in MIN_DRIVER if major <= _major(driver.cuda) and MIN_CAPABILITY[major] <= weakest)


def best_extra(facts: Facts) -> int:
    """The CUDA major version to install: 13 if it fits and torch, or DALI if torch has no CUDA, is built for it."""
    built = _major(facts.packages["torch"].cuda or facts.packages["DALI"].cuda)
    return 13 if built == 13 and 13 in fitting_extras(facts) else 12


def _major(version: str | None) -> int:
    return int(version.split(".")[0]) if version else 0


def _has_gpu(facts: Facts) -> bool:
    return facts.driver is not None and bool(facts.driver.gpus)


def _install(major: int, *names: str) -> str:
    """The command that installs libraries for a CUDA major version."""
    wheels = [wheel.format(major) for name in names for wheel in FOR_CUDA.get(name) or [LIBRARIES[name]]]
    return f"pip install {shlex.join(_requirement(wheel, major) for wheel in wheels)}"


def _requirement(wheel: str, major: int) -> str:
    """A distribution with the extras and versions that this package requires, directly or by its extra for CUDA.

    Without versions if the package is not installed but run from its sources.
    """
    if wheel == "torch" and major == 13:
        return _requirement(wheel, 12).replace("<", ">=")  # wheels for CUDA 13 begin where those for 12 end
    try:
        required = requires("nemo-dali") or []
    except PackageNotFoundError:
        return wheel
    for extra in (f"cuda{major}", None):
        for one in required:
            found = re.fullmatch(r"([\w.-]+)(\[.*\])?([^;]*)(?:; extra == .(\w+).)?", one)
            if found is not None and normal_name(found[1]) == wheel and found[4] == extra:
                return found[1] + (found[2] or "") + ",".join(sorted(found[3].split(","), reverse=True))
    return wheel


# --- rules -----------------------------------------------------------------------------------------------------------


def _driver(facts: Facts) -> Iterator[Finding]:
    driver = facts.driver
    name = f"Driver {driver.version}" if driver and driver.version else "The driver"
    if driver is None:
        yield Finding("ok", "No NVIDIA driver: batches are made on the CPU.")
    elif driver.error is not None:
        yield Finding(
            "problem",
            f"The NVIDIA driver does not work: {driver.error}.",
            "Restart the machine if the driver was updated; give a container its GPUs (docker run --gpus all); check "
            "that nvidia-smi runs.",
        )
    elif not driver.gpus:
        yield Finding("ok", f"{name} shows no GPU to this process: batches are made on the CPU.")
    elif not (fits := fitting_extras(facts)):
        yield Finding(
            "problem",
            f"{name} supports CUDA up to {driver.cuda}, which neither cuda12 nor cuda13 can use.",
            " ".join(f"cuda{major} needs driver {least} or newer." for major, least in MIN_DRIVER.items()),
        )
    else:
        text = f"{name} supports CUDA up to {driver.cuda}: "
        text += " and ".join(f"cuda{major}" for major in fits) + (" fits." if len(fits) == 1 else " fit.")
        if len(fits) > 1:
            text += f" cuda{best_extra(facts)} is the one to install with this torch."
        yield Finding("ok", text)


def _packages(facts: Facts) -> Iterator[Finding]:
    target = best_extra(facts)
    for name, package in facts.packages.items():
        optional = name in ONLY_GPU and not _has_gpu(facts)
        install = _install(target, name)
        if len(package.wheels) > 1:
            yield Finding(
                "problem",
                f"{' and '.join(package.wheels)} are installed at once and overwrite each other's files.",
                f"pip uninstall -y {' '.join(package.wheels)} && {install}",
            )
        if not package.wheels and package.version is None:
            if name in OF_EXTRAS:
                extra, needed = OF_EXTRAS[name]
                remedy = f"pip install 'nemo-dali[{extra}]'"
                yield Finding("warning", f"{name} is not installed; {needed}.", remedy)
            elif optional:
                yield Finding("ok", f"{name} is not installed; without a GPU it is not needed.")
            else:
                yield Finding("problem", f"{name} is not installed.", install)
        elif package.error is not None:
            remedy = install.replace("install", "install --force-reinstall", 1)
            yield Finding("warning" if optional else "problem", f"{name} cannot be imported: {package.error}.", remedy)
    pillow = facts.packages["Pillow"]
    if _major(pillow.version) >= 13:
        yield Finding(
            "warning",
            '"pillow-bilinear" is that of Pillow up to 12; '
            f"Pillow {pillow.version} resamples some sizes in a different order.",
            _install(target, "Pillow"),
        )


def _agreement(facts: Facts) -> Iterator[Finding]:
    fits, target, driver = fitting_extras(facts), best_extra(facts), facts.driver
    torch = facts.packages["torch"]
    if torch.version is not None and torch.cuda is None and _has_gpu(facts):
        yield Finding("problem", f"torch {torch.version} is a build without CUDA.", _install(target, "torch"))
    built = {name: _major(facts.packages[name].cuda) for name in FOR_CUDA if facts.packages[name].cuda}
    if not fits or not built:
        return
    wrong = [name for name, major in built.items() if major != target]
    if not wrong:
        yield Finding("ok", f"For CUDA {target}: {', '.join(built)}.")
        return
    text = "; ".join(
        f"for CUDA {major}: {', '.join(name for name in built if built[name] == major)}"
        for major in sorted(set(built.values()))
    )
    wheels = [wheel for name in wrong if name in ("DALI", "CuPy") for wheel in facts.packages[name].wheels]
    # One command for all: they share CUDA's own packages, and one alone might not install beside the others.
    remedy = f"pip uninstall -y {shlex.join(wheels)} && " if wheels else ""
    remedy += _install(target, *FOR_CUDA)
    newest = max(built.values())
    if driver is None or not driver.gpus or newest <= fits[-1]:
        need = f": only driver {MIN_DRIVER[newest]} or newer runs them all" if newest in MIN_DRIVER else ""
        yield Finding("warning", f"Libraries are built for different CUDA versions ({text}){need}.", remedy)
    elif newest > _major(driver.cuda):
        if newest in MIN_DRIVER:
            remedy += f"  (or driver {MIN_DRIVER[newest]} or newer, and all for CUDA {newest})"
        yield Finding("problem", f"The driver supports CUDA up to {driver.cuda}, but {text}.", remedy)
    else:
        yield Finding("problem", f"CUDA {newest} has no code for a GPU of this machine, but {text}.", remedy)


def _compilers(facts: Facts) -> Iterator[Finding]:
    driver, gpu = facts.driver, _has_gpu(facts)
    for what, name, found in (("NVRTC", "CuPy", facts.nvrtc), ("NVVM and nvJitLink", "numba-cuda", facts.nvvm)):
        install = _install(best_extra(facts), name)
        if facts.packages[name].version is None:
            continue  # already reported
        if found.error is not None:
            text = f"{name} cannot compile kernels with {what}: {found.error}."
            yield Finding("problem" if gpu else "warning", text, install)
        elif gpu and driver is not None and fitting_extras(facts) and _major(found.value) > _major(driver.cuda):
            text = f"{name} compiles kernels for CUDA {found.value}, but the driver supports CUDA up to {driver.cuda}."
            yield Finding("problem", text, install)
        else:
            yield Finding("ok", f"{name} compiles kernels with {what} of CUDA {found.value}.")


def _limits(facts: Facts) -> Iterator[Finding]:
    if facts.shared_memory is not None:
        text = f"/dev/shm has {facts.shared_memory / 2**20:,.0f} MiB"
        if facts.shared_memory < MIN_SHARED_MEMORY:
            yield Finding(
                "warning",
                f"{text}: little for NCCL between GPUs and for DataLoader workers next to this loader.",
                "docker run --shm-size=1g, or mount -o remount,size=1G /dev/shm",
            )
        else:
            yield Finding("ok", f"{text}.")
    if facts.open_files is not None:
        cells = facts.open_files - OTHER_FILES
        text = f"A process may open {facts.open_files} files: batches of up to {max(cells, 0) // 4} 2x2 mosaics"
        if cells < MIN_CELLS:
            level: Level = "problem" if cells < 9 else "warning"
            yield Finding(level, f"{text}.", f"Raise the hard limit to {MIN_CELLS + OTHER_FILES} (ulimit -Hn) or more.")
        else:
            yield Finding("ok", f"{text}.")
    if facts.core_quota is not None and facts.core_quota < facts.cores:
        yield Finding(
            "warning",
            f"{facts.cores} cores are visible, but this container may use {facts.core_quota:g} of them.",
            f"Loader(num_threads={max(int(facts.core_quota), 1)}), shared among the ranks of the node",
        )
    else:
        yield Finding("ok", f"{facts.cores} core{'s' * (facts.cores > 1)} can be used.")
    if facts.cache.error is not None:
        yield Finding(
            "warning",
            f"Compiled kernels cannot be cached: {facts.cache.error}.",
            "Set NUMBA_CACHE_DIR to a persistent, writable folder of your own.",
        )
    elif facts.cache.value is None:
        yield Finding(
            "warning",
            "Compiled kernels are not cached: each start compiles for about 20 s.",
            "Set NUMBA_CACHE_DIR to a persistent folder of your own.",
        )
    else:
        yield Finding("ok", f"Compiled kernels are cached in {facts.cache.value}.")


def _pixels(facts: Facts) -> Iterator[Finding]:
    for which, found in facts.pixels.items():
        device, resample, photos = which.split()
        pipeline = f"A small pipeline on {device} ({resample}, {photos})"
        if device == "cuda" and not _has_gpu(facts):
            continue
        if found.error is not None:
            if not any(_stops(name, package, device) for name, package in facts.packages.items()):
                yield Finding(
                    "problem",
                    f"{pipeline} failed: {found.error}.",
                    "Do what the message says, or install the versions in constraints.txt.",
                )
            continue
        pixels: Pixels = found.value
        if pixels.exact:
            wrong = pixels.wrong_values
            text = f"{pixels.wrong_values:,} of {pixels.values:,} values and {pixels.wrong_mask:,} mask pixels"
        else:
            mean, largest = pixels.mean_difference, pixels.largest_difference
            wrong = mean > MAX_MEAN_DIFFERENCE or largest > MAX_DIFFERENCE
            text = (
                f"values by {mean:.2f} levels on average and {largest:.0f} at most, {pixels.wrong_mask:,} mask pixels"
            )
        if wrong or pixels.wrong_mask:
            kept, other = facts.cache.value or "the compiled kernels", "; until then use device='cpu'"
            yield Finding(
                "problem",
                f"{pipeline} gives wrong pixels (off: {text}).",
                f"Delete {kept}, or install the versions in constraints.txt{other if device != 'cpu' else ''}",
            )
        elif pixels.exact:
            yield Finding("ok", f"{pipeline} gives the right pixels, bit for bit.")
        else:
            yield Finding("ok", f"{pipeline} gives the right masks, and pixels as close as nvJPEG's (off: {text}).")


def _decoders(facts: Facts) -> Iterator[Finding]:
    found = facts.decoders
    if not _has_gpu(facts) or found == Answer():
        return
    if found.error is not None:
        if not any(_stops(name, package, "cuda") for name, package in facts.packages.items()):
            text = f"The pixels of a hardware decoder could not be compared: {found.error}."
            remedy = "Use Loader(hw_decoder_load=0) for runs that must be reproducible bit for bit."
            yield Finding("warning", text, remedy)
        return
    decoders: Decoders = found.value
    if decoders.differing:
        off, largest = f"{decoders.differing:,} of {decoders.values:,} values", decoders.largest_difference
        yield Finding(
            "ok",
            f"The hardware decoder's pixels differ from CUDA's: {off} are off, by {largest} levels at most. Which "
            "decoder takes a photo depends on the batches before: use Loader(hw_decoder_load=0) for runs that must be "
            "reproducible bit for bit.",
        )
    else:
        yield Finding("ok", "JPEGs decode to the same pixels whether or not a hardware decoder is used.")


def _stops(name: str, package: Package, device: str) -> bool:
    """Whether a missing or broken library, which is already reported, keeps a pipeline from running."""
    needed = name not in OF_EXTRAS and (device == "cuda" or name not in ONLY_GPU)
    return needed and package.version is None


_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _driver,
    _packages,
    _agreement,
    _compilers,
    _limits,
    _pixels,
    _decoders,
)
