"""What docs/effect.md says about the study, made from the recorded runs alone.

python benchmarks/effect_report.py [PAGE.md]     rewrites its tables and figures from benchmarks/results/effect.json
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT
from effect_figures import plot_distractors, plot_false_negatives, plot_scenes, plot_summary
from effect_numbers import HARD, arms_of, by_seed, difference, interval, levels, read, singles_of

PAGE = ROOT / "docs" / "effect.md"
BEGIN, END = "<!-- {} from benchmarks/results/effect.json -->\n", "<!-- end -->\n"
PARTS = {"training": "training", "easy": "evaluation", "hard": "evaluation, hard", "for_clip": "CLIP's training"}


def _points(mean: float, half: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{mean:{sign}.1f}" if math.isinf(half) else f"{mean:{sign}.1f} ± {half:.1f}"


def outcome_table(record: dict[str, Any]) -> str:
    """Every arm: the shares of its drawn negatives that are false or of the target's kind, and its scores."""
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
    """One row per arm; columns by name, with what ``chosen`` takes."""
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


ASKED = (  # the number of a question of the page, an arm, and the arm it is compared with
    (1, "tuned", "single"),
    (1, "tuned", "random"),
    (3, "oracle", "unbounded"),
    (3, "false", "oracle"),
    (4, "cropped", "unbounded"),
    (4, "cropped", "oracle"),
    (5, "later", "tuned"),
)
MORE = (2, "tuned", "single")  # whether the gain there is larger on hard samples than on the others


def answers(record: dict[str, Any]) -> str:
    """The page's questions, answered by the rule given above them."""
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
    """How much more tuned gains over single on hard samples than on the others."""
    gains = []
    for hard in (True, False):
        tuned, single = (by_seed(record, arm, "single", "P@0.5", hard=hard) for arm in ("tuned", "single"))
        gains.append({seed: tuned[seed] - single[seed] for seed in tuned.keys() & single.keys()})
    return difference(*gains)


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
    """How many runs there were, how long they took, and where."""
    runs, here = record["runs"], record["machine"]
    steps = sorted({run["steps"] for run in runs})
    hours = [run["seconds"] / 3600 for run in runs]
    minutes = " to ".join(dict.fromkeys(f"{60 * end(hours):.0f}" for end in (min, max)))
    revisions = ", ".join(dict.fromkeys(run["revision"] for run in runs))
    cpus = " or ".join(dict.fromkeys(run.get("cpu", here["cpu"]) for run in runs))
    planned = len(record["study"]["arms"]) * len(record["study"]["seeds"])
    count = f"{planned} runs" if len(runs) == planned else f"{len(runs)} of {planned} runs so far"
    return (
        f"{count}, of {' or '.join(f'{n:,}' for n in steps)} steps, {minutes} minutes each, "
        f"{sum(hours):.1f} hours in all, on {here['cores']} cores ({cpus}) that other work shared at times; "
        f"revisions {revisions}.\n"
    )


def follow_ups(record: dict[str, Any]) -> str:
    """The main study's tuned mosaics beside the follow-ups', with what they are compared with and where they ran."""
    lines = [
        "| study | frames | arm | in mosaics | pairs | single | less single | misses less single | P@0.5 in mosaics |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    studies = {"main": record} | record["follow_ups"]
    for name, other in studies.items():
        for arm in arms_of(other) if name != "main" else ("tuned",):
            if arm == "single":
                continue
            hits, misses = (by_seed(other, arm, "single", measure, hard=True) for measure in ("P@0.5", "misses"))
            single = {seed: found for seed, found in singles_of(other, record).items() if seed in hits}
            mosaics = by_seed(other, arm, "mosaic", "P@0.5")
            mean, half, pairs = difference(hits, single)
            cells = [
                name,
                f"{other['study']['size']} pixels",
                arm,
                f"{other['study']['arms'][arm]['share']:.0%}",
                str(pairs),
                _points(*interval(np.array(list(single.values())))),
                _points(mean, half, signed=True),
                _points(*difference(misses, singles_of(other, record, "misses"))[:2], signed=True),
                _points(*interval(np.array(list(mosaics.values())))),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"*{name}*: {effort(other)}" for name, other in record["follow_ups"].items())])


def cells_table(record: dict[str, Any]) -> str:
    """What models find of hard samples that are blurred, small, or small among others."""
    ways = ["whole", "blurred", "small"]
    lines = [f"| arm | models | {' | '.join(ways)} | in a mosaic |", "| --- | --- | --- | --- | --- | --- |"]
    runs = record["cells"]["runs"]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        its = [run for run in runs if run["arm"] == arm]
        mosaic = by_seed(record["follow_ups"]["larger"], arm, "mosaic", "P@0.5", hard=True)
        values = [[run[way] for run in its] for way in ways] + [[mosaic[run["seed"]] for run in its]]
        cells = [arm, str(len(its)), *(_points(*interval(np.array(of_way))) for of_way in values)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


TABLES: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("data", data_table),
    ("effort", effort),
    ("answers", answers),
    ("outcome", outcome_table),
    ("differences", difference_table),
    ("kinds", kinds_table),
    ("follow-ups", follow_ups),
    ("cells", cells_table),
]
FIGURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "effect-summary.svg": plot_summary,
    "effect-distractors.svg": plot_distractors,
    "effect-false-negatives.svg": plot_false_negatives,
    "effect-scenes.jpg": plot_scenes,
}


def rewritten(text: str, record: dict[str, Any]) -> str:
    """The page with every table made again."""
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
