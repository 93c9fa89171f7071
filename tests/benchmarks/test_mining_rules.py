"""The comparison of mining's rules, once in small, and what its curves are by definition."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import ROOT


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks" / "mining_rules.py"), run_name="benchmark")


class _Trial:
    photos = 40

    def __init__(self):
        rng = np.random.default_rng(0)
        self.own = np.arange(9)
        self.shown = rng.random((9, 40)) < 0.5
        self.fits = self.shown & (rng.random((9, 40)) < 0.4)
        self.ranked, self.bounded = (rng.standard_normal((9, 40)).astype(np.float32) for _ in range(2))


def test_a_curve_is_of_the_first_k_photos_that_a_bound_leaves(rules):
    trial = _Trial()
    bounds, size, shown, fits = rules["curve"](trial, trial.ranked, trial.bounded, 5)
    flat = np.sort(trial.bounded[~np.eye(9, 40, dtype=bool)])
    out = np.geomspace(1, 0.8 * 40, len(size) - 1) * 9
    assert bounds.tolist() == [np.inf, *flat[(len(flat) - 1 - out).astype(int)]]
    for t, bound in enumerate(bounds):
        for row in range(9):
            order = [p for p in np.argsort(-trial.ranked[row]) if p != row and trial.bounded[row, p] <= bound][:5]
            assert size[t, row] == len(order)
            if order:
                assert shown[t, row] == pytest.approx(trial.shown[row, order].mean())
                assert fits[t, row] == pytest.approx(trial.fits[row, order].mean())


def test_rates_are_read_where_a_curve_comes_down_to_a_hardness(rules):
    hardness = np.array([[0.8, 0.6, 0.4, 0.5, 0.2]])
    rate = np.array([[0.5, 0.3, 0.1, 0.9, 0.0]])
    for wanted, found in ((0.7, 0.4), (0.5, 0.2), (0.3, 0.3), (0.2, 0.0)):
        assert rules["at"](hardness, rate, wanted)[0] == pytest.approx(found)
    assert np.isnan(rules["at"](hardness, rate, 0.9)[0]) and np.isnan(rules["at"](hardness, rate, 0.1)[0])


@pytest.mark.slow
def test_it_compares_every_rule(tmp_path):
    small = ["--training-images", 40, "--images", 40, "--steps", 2, "--sentences", 30, "--top-k", 5]
    script = ROOT / "benchmarks" / "mining_rules.py"
    command = [sys.executable, script, tmp_path / "work", *small, "--sets", "attribute", "--output", tmp_path]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "mining_rules.json").read_text())
    for every in (found["attribute"]["rules"][name]["5"] for name in ("whole", "windows")):
        assert {"tau", "below own", "crops, below own", "things, below target", "the truth"} <= set(every)
        for rule in every.values():
            assert all(0 <= share <= 1 for point in rule.get("curve", ()) for share in point[1:])
        assert len(every["tau"]["curve"]) > 20
    for policy in found["attribute"]["known"]["whole"]:
        assert policy["false"] <= policy["shown"]
    found = found["attribute"]
    assert found["config"]["images"] == 40 and found["revision"] and found["machine"]["cores"] > 0
