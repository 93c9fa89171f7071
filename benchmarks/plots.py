"""Pictures of recorded results, made from their JSON alone.

python benchmarks/plots.py benchmarks/results/scaling.json docs/scaling.svg
python benchmarks/plots.py benchmarks/results/peers.json docs/peers.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK = "#7d8590"  # legible on white and on black
COLOURS = {"stream": "#e8833a", "host": "#3b8eea", "pinned": "#a06ee1", "device": "#2da44e"}
MARKERS = {"stream": "o", "host": "s", "pinned": "^", "device": "D"}
AXES = {
    "batch_size": "samples a batch",
    "size": "height and width of a frame, pixels",
    "photos": "photos in the data set",
    "loaders": "loaders on the machine",
    "top_k": "K, candidates of a sentence",
    "max_similarity": "tau, the bound of similarity",
    "sentences": "sentences in the data set",
    "rate": "samples/s that each loader is asked for",
}
UNTOLD = ("top_k", "max_similarity", "sentences", "rate")  # in titles
BELOW = {  # what is drawn below the rates of a sweep, by what factor, and what it is called
    "loaders": ("pss_mib", 1 / 1024, "GiB, all (PSS)"),
    "rate": ("waiting", 100, "% waiting"),
    "sentences": ("start_up_s", 1, "start-up, s"),
    "top_k": ("plan_krows_per_s", 1, "1,000 rows/s\nplanned"),
    "max_similarity": ("plan_krows_per_s", 1, "1,000 rows/s\nplanned"),
}
OWN = ("own_mib", 1 / 1024, "GiB a process")
STYLE: dict[str, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",  # text as text: smaller, and searchable
    "svg.hashsalt": "nemo-dali",  # the same figures give the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
}


def plot_scaling(result: str | Path, output: str | Path) -> None:
    """Draw what ``scaling.py`` wrote."""
    save(draw_scaling(json.loads(Path(result).read_text())), output)


def plot_peers(found: dict[str, Any], output: str | Path) -> None:
    """Draw what ``peers.py`` found."""
    save(draw_peers(found), output)


def save(figure: Figure, output: str | Path) -> None:
    with plt.rc_context(STYLE):
        figure.savefig(output, metadata={"Date": None} if Path(output).suffix == ".svg" else None)
    plt.close(figure)


def draw_peers(found: dict[str, Any]) -> Figure:
    """One bar per row: samples/s (median, quartiles), on a logarithmic axis. ``found`` is what ``peers.py`` wrote."""
    rows = sorted(found["rows"], key=lambda row: row["samples_per_s"]["median"])
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9, 0.34 * len(rows) + 0.7), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.set_xscale("log")
        for y, row in enumerate(rows):
            rate, colour = row["samples_per_s"], INK if row["is_peer"] else COLOURS[row["name"].partition("-")[0]]
            axes.barh(y, rate["median"], color=colour, height=0.7)
            axes.plot([rate["p25"], rate["p75"]], [y, y], color="#d0d7de", linewidth=2, solid_capstyle="butt")
            axes.annotate(
                f"{rate['median']:,.0f}", (rate["p75"], y), (4, 0), textcoords="offset points", va="center", color=INK
            )
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        low, high = (pick(row["samples_per_s"]["median"] for row in rows) for pick in (min, max))
        axes.set_xlim(low / 2, high * 1.7)
        axes.set_xlabel("samples/s")
    return figure


def draw_scaling(found: dict[str, Any]) -> Figure:
    """One panel per sweep: samples/s (median, quartiles) above, memory or whatever else grows below.

    ``found`` is what ``scaling.py`` wrote.
    """
    with plt.rc_context(STYLE):
        rows = -(-len(found["sweeps"]) // 2)
        figure = plt.figure(figsize=(9, 4.1 * rows), layout="constrained")
        figure.patch.set_alpha(0)
        cells = figure.add_gridspec(2 * rows, 2, height_ratios=[3, 1.4] * rows)
        for i, (axis, points) in enumerate(found["sweeps"].items()):
            row, column = 2 * (i // 2), i % 2
            rate = figure.add_subplot(cells[row, column])
            memory = figure.add_subplot(cells[row + 1, column], sharex=rate)
            _draw_sweep(rate, memory, axis, points, found["points"])
        lines, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _draw_sweep(rate: Any, memory: Any, axis: str, points: list[Any], results: list[Any]) -> None:
    name, factor, called = BELOW.get(axis, OWN)
    for mode in dict.fromkeys(one["mode"] for one in results):
        by_point = {tuple(one[axis] for axis in AXES): one for one in results if one["mode"] == mode}
        measured = [by_point[key] for point in points if (key := tuple(point[axis] for axis in AXES)) in by_point]
        x = [one[axis] for one in measured]
        look = {"color": COLOURS[mode], "marker": MARKERS[mode], "markersize": 4, "linewidth": 1.5}
        spread = [one["samples_per_s"] for one in measured]
        rate.plot(x, [one["median"] for one in spread], label=mode, **look)
        rate.fill_between(
            x,
            [one["p25"] for one in spread],
            [one["p75"] for one in spread],
            color=COLOURS[mode],
            alpha=0.25,
            linewidth=0,
        )
        memory.plot(x, [one[name] * factor for one in measured], **look)
    fixed = {name: points[0][name] for name in AXES if name != axis and name not in UNTOLD}
    told = {"batch_size": "batch {}", "size": "{0}x{0}", "photos": "{:,} photos", "loaders": "{} loaders"}
    rate.set_title(
        ", ".join(told[name].format(value) for name, value in fixed.items()).replace(" 1 loaders", " 1 loader"),
        fontsize=9,
        color=INK,
    )
    for axes in (rate, memory):
        axes.patch.set_alpha(0)
        axes.set_xscale("log" if min(point[axis] for point in points) > 0 else "linear")
        axes.set_xticks([point[axis] for point in points])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1 else f"{value:,.0f}"))
    rate.set_yscale("log")
    rate.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rate.yaxis.set_minor_locator(NullLocator())
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    rate.tick_params(labelbottom=False)
    rate.set_ylabel("samples/s, all loaders" if axis in ("loaders", "rate") else "samples/s")
    memory.set_ylim(0, 1.1 * memory.get_ylim()[1])
    memory.set_ylabel(called)
    memory.set_xlabel(AXES[axis])


if __name__ == "__main__":
    if "sweeps" in (recorded := json.loads(Path(sys.argv[1]).read_text())):
        plot_scaling(sys.argv[1], sys.argv[2])
    else:
        plot_peers(recorded, sys.argv[2])
