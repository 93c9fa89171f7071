"""Each target installs what it needs and no more, once, in the versions of constraints.txt."""

import os
import re
import subprocess
import tomllib

import pytest

from tests.helpers.paths import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NEEDS = {
    "demo": ["cuda12,mining,report"],
    "test": ["cuda12,test"],
    "test-all": ["cuda12,test"],
    "lint": ["cuda12,lint"],
    "format": ["cuda12,lint"],
    "docs": ["docs"],
    "lint test-all": ["cuda12,lint", "cuda12,test"],  # .ci/run
    "install": ["cuda12,mining,report", "cuda12,test", "cuda12,lint", "docs"],
}


def would_run(targets, venv):
    """The commands of make, which are not run."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-n", f"VENV={venv}", *targets.split()]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.process
@pytest.mark.parametrize("targets", NEEDS)
def test_a_target_installs_what_it_needs_once(targets, tmp_path):
    first = would_run(targets, tmp_path / "venv")
    assert re.findall(r"-c constraints\.txt -e '\.\[(.*)\]'", first) == NEEDS[targets]
    assert first.count("-m venv") == 1 and "--quiet" not in first
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").touch()
    for stamp in re.findall(r"^touch (.+)$", first, re.MULTILINE):
        (tmp_path / stamp).touch()
    again = would_run(targets, tmp_path / "venv")
    assert "pip install" not in again and "-m venv" not in again


def test_the_extras_that_are_installed_exist_and_dev_is_all_of_them():
    named = {extra for needs in NEEDS.values() for need in needs for extra in need.split(",")}
    assert named <= set(EXTRAS)
    assert EXTRAS["dev"] == ["nemo-dali[docs,lint,test]"]


def test_what_developers_need_has_its_version():
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    pinned = {re.sub("[-_.]+", "-", name).lower() for name in pinned}
    for extra in ("test", "lint", "docs"):
        for requirement in EXTRAS[extra]:
            name = re.match(r"[\w.-]+", requirement)[0]
            if name not in ("nemo-dali", "setuptools"):
                assert re.sub("[-_.]+", "-", name).lower() in pinned, name
