"""CONTRIBUTING.md, CITATION.cff and the forms name what exists."""

import re
import tomllib

import yaml

from tests.helpers.paths import ROOT

PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_targets_files_and_names_exist():
    targets = {name for command in re.findall(r"(?:`|    )make ([a-z -]+)(?:`|  )", PAGE) for name in command.split()}
    assert len(targets) > 6 and targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for path in re.findall(r"[` ](tests/[\w/]+\.py)\b", PAGE):
        assert (ROOT / path).exists() or "/NAME/" in path or "_NAME." in path, path
    linked = "".join((ROOT / path).read_text("utf-8") for path in re.findall(r"\]\(([\w/]+\.(?:py|toml))\)", PAGE))
    for name in re.findall(r"`([a-zA-Z_]\w+)`", PAGE):
        assert name in linked, name


def test_limits_are_those_that_are_held():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    structure = (ROOT / "tests/test_structure.py").read_text()
    lines = int(re.search(r"MOST_LINES = \d+, (\d+)", structure)[1])
    of_loader = int(re.search(r"MOST_LINES_OF_LOADER = (\d+)", structure)[1])
    statements, parameters = lint["pylint"]["max-statements"], lint["pylint"]["max-args"]
    rule = f"at most {lines} lines, one of `loader/` {of_loader}; a function at most {statements} statements and"
    assert f"{rule} {parameters} parameters" in PAGE


def test_a_bug_comes_with_what_the_doctor_says():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    (field,) = (one for one in form["body"] if "nemo-dali doctor" in one["attributes"].get("label", ""))
    assert field["validations"]["required"]


def test_who_cites_the_package_cites_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["authors"] == [{"name": "nemo-dali developers"}]
    assert "version" not in citation  # it stands in nemo_dali/_version.py alone
    (paper,) = citation["references"]
    assert [one["value"] for one in paper["identifiers"]] == ["arXiv:2411.01494"] and len(paper["authors"]) == 6
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"] and project["description"] in citation["title"]
