"""C++ that tests need, built once and kept until a source changes."""

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
CACHE = ROOT / ".pytest_cache" / "built"


def built(sources, command):
    """The path of what a compiler builds from sources.

    Args:
        sources: texts by the file names that they are given.
        command: run in a folder that holds them; ``-o`` and the output's name are added.
    """
    parts = [*command, *(part for name in sorted(sources) for part in (name, sources[name]))]
    path = CACHE / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:  # one process builds what several need
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                for name, text in sources.items():
                    (Path(folder) / name).write_text(text)
                run = subprocess.run([*command, "-o", "output"], cwd=folder, capture_output=True, text=True)
                assert run.returncode == 0, run.stderr
                (Path(folder) / "output").rename(path)
    return path
