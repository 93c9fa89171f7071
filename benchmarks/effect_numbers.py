"""The recorded runs of the study of docs/effect.md, and the measures and intervals that are computed from them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS
from effect_study import FOLLOW_UPS

MEASURES = {"P@0.5": "hits", "misses": "misses", "mIoU": "iou"}  # in percent; sums divided by the number of samples
T_975 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
HARD = 2  # a sample with at least this many distractors is hard


def recorded(study: str = "main") -> Path:
    """Where the runs of one of ``STUDIES`` are kept, and what ``effect_cells.py`` found ("cells")."""
    return RESULTS / ("effect.json" if study == "main" else f"effect-{study}.json")


def read() -> dict[str, Any]:
    """The main study's record, with those of the follow-ups that exist and what was found in cells."""
    paths = {name: recorded(name) for name in (*FOLLOW_UPS, "cells")}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    record: dict[str, Any] = json.loads(recorded().read_text())
    return record | {"cells": found.pop("cells", {"runs": []}), "follow_ups": found}


def value(rows: list[dict[str, Any]], measure: str) -> float:
    """A measure over groups of samples, in percent; NaN without samples."""
    if measure == "oIoU":
        return 100 * _ratio(sum(row["intersection"] for row in rows), sum(row["union"] for row in rows))
    return 100 * _ratio(sum(row[MEASURES[measure]] for row in rows), sum(row["samples"] for row in rows))


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def chosen(
    run: dict[str, Any],
    where: str,
    *,
    kind: str | None = None,
    distractors: int | None = None,
    hard: bool | None = None,
) -> list[dict[str, Any]]:
    """The groups of a run: of one kind of expression, with one number of distractors, or with at least ``HARD``."""
    return [
        row
        for row in run[where]
        if kind in (None, row["kind"])
        and distractors in (None, row["distractors"])
        and hard in (None, row["distractors"] >= HARD)
    ]


def by_seed(record: dict[str, Any], arm: str, where: str, measure: str, **which: Any) -> dict[int, float]:
    """A measure of an arm's runs."""
    return {run["seed"]: value(chosen(run, where, **which), measure) for run in record["runs"] if run["arm"] == arm}


def singles_of(record: dict[str, Any], main: dict[str, Any], measure: str = "P@0.5") -> dict[int, float]:
    """A measure on hard samples of a study's single photos, or the main study's: the same seeds, steps and photos."""
    return by_seed(record if "single" in arms_of(record) else main, "single", "single", measure, hard=True)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of the 95 % t interval; infinite for fewer than two values."""
    n = len(values)
    half = float(T_975[min(n, len(T_975)) - 1] * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return float(values.mean()) if n else math.nan, half


def difference(one: dict[int, float], other: dict[int, float]) -> tuple[float, float, int]:
    """Mean of one less the other, paired by seed, half the width of its 95 % t interval, and the number of pairs."""
    seeds = sorted(one.keys() & other.keys())
    return *interval(np.array([one[seed] - other[seed] for seed in seeds])), len(seeds)


def arms_of(record: dict[str, Any]) -> list[str]:
    """The arms that have runs, in the study's order."""
    ran = {run["arm"] for run in record["runs"]}
    return [arm for arm in record["study"]["arms"] if arm in ran]


def levels(record: dict[str, Any]) -> list[int]:
    """The numbers of distractors that occur."""
    return sorted({row["distractors"] for run in record["runs"] for row in run["single"]})
