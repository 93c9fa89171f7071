"""How kernels are compiled: said while it happens, and once."""

import logging
import shutil

import pytest

from nemo_dali.commands.options import _log
from nemo_dali.kernels import jit

KERNEL = """
from nemo_dali.kernels.jit import jit
@jit()
def twice(x): return x + x
@jit()
def thrice(x): return x + x + x
"""


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A function that makes two kernels as a process does that starts, its cache in a folder of its own."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "some_kernels.py"
    path.write_text(KERNEL)

    def start():
        jit._report_once.cache_clear()
        names = {}
        exec(compile(path.read_text(), path, "exec"), names)
        return names["twice"], names["thrice"]

    yield start
    jit._report_once.cache_clear()


def test_it_is_said_that_kernels_compile_and_not_where_they_come_from_the_cache(kernels, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nemo_dali.kernels")
    for begun in range(3):
        if begun == 2:
            shutil.rmtree(tmp_path / "cache")
        caplog.clear()
        twice, thrice = kernels()
        assert (twice(2), thrice(2), twice(2.5)) == (4, 6, 5.0)
        assert caplog.text.count("Compiling kernels for this machine") == (begun != 1)


def test_commands_say_so_without_being_asked(monkeypatch):
    monkeypatch.setattr(jit.logger, "level", logging.NOTSET)
    _log(False)
    assert jit.logger.getEffectiveLevel() == logging.INFO
