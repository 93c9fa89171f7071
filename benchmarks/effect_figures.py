"""The figures of docs/effect.md, drawn from the recorded runs alone."""

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from effect_numbers import HARD, arms_of, by_seed, difference, interval, levels, singles_of
from matplotlib import pyplot as plt
from PIL import Image
from plots import INK, STYLE, save
from pycocotools import mask as coco_mask

from nemo_dali.synthetic import make_photo

COLOURS = {
    "single": INK,
    "random": "#2da44e",
    "unbounded": "#e8833a",
    "tuned": "#3b8eea",
    "cropped": "#a06ee1",
    "oracle": "#d4a72c",
    "false": "#cf222e",
    "later": "#1b7c83",
    "quarter": "#54aeff",
}


def plot_summary(record: dict[str, Any], output: Path) -> None:
    """README's figure: every arm's P@0.5 on hard samples less that of single photos, with 95 % intervals."""
    rows = {arm: (record, arm) for arm in arms_of(record)}
    for study, other in record["follow_ups"].items():
        rows |= {arm if arm == study else f"{arm} ({study})": (other, arm) for arm in arms_of(other)}
    rows = {label: row for label, row in rows.items() if row[1] != "single"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 0.6 + 0.22 * len(rows)), layout="constrained")
        axes.axvline(0, color=INK, linewidth=1)
        for place, (other, arm) in enumerate(rows.values()):
            found = by_seed(other, arm, "single", "P@0.5", hard=True)
            mean, half, _ = difference(found, singles_of(other, record))
            half = half if math.isfinite(half) else 0.0
            axes.errorbar(mean, place, xerr=half, fmt="o", capsize=2, markersize=4, color=COLOURS[arm])
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.set_xlabel("P@0.5 on hard samples, less that of single photos")
    save(figure, output)


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
    """P@0.5 on hard samples against the rate of false negatives among the negatives drawn; single photos as a line."""
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
    """Hard scenes with what the arms found with the first seed: those on which the arms differ most."""
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
    """A photo of the evaluation, generated again."""
    scenes = record["study"]["hard"]
    options = {"distractors": tuple(scenes["distractors"]), "expressions": scenes["expressions"]}
    return make_photo(seed=scenes["seed"], number=image_id - 1, **options).image.convert("RGB")
