"""All rows in turn: the better setting of each is found first, then these run side by side.

This process imports neither the Loader nor a peer until all is measured: libraries that it had in memory would be
charged to it in part, which would make the rows' memory look smaller.
"""

import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from nemo_dali._checks import integer
from nemo_dali._choices import PeerDType
from nemo_dali.commands.peers.measure import CHECK, TIME, Timing, save_expected, serve
from nemo_dali.commands.peers.rows import BY_NAME, PEERS, ROWS, missing
from nemo_dali.commands.peers.work import MOST_TIMED, POLICY, Row, Setting, Work, make_work
from nemo_dali.errors import NemoError
from nemo_dali.io.progress import progress

RESULT = "a result of 'nemo-dali bench peers'"
LONGEST_END_S = 5.0  # until a process that has been told to end is killed
TIMINGS_A_TRY = 2  # so that one disturbed timing does not choose the setting alone


def is_result(head: bytes) -> bool:
    """Whether a file that begins like this is a result of ``compare``, as JSON."""
    return re.match(rb'\{\s*"benchmark": "peers",', head) is not None


def compare(  # noqa: PLR0913  # the options of the command
    files: dict[str, Any],
    folder: Path,
    *,
    tiles: Path | None = None,
    batch_size: int = 16,
    size: int = 480,
    dtype: PeerDType = "float32",
    cores: int,
    peers: Sequence[str] = PEERS,
    pairs: int = 5,
    steps: int = 10,
    tries: int = 2,
) -> dict[str, Any]:
    """Time the Loader and its peers on the same mosaics.

    Args:
        files: for the Loader.
        folder: for masks and, without ``tiles``, tiles; not removed.
        cores: workers and threads of each row.
        peers: names, of ``rows.PEERS``.
        pairs: how many times each row is timed beside the others, 1 to ``MOST_TIMED``.
        steps: least batches in a timing, also 1 to ``MOST_TIMED``; half as many when a setting is tried.
        tries: settings of a peer that are tried, 1 or 2. With 1 nothing is tried: start-up and memory are measured
            beside the others.

    Returns:
        JSON-able: ``rows``, ``skipped`` (a sentence by name), ``config``, ``machine``, ``versions``.

    Raises:
        NemoError: a peer makes other samples than the Loader, or fails.
    """
    pairs = integer("pairs", pairs, least=1, most=MOST_TIMED)
    steps = integer("steps", steps, least=1, most=MOST_TIMED)
    if unknown := set(peers) - set(PEERS):
        raise ValueError(f"peers ({', '.join(sorted(unknown))}) must be among {', '.join(PEERS)}")
    if size % 2:
        raise ValueError(f"size ({size}) must be even: peers make mosaics of equal cells")
    options = {"batch_size": batch_size, "size": size, "dtype": dtype, "cores": cores}
    asked = [row.name for row in ROWS if not row.is_peer or row.name in peers]
    work, skipped, made_tiles = _elsewhere(_prepared, files, folder, tiles, options, asked)
    rows = [BY_NAME[name] for name in asked if name not in skipped]
    started = time.monotonic()
    if tries > 1:
        trying = progress(rows, total=len(rows), what="trying", unit="row")
        tried = {row.name: _tried(row, work, max(steps // 2, 1), tries) for row in trying}
        timings, _, again = _side_by_side({row: tried[row.name][0]["setting"] for row in rows}, work, pairs, steps)
    else:
        timings, tried, again = _side_by_side({row: row.settings(work)[0] for row in rows}, work, pairs, steps)
    from nemo_dali.commands.bench import machine, versions
    from nemo_dali.plan.policy import MosaicPolicy

    return {
        "benchmark": "peers",
        "rows": [_summary(row, tried[row.name], timings) | {"checked_again": again[row.name]} for row in rows],
        "skipped": skipped,
        "config": {
            "batch_size": batch_size,
            "size": size,
            "dtype": dtype,
            "cores": cores,
            "policy": json.loads(MosaicPolicy(**POLICY).to_json()),
            "pairs": pairs,
            "steps": steps,
            "photos": len(work.photos),
            "kib_a_photo": round(float(np.mean([Path(path).stat().st_size for path in work.photos])) / 1024, 1),
            "megapixels_a_photo": round(work.megapixels, 3),
            "tiles": made_tiles,
            "seconds": round(time.monotonic() - started),
        },
        # Cores that were busy with something else, in the median timing and in the worst.
        "others": _spread_of_others(timings),
        "machine": machine(),
        "versions": versions() | _versions(rows),
    }


def lines_of(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a table, and what was left out."""
    yield f"{'':40}{'samples/s':>18}{'CPU ms':>8}{'MiB':>7}{'start s':>8}{'host':>7}{'stream':>7}"
    for row in result["rows"]:
        rate = row["samples_per_s"]
        spread = f"{rate['median']:.0f} ({rate['p25']:.0f}-{rate['p75']:.0f})"
        ratios = "".join(f"{row[name]['median']:7.1f}" for name in ("ratio_host", "ratio_stream") if name in row)
        cpu, memory = row["cpu_ms_a_sample"]["median"], row["memory_mib"]
        yield f"{row['label']:40}{spread:>18}{cpu:8.1f}{memory:7.0f}{row['start_up_s']:8.2f}{ratios}"
    others = result["others"]["median"]
    yield f"host, stream: how many times as fast the Loader is in these modes. Other work kept {others:.2f} cores busy."
    yield from result["skipped"].values()


# --- the work --------------------------------------------------------------------------------------------------------


def _elsewhere(do: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process that ends afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(do, *arguments).result()


def _prepared(
    files: dict[str, Any], folder: Path, tiles: Path | None, options: dict[str, Any], asked: list[str]
) -> tuple[Work, dict[str, str], dict[str, Any]]:
    """The work, rows that cannot run with a sentence on why, and what the tiles cost: seconds if made here, bytes."""
    from nemo_dali.tiles.build import make_tiles

    seconds = None
    if tiles is None:
        tiles, started = folder / "peers.tiles.h5", time.monotonic()
        make_tiles(files["dataset"], size=options["size"], output=tiles, grids=(2,), images=files.get("images"))
        seconds = round(time.monotonic() - started, 1)
    masks = folder / "masks"
    masks.mkdir()
    work = make_work(files, tiles, masks, **options)
    save_expected(work)
    skipped = {name: sentence for name in asked if (sentence := missing(BY_NAME[name])) is not None}
    return work, skipped, {"seconds": seconds, "bytes": tiles.stat().st_size}


# --- one row ---------------------------------------------------------------------------------------------------------


class _Process:
    """A row in a process of its own."""

    def __init__(self, row: Row, work: Work, setting: Setting, steps: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._row = row
        self._end, there = context.Pipe()
        self._process = context.Process(target=serve, args=(row.name, work, setting, steps, there))
        self._process.start()
        there.close()  # so that a process that dies is noticed

    def started(self) -> tuple[float, dict[str, Any]]:
        """Wait until it has made and checked its first batch: seconds to that batch, and what the check found."""
        found: tuple[float, dict[str, Any]] = self._received()
        return found

    def _received(self) -> Any:
        try:
            found = self._end.recv()
        except EOFError:
            raise NemoError(f"{self._row.label} ended by the error above. Leave it out with --peers.") from None
        if isinstance(found, NemoError):
            raise found
        return found

    def timed(self) -> Timing:
        """Time it once, while nothing else runs."""
        self._end.send(TIME)
        timing: Timing = self._received()
        return timing

    def checked(self) -> dict[str, Any]:
        """Compare its next batch with the Loader's."""
        self._end.send(CHECK)
        found: dict[str, Any] = self._received()
        return found

    def release(self) -> None:
        """Let it end."""
        self._end.close()

    def close(self) -> None:
        """End it."""
        self.release()
        self._process.join(LONGEST_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def _running(
    settings: dict[Row, Setting], work: Work, steps: int
) -> Iterator[tuple[dict[str, _Process], dict[str, Any]]]:
    """Processes of rows by name, started one by one and ended together, and what ``started`` gave for each."""
    processes: dict[str, _Process] = {}
    started = {}
    try:
        for row, setting in settings.items():
            processes[row.name] = _Process(row, work, setting, steps)
            started[row.name] = processes[row.name].started()
        yield processes, started
    finally:
        for process in processes.values():
            process.release()
        for process in processes.values():
            process.close()


def _tried(row: Row, work: Work, steps: int, tries: int) -> list[dict[str, Any]]:
    """Results of the first ``tries`` settings of a row, with no other row alive, the fastest first."""
    found = []
    for setting in row.settings(work)[:tries]:
        with _running({row: setting}, work, steps) as (processes, started):
            timings = [processes[row.name].timed() for _ in range(TIMINGS_A_TRY)]
            found.append(_trial(setting, started[row.name], timings))
    return sorted(found, key=lambda one: -one["samples_per_s"])


def _trial(setting: Setting, started: tuple[float, dict[str, Any]], timings: list[Timing]) -> dict[str, Any]:
    start_up, checked = started
    return {
        "setting": setting,
        "samples_per_s": round(float(np.mean([timing.samples_per_s for timing in timings])), 1),
        "start_up_s": start_up,
        "memory_mib": timings[-1].memory_mib,
        "own_mib": timings[-1].own_mib,
        "check": checked,
    }


# --- all of them -----------------------------------------------------------------------------------------------------


def _side_by_side(
    settings: dict[Row, Setting], work: Work, pairs: int, steps: int
) -> tuple[dict[str, list[Timing]], dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """All rows in turn. While one is timed, the others have made what they may and wait.

    Returns:
        By name: timings, the same as one trial each, and what the check of the batch after the last timing found.
    """
    timings: dict[str, list[Timing]] = {row.name: [] for row in settings}
    with _running(settings, work, steps) as (processes, started):
        for _ in progress(range(pairs), total=pairs, what="timing", unit="pair"):
            for name, process in processes.items():
                timings[name].append(process.timed())
        following = {name: of_row[-1].taken for name, of_row in timings.items()}
        _elsewhere(save_expected, work, sorted({taken % work.steps for taken in following.values()}))
        again = {name: {"batch": following[name]} | process.checked() for name, process in processes.items()}
    tried = {row.name: [_trial(one, started[row.name], timings[row.name])] for row, one in settings.items()}
    return timings, tried, again


def _summary(row: Row, tried: list[dict[str, Any]], timings: dict[str, list[Timing]]) -> dict[str, Any]:
    from nemo_dali.commands.bench import Spread

    def rates(name: str) -> Any:
        return np.array([timing.samples_per_s for timing in timings[name]])

    own = rates(row.name)
    summary = {
        "name": row.name,
        "label": row.label,
        "is_peer": row.is_peer,
        "samples_per_s": asdict(Spread.of(own)),
        "cpu_ms_a_sample": asdict(Spread.of([1000 * timing.cpu_s for timing in timings[row.name]])),
        "masks": row.masks,
        "cannot": list(row.cannot),
        **{name: tried[0][name] for name in ("memory_mib", "own_mib", "start_up_s", "setting", "check")},
        "tried": [{name: one[name] for name in ("setting", "samples_per_s")} for one in tried],
    }
    if row.is_peer:
        stream = "stream" if row.image == "cv2-linear" else "stream-antialiased"
        summary |= {"ratio_host": asdict(Spread.of(rates("host") / own)), "stream": stream}
        summary["ratio_stream"] = asdict(Spread.of(rates(stream) / own))
    return summary


def _spread_of_others(timings: dict[str, list[Timing]]) -> dict[str, float]:
    others = [timing.others for of_row in timings.values() for timing in of_row]
    return {"median": round(float(np.median(others)), 2), "most": round(max(others), 2)}


def _versions(rows: Sequence[Row]) -> dict[str, str]:
    found = {}
    for package in sorted({package for row in rows for package in row.packages}):
        try:
            found[package.replace("_", "-")] = version(package)
        except PackageNotFoundError:
            continue  # for the other CUDA
    if any(row.name == "spdl" for row in rows):
        from spdl.io.utils import get_ffmpeg_versions

        found["ffmpeg"] = ", ".join(f"{name} {'.'.join(map(str, got))}" for name, got in get_ffmpeg_versions().items())
    return found
