"""What docs/effect.md says of the study, made from the recorded runs alone.

python benchmarks/effect_report.py [PAGE.md]     writes its tables and figures anew from benchmarks/results/effect.json
"""

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT
from effect_study import FOLLOW_UPS
from matplotlib import pyplot as plt
from PIL import Image
from plots import INK, STYLE, save
from pycocotools import mask as coco_mask

from nemo_dali.synthetic import make_photo

PAGE = ROOT / "docs" / "effect.md"
BEGIN, END = "<!-- {} from benchmarks/results/effect.json -->\n", "<!-- end -->\n"
PARTS = {"training": "training", "easy": "evaluation", "hard": "evaluation, hard", "for_clip": "CLIP's training"}
COLOURS = {
    "single": INK,
    "random": "#2da44e",
    "unbounded": "#e8833a",
    "tuned": "#3b8eea",
    "cropped": "#a06ee1",
    "oracle": "#d4a72c",
    "false": "#cf222e",
    "later": "#1b7c83",
}
MEASURES = {"P@0.5": "hits", "misses": "misses", "mIoU": "iou"}  # points of a hundred; quotients by the samples
T_975 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
HARD = 2  # distractors, from which on a sample is a hard one


def recorded(study: str = "main") -> Path:
    """Where the runs of one of ``STUDIES`` are kept."""
    return RESULTS / ("effect.json" if study == "main" else f"effect-{study}.json")


def read() -> dict[str, Any]:
    """The main study's record with those of its follow-ups, as far as there are any."""
    paths = {name: recorded(name) for name in FOLLOW_UPS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    record: dict[str, Any] = json.loads(recorded().read_text())
    return record | {"follow_ups": found}


def value(rows: list[dict[str, Any]], measure: str) -> float:
    """A measure over groups of samples, in points of a hundred; NaN without any."""
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
    """The groups of a run: of one kind of expression, with one number of distractors, or with ``HARD`` at least."""
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


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of the 95 % t interval; infinite for fewer than two values."""
    n = len(values)
    half = float(T_975[min(n, len(T_975)) - 1] * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return float(values.mean()) if n else math.nan, half


def difference(one: dict[int, float], other: dict[int, float]) -> tuple[float, float, int]:
    """Mean of one less the other, paired by seed, half its 95 % t interval, and the number of pairs."""
    seeds = sorted(one.keys() & other.keys())
    return *interval(np.array([one[seed] - other[seed] for seed in seeds])), len(seeds)


# --- tables -----------------------------------------------------------------------------------------------------------


def arms_of(record: dict[str, Any]) -> list[str]:
    """The arms that have runs, in the study's order."""
    ran = {run["arm"] for run in record["runs"]}
    return [arm for arm in record["study"]["arms"] if arm in ran]


def levels(record: dict[str, Any]) -> list[int]:
    """Numbers of distractors that occur."""
    return sorted({row["distractors"] for run in record["runs"] for row in run["single"]})


def _points(mean: float, half: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{mean:{sign}.1f}" if math.isinf(half) else f"{mean:{sign}.1f} ± {half:.1f}"


def outcome_table(record: dict[str, Any]) -> str:
    """Every arm: shares of the negatives drawn that are false, or of the target's kind, and what it scores."""
    lines = [
        "| arm | runs | false | same kind | P@0.5, hard | misses, hard | P@0.5 | mIoU | oIoU | P@0.5 in mosaics |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("single", "P@0.5", {"hard": True}),
        ("single", "misses", {"hard": True}),
        ("single", "P@0.5", {}),
        ("single", "mIoU", {}),
        ("single", "oIoU", {}),
        ("mosaic", "P@0.5", {}),
    ]
    for arm in arms_of(record):
        drawn = record["data"]["negatives"].get(arm)
        cells = [
            arm,
            str(sum(run["arm"] == arm for run in record["runs"])),
            *([f"{drawn['words']:.0%}", f"{drawn['category']:.0%}"] if drawn else ["", ""]),
        ]
        for where, measure, which in asked:
            values = by_seed(record, arm, where, measure, **which)
            cells.append(_points(*interval(np.array([values[seed] for seed in sorted(values)]))))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def difference_table(record: dict[str, Any]) -> str:
    """Every arm's P@0.5 less that of single photos, by the number of distractors."""
    columns: dict[str, dict[str, Any]] = {"all": {}}
    columns |= {f"{number} distractors": {"distractors": number} for number in levels(record)}
    return _less_single(record, columns | {f"{HARD} and more": {"hard": True}})


def kinds_table(record: dict[str, Any]) -> str:
    """The same on hard samples, by the kind of expression."""
    kinds = dict.fromkeys(row["kind"] for run in record["runs"] for row in run["single"])
    return _less_single(record, {f"{kind}, hard": {"kind": kind, "hard": True} for kind in kinds})


def _less_single(record: dict[str, Any], columns: dict[str, dict[str, Any]]) -> str:
    """A row an arm; columns by name, with what ``chosen`` takes."""
    lines = [
        f"| P@0.5 less that of single | {' | '.join(columns)} |",
        f"| {' | '.join(['---'] * (len(columns) + 1))} |",
    ]
    for arm in arms_of(record):
        if arm != "single":
            cells = [arm]
            for which in columns.values():
                one, single = (by_seed(record, name, "single", "P@0.5", **which) for name in (arm, "single"))
                mean, half, _ = difference(one, single)
                cells.append(_points(mean, half, signed=True))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


ASKED = (  # by question of the page: an arm, and another that it is compared with
    (1, "tuned", "single"),
    (1, "tuned", "random"),
    (3, "oracle", "unbounded"),
    (3, "false", "oracle"),
    (4, "cropped", "unbounded"),
    (4, "cropped", "oracle"),
    (5, "later", "tuned"),
)
MORE = (2, "tuned", "single")  # whether what is gained there is more on hard samples than on the others


def answers(record: dict[str, Any]) -> str:
    """The page's questions, answered by the rule that stands above them."""
    lines = ["| question | P@0.5 on hard samples | difference | so |", "| --- | --- | --- | --- |"]
    for question, one, other in sorted([*ASKED, MORE]):
        label, words = f"{one} less {other}", ("better", "worse")
        found = difference(*(by_seed(record, arm, "single", "P@0.5", hard=True) for arm in (one, other)))
        if (question, one, other) == MORE:
            label, words = f"{label}, less the same on the other samples", ("larger", "smaller")
            found = _more_with_distractors(record)
        mean, half, pairs = found
        if pairs:
            verdict = words[0] if mean > half else words[1] if mean < -half else "nothing is claimed"
            lines.append(f"| {question} | {label} | {_points(mean, half, signed=True)} | {verdict} |")
    return "\n".join([*lines, ""])


def _more_with_distractors(record: dict[str, Any]) -> tuple[float, float, int]:
    """By how much what tuned gains over single is larger on hard samples than on the others."""
    gains = []
    for hard in (True, False):
        tuned, single = (by_seed(record, arm, "single", "P@0.5", hard=hard) for arm in ("tuned", "single"))
        gains.append({seed: tuned[seed] - single[seed] for seed in tuned.keys() & single.keys()})
    return difference(*gains)


# --- figures ----------------------------------------------------------------------------------------------------------


def plot_distractors(record: dict[str, Any], output: Path) -> None:
    """What each arm gains over single photos, by the number of distractors, with 95 % intervals."""
    numbers, arms = levels(record), [arm for arm in arms_of(record) if arm != "single"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
        axes.axhline(0, color=INK, linewidth=1)
        for place, arm in enumerate(arms):
            found = [
                difference(*(by_seed(record, name, "single", "P@0.5", distractors=n) for name in (arm, "single")))
                for n in numbers
            ]
            x = [n + 0.8 * (place - (len(arms) - 1) / 2) / len(arms) for n in numbers]
            halves = [half if math.isfinite(half) else 0.0 for _, half, _ in found]
            axes.errorbar(x, [mean for mean, _, _ in found], halves, fmt="o", capsize=2, label=arm, color=COLOURS[arm])
        axes.set_xticks(numbers)
        axes.set_xlabel("distractors in the photo")
        axes.set_ylabel("P@0.5 less that of single photos, points")
        axes.legend(frameon=False, ncols=min(len(arms), 4), loc="upper center", bbox_to_anchor=(0.5, 1.2))
    save(figure, output)


def plot_false_negatives(record: dict[str, Any], output: Path) -> None:
    """P@0.5 on hard samples over the rate of false negatives among the negatives drawn; single photos as a line."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
        for arm in arms_of(record):
            values = by_seed(record, arm, "single", "P@0.5", hard=True)
            mean, half = interval(np.array(list(values.values())))
            half = half if math.isfinite(half) else 0.0
            drawn = record["data"]["negatives"].get(arm)
            if drawn is None:
                axes.axhline(mean, color=COLOURS[arm], linewidth=1)
                axes.axhspan(mean - half, mean + half, color=COLOURS[arm], alpha=0.15, linewidth=0)
                axes.annotate(arm, (1, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom")
            else:
                axes.errorbar(100 * drawn["words"], mean, half, fmt="o", capsize=2, color=COLOURS[arm])
                axes.annotate(arm, (100 * drawn["words"], mean), xytext=(5, 4), textcoords="offset points")
        axes.set_xlabel("negatives that hold what the sentence says, %")
        axes.set_ylabel(f"P@0.5 with {HARD} distractors and more")
    save(figure, output)


def plot_scenes(record: dict[str, Any], output: Path, *, count: int = 6) -> None:
    """Hard scenes with what the arms found, of the first seed: those on which the arms differ most."""
    scenes = record["data"]["scenes"]
    kept = {run["arm"]: run["masks"] for run in record["runs"] if run["seed"] == record["study"]["seeds"][0]}
    arms = [arm for arm in arms_of(record) if arm in kept]
    spread = {key: np.std([kept[arm][key]["iou"] for arm in arms]) for key in scenes}
    shown = sorted(scenes, key=lambda key: (-spread[key], int(key)))[:count]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(shown),
            len(arms) + 1,
            figsize=(1.5 * (len(arms) + 1), 1.62 * len(shown)),
            layout="constrained",
            squeeze=False,
        )
        for row, key in zip(axes, shown, strict=True):
            scene = scenes[key]
            photo = np.asarray(_photo(record, scene["image_id"]).resize((record["study"]["size"],) * 2))
            for place, (cell, arm) in enumerate(zip(row, ["target", *arms], strict=True)):
                counts = kept[arms[0]][key]["target"] if arm == "target" else kept[arm][key]["found"]
                mask = coco_mask.decode({"size": [record["study"]["size"]] * 2, "counts": counts.encode()})
                cell.imshow(np.where(mask[..., None] > 0, photo, (0.35 * photo + 160 * 0.65).astype(np.uint8)))
                cell.set_xticks([])
                cell.set_yticks([])
                cell.grid(False)
                if row is axes[0]:
                    cell.set_title(arm, fontsize=8)
                if place:
                    cell.set_xlabel(f"IoU {kept[arm][key]['iou']:.2f}", fontsize=7, labelpad=1)
                else:
                    cell.set_xlabel("\n".join(textwrap.wrap(scene["sentence"], 24)), fontsize=7, labelpad=1)
    save(figure, output)


def _photo(record: dict[str, Any], image_id: int) -> Image.Image:
    """A photo of the evaluation, generated anew."""
    scenes = record["study"]["hard"]
    options = {"distractors": tuple(scenes["distractors"]), "expressions": scenes["expressions"]}
    return make_photo(seed=scenes["seed"], number=image_id - 1, **options).image.convert("RGB")


# --- the page ---------------------------------------------------------------------------------------------------------


def data_table(record: dict[str, Any]) -> str:
    """The photos of the study."""
    lines = ["| | photos | refs | sentences | refs with 0, 1, 2, 3 distractors |", "| --- | --- | --- | --- | --- |"]
    for part, label in PARTS.items():
        found = record["data"][part]
        counts = ", ".join(f"{count:,}" for count in found["refs_by_distractors"])
        lines.append(f"| {label} | {found['photos']:,} | {found['refs']:,} | {found['sentences']:,} | {counts} |")
    tuned = record["data"]["tuned"]
    lines += ["", f"`tune` proposes tau {tuned['max_similarity']:g} and K {tuned['top_k']}."]
    return "\n".join([*lines, ""])


def effort(record: dict[str, Any]) -> str:
    """How many runs of what length, where."""
    runs, here = record["runs"], record["machine"]
    steps = sorted({run["steps"] for run in runs})
    minutes = [run["seconds"] / 60 for run in runs]
    revisions = ", ".join(dict.fromkeys(run["revision"] for run in runs))
    cpus = " or ".join(dict.fromkeys(run.get("cpu", here["cpu"]) for run in runs))
    planned = len(record["study"]["arms"]) * len(record["study"]["seeds"])
    count = f"{planned} runs" if len(runs) == planned else f"{len(runs)} of {planned} runs so far"
    return (
        f"{count}, of {' or '.join(f'{n:,}' for n in steps)} steps, {min(minutes):.0f} to {max(minutes):.0f} minutes "
        f"each, {sum(minutes) / 60:.1f} hours in all, on {here['cores']} cores ({cpus}); revisions {revisions}.\n"
    )


def follow_ups(record: dict[str, Any]) -> str:
    """The main study's tuned mosaics beside the follow-ups', with what they are compared with and where they ran."""
    lines = [
        "| study | frames | in mosaics | pairs | single, hard | P@0.5, hard | less single | P@0.5 in mosaics |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    studies = {"main": record} | record["follow_ups"]
    for name, other in studies.items():
        base = other if "single" in arms_of(other) else record  # the same seeds, steps and photos
        for arm in arms_of(other) if name != "main" else ("tuned",):
            if arm == "single":
                continue
            one = by_seed(other, arm, "single", "P@0.5", hard=True)
            single = {
                seed: found
                for seed, found in by_seed(base, "single", "single", "P@0.5", hard=True).items()
                if seed in one
            }
            mosaics = by_seed(other, arm, "mosaic", "P@0.5")
            mean, half, pairs = difference(one, single)
            cells = [
                name,
                f"{other['study']['size']} pixels",
                f"{other['study']['arms'][arm]['share']:.0%}",
                str(pairs),
                *(_points(*interval(np.array(list(values.values())))) for values in (single, one)),
                _points(mean, half, signed=True),
                _points(*interval(np.array(list(mosaics.values())))),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"*{name}*: {effort(other)}" for name, other in record["follow_ups"].items())])


TABLES: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("data", data_table),
    ("effort", effort),
    ("answers", answers),
    ("outcome", outcome_table),
    ("differences", difference_table),
    ("kinds", kinds_table),
    ("follow-ups", follow_ups),
]
FIGURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "effect-distractors.svg": plot_distractors,
    "effect-false-negatives.svg": plot_false_negatives,
    "effect-scenes.jpg": plot_scenes,
}


def rewritten(text: str, record: dict[str, Any]) -> str:
    """The page with every table made anew."""
    for name, make in TABLES:
        begin = BEGIN.format(name)
        made = f"{begin}\n{make(record)}\n{END}".replace("\\", r"\\")
        text = re.sub(f"{re.escape(begin)}.*?{END}", made, text, flags=re.DOTALL)
    return text


def write_page(record: dict[str, Any], page: Path = PAGE) -> None:
    """Put the tables into the page, and the figures beside it."""
    page.write_text(rewritten(page.read_text("utf-8"), record), "utf-8")
    for name, draw in FIGURES.items():
        draw(record, page.parent / name)


if __name__ == "__main__":
    write_page(read(), Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE)
