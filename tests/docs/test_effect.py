"""What docs/effect.md says of the study is what benchmarks/results/effect.json says."""

import importlib
import re
import sys

import pytest

from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # where a script finds what it shares with others
report = importlib.import_module("effect_report")
studies = importlib.import_module("effect_study").STUDIES
RECORDED = importlib.import_module("effect_numbers").read()
RECORDS = {"main": RECORDED} | RECORDED["follow_ups"]
PAGE = report.PAGE.read_text("utf-8")


def test_the_pages_tables_are_those_of_the_record():
    for name, _ in report.TABLES:
        assert PAGE.count(report.BEGIN.format(name)) == 1
    assert PAGE.count(report.END) == len(report.TABLES) and report.rewritten(PAGE, RECORDED) == PAGE
    assert all(f"]({name})" in PAGE and (report.PAGE.parent / name).is_file() for name in report.FIGURES)


@pytest.mark.parametrize("name", RECORDS)
def test_runs_are_of_the_design_that_stands_in_the_code(name):
    assert RECORDS[name]["design"] == studies[name].digest()
    runs = RECORDS[name]["runs"]
    assert len({(run["arm"], run["seed"]) for run in runs}) == len(runs)
    assert len({(run["steps"], run["samples"]) for run in runs}) == 1
    assert {run["arm"] for run in runs} == set(studies[name].arms) and all(
        re.fullmatch("[0-9a-f]{7,}", run["revision"]) for run in runs
    )
