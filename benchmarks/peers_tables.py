"""What README.md and docs/peers.md say about the peers, made from the recorded JSON alone.

python benchmarks/peers_tables.py        rewrites both from benchmarks/results/peers.json
"""

import json
import re
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT

BEGIN, END = "<!-- from benchmarks/results/peers.json -->", "<!-- end -->"
LEAST = {"host": 20.0, "dataloader": 1.4, "dali": 1.0}  # how many times as fast the Loader must be


def speed(result: dict[str, Any]) -> str:
    """README's line: how many times as fast as the peers, from the smallest lead to the largest."""
    peers = [row for row in result["rows"] if row["is_peer"]]
    tiles, stream = ([row[name]["median"] for row in peers if name in row] for name in ("ratio_host", "ratio_stream"))
    return (
        f"{min(stream):.1f} to {max(stream):.1f} times as many samples a second as {len(peers)} other ways to make the "
        f"same mosaics; {min(tiles):.0f} to {max(tiles):.0f} times from tiles that were decoded beforehand. Measured "
        f"on {result['config']['cores']} CPU cores."
    )


def rates(result: dict[str, Any]) -> str:
    """docs/peers.md's table of rates and the sentence below it."""
    lines = [
        "| | samples/s (quartiles) | resident tiles | stream | CPU ms a sample | memory, GiB | start-up, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        rate = row["samples_per_s"]
        cells = [
            row["label"],
            f"{rate['median']:,.0f} ({rate['p25']:,.0f} to {rate['p75']:,.0f})",
            *(_times(row, name) for name in ("ratio_host", "ratio_stream")),
            f"{row['cpu_ms_a_sample']['median']:.1f}",
            f"{row['memory_mib'] / 1024:.1f}",
            f"{row['start_up_s']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", verdict(result), ""])


def _times(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    spread = row[name]
    digits = 0 if name == "ratio_host" else 2
    return f"{spread['median']:.{digits}f}x ({spread['p25']:.{digits}f} to {spread['p75']:.{digits}f})"


def verdict(result: dict[str, Any]) -> str:
    """How far ahead the Loader must be, and where it is not."""
    peers = [row for row in result["rows"] if row["is_peer"]]
    slower = [row for row in peers if row["ratio_host"]["median"] < LEAST["host"]]
    told = ["Resident tiles must be at least 20 times as fast as every peer"]
    told[0] += f"; they fall short of that against {_listed(slower)}." if slower else ", and are."
    best = max((row for row in peers if row["label"].startswith("DataLoader")), key=_median, default=None)
    if best is not None:
        ratio = best["ratio_stream"]["median"]
        told.append(
            f"The stream must be at least 1.4 times as fast as the best DataLoader, which is {_plain(best)}: it is "
            f"{ratio:.2f} times{'' if ratio >= LEAST['dataloader'] else ', which falls short'}."
        )
    for row in peers:
        if row["name"] == "dali":
            ratio = row["ratio_stream"]["median"]
            told.append(
                f"The stream is {'not ' if ratio >= LEAST['dali'] else ''}behind DALI's own operators "
                f"({ratio:.2f} times)."
            )
    return " ".join(told)


def _median(row: dict[str, Any]) -> float:
    return float(row["samples_per_s"]["median"])


def _plain(row: dict[str, Any]) -> str:
    return str(row["label"].removeprefix("DataLoader, "))


def _listed(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{_plain(row)} ({row['ratio_host']['median']:.1f} times)" for row in rows)


def conditions(result: dict[str, Any]) -> str:
    """Where and on what the table was measured."""
    config, here, others = result["config"], result["machine"], result["others"]
    return (
        f"{here['cpu']}, {here['cores']} cores, {config['cores']} workers or threads each; {config['photos']} "
        f"{'generated ' if config.get('generated') else ''}photos of {config['megapixels_a_photo']:.2f} megapixels and "
        f"{config['kib_a_photo']:.0f} KiB on average; "
        f"{config['size']}x{config['size']} {config['dtype']}, batch size {config['batch_size']}; "
        f"{config['pairs']} pairs. {_tiles(config['tiles'])} "
        f"Other work kept {others['median']:.2f} cores busy in the median timing, {others['most']:.2f} in the worst.\n"
    )


def _tiles(tiles: dict[str, Any]) -> str:
    size = f"{tiles['bytes'] / 1e6:,.0f} MB"
    if tiles["seconds"] is None:
        return f"Resident tiles already existed: {size}."
    return f"Resident tiles were made before timing started, in {tiles['seconds']:.1f} s: {size}."


def settings(result: dict[str, Any]) -> str:
    """docs/peers.md's table: what was tried, and how close the samples are."""
    lines = [
        "| | settings tried, samples/s alone | compared with | images differ by (allowed) | worst cell | masks, IoU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        if row["is_peer"]:
            tried = "; ".join(
                f"{', '.join(f'{name} {value}' for name, value in one['setting'].items())}: {one['samples_per_s']:.0f}"
                for one in row["tried"]
            )
            stream = "cv2-linear" if row["stream"] == "stream" else "pillow-bilinear"
            found = row["check"]
            mean = f"{found['difference']:.2f} ({found['allowed']:.1f})"
            worst = f"{found['worst']:.2f} ({found['worst_allowed']:.1f})"
            lines.append(f"| {row['label']} | {tried} | `{stream}` | {mean} | {worst} | {found['iou']:.3f} |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def cannot(result: dict[str, Any]) -> str:
    """docs/peers.md's list of what peers cannot do."""
    lines = []
    for row in result["rows"]:
        if row["is_peer"]:
            lines.append(f"* {row['label']} (masks from {row['masks']}): {'; '.join(row['cannot'])}.")
    return "\n".join([*lines, ""])


def figure(result: dict[str, Any]) -> str:
    """The figure that plots.py draws."""
    return f"![Samples/s of {len(result['rows'])} rows, the Loader and its peers](peers.svg)\n"


PLACES = {"README.md": [speed], "docs/peers.md": [conditions, rates, figure, settings, cannot]}


def rewritten(text: str, made: list[str]) -> str:
    """A text with what is between its marks replaced, in order; the space next to the marks stays."""
    parts = iter(made)
    marked = rf"({BEGIN}\s+).*?(\s+{END})"
    return re.sub(marked, lambda found: f"{found[1]}{next(parts).strip()}{found[2]}", text, flags=re.DOTALL)


def write_tables(result: dict[str, Any], root: Path = ROOT) -> None:
    """Put a result into the pages that show it."""
    for name, makers in PLACES.items():
        path = root / name
        path.write_text(rewritten(path.read_text("utf-8"), [make(result) for make in makers]), "utf-8")


if __name__ == "__main__":
    write_tables(json.loads((RESULTS / "peers.json").read_text()))
