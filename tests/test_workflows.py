"""What runs for commits, pushes and at night: targets of the Makefile, on the oldest Python that is taken."""

import re
import tomllib

import pytest
import yaml

from tests.helpers.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS, STEPS = (set(line.split()) for line in re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE))


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path):
    return [step for job in jobs(path).values() for step in job["steps"]]


def commands(*paths):
    return [line for path in paths for step in steps(path) for line in step.get("run", "").splitlines()]


def test_the_makefile_lists_the_targets_that_it_has():
    listed = re.match(r"# What a person needs: make ((?:[a-z -]+|\n# )+)", MAKEFILE)[1].replace("\n# ", " ").split()
    assert set(listed) == TARGETS and len(listed) == len(TARGETS)
    assert set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.MULTILINE)) == TARGETS | STEPS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_of_the_makefile_only(path):
    assert commands(path)
    for command in commands(path):
        make, *targets = command.split()
        assert make == "make" and targets and set(targets) <= TARGETS, command


def test_pushes_are_linted_documented_tested_and_packaged_and_nights_test_all():
    pushes, nights = (set(commands(ROOT / f".github/workflows/{name}.yml")) for name in ("checks", "nightly"))
    assert pushes >= {"make lint", "make docs", "make test", "make package"}
    assert nights >= {"make test-all"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_on_the_oldest_python_that_the_project_takes(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    found = [step["with"]["python-version"] for step in steps(path) if "setup-python" in step.get("uses", "")]
    assert found == [oldest] * len(jobs(path))
    assert f"Programming Language :: Python :: {oldest}" in project["classifiers"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read_and_end_in_time(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    for job in workflow["jobs"].values():
        assert "permissions" not in job and 0 < job["timeout-minutes"] <= 180
    used = re.findall(r"uses: *(.+)", path.read_text())
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in used), used


def test_commits_run_every_step_of_lint_and_nothing_else():
    assert set(re.search(r"^lint: (.+)$", MAKEFILE, re.MULTILINE)[1].split()) == STEPS
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    found = {hook["entry"].removeprefix("make "): hook for hook in local["hooks"]}
    assert set(found) == STEPS
    for hook in found.values():
        assert hook["language"] == "system" and hook["pass_filenames"] is False
