"""What ``gpu_check.py`` says about where it ran, found by Python alone: reporting a broken package is up to a stage."""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("nemo_dali", "kernels", "benchmarks", "tests")
ENDS = {".py", ".cu", ".cuh", ".cpp", ".hpp", ".json", ".html"}
PACKAGES = r"nvidia-dali-cuda\d+|cupy-cuda\d+x|torch|numba|numba-cuda|numpy|pytest|hypothesis"
DEADLINE = 60  # seconds for the driver to answer


def first_gpu() -> dict[str, str]:
    """Name of the first GPU, the driver's version and the newest CUDA that it supports; empty if there is no GPU.

    A driver may hang or end the process that asks it, so another process does.
    """
    code = (
        "import json; from nemo_dali.commands.doctor.driver import read_driver; d = read_driver(); "
        "print(json.dumps({'device': d.gpus[0].name, 'driver': d.version, 'cuda': d.cuda} if d and d.gpus else {}))"
    )
    try:
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
        found: dict[str, str] = json.loads(run.stdout or "{}")
    except (subprocess.TimeoutExpired, ValueError):
        return {}
    return found


def folder_name(device: str) -> str:
    """A device's name in lower-case letters, digits and hyphens."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") or "unnamed"


def digest_of_sources() -> str:
    """Digest of the names and contents of all source files; the same for two checkouts of the same revision."""
    digest = hashlib.sha256()
    for path in source_files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def source_files() -> list[Path]:
    """All files that decide what the stages do, except packages."""
    found = [
        path
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in ENDS and path.is_file() and "results" not in path.parts and "__pycache__" not in path.parts
    ]
    return sorted([*found, ROOT / "pyproject.toml"])


def revision_of() -> str:
    """What git calls the sources, with a plus sign if they were changed; without git, the digest of the sources."""
    if shutil.which("git") is not None:
        command = ["git", "describe", "--always", "--dirty=+"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode == 0 and run.stdout.strip():
            return run.stdout.strip()
    return f"sources {digest_of_sources()}"


def packages() -> dict[str, str]:
    """Versions of Python and packages, and a digest of all of them, from their metadata alone: none is imported."""
    installed: dict[str, str] = {}
    for one in distributions():  # in the order of sys.path: the first is the one that is imported
        installed.setdefault(re.sub("[-_.]+", "-", one.metadata["Name"] or "").lower(), one.version)
    found = {name: installed[name] for name in sorted(installed) if re.fullmatch(PACKAGES, name)}
    every = hashlib.sha256(repr(sorted(installed.items())).encode()).hexdigest()[:16]
    return {"python": platform.python_version(), **found, "all packages": every}
