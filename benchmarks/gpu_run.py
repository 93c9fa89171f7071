"""Runs the stages of ``gpu_check.py``, each in a process group with a time limit, and keeps a record of each."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from gpu_setup import ROOT

GRACE = 2.0  # seconds for a process to report where it hangs
DONE = ("passed", "failed", "crashed", "not installed")


@dataclass(frozen=True)
class Place:
    """What a stage is given: where things are, and what is measured."""

    folder: Path  # for records and logs
    work: Path
    device: str
    revision: str
    source: str  # digest of all source files
    setup: Mapping[str, Any] = field(default_factory=dict)  # versions
    pretended: bool = False

    def file(self, name: str) -> Path:
        """A file of results; the name of a pretended one says so."""
        stem, _, end = name.rpartition(".")
        return self.folder / (f"{stem}.pretended.{end}" if self.pretended else name)


@dataclass(frozen=True)
class Run:
    """How a stage's process ended."""

    code: int | None  # exit code; None if the time was up
    log: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What came of a stage.

    Attributes:
        status: one of ``DONE``, or "not run".
        figures: a short text for the table. result: what the record keeps.
        code: the exit code that goes with it.
    """

    status: str
    why: str = ""
    figures: str = ""
    result: Any = None
    code: int = 0


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        limit: seconds.
        command: what to run, or the outcome if there is nothing to run.
        read: makes the outcome of a run.
        output: a file of the work folder that takes what the process prints; None: the log does.
        environment: what is added to this process's.
        there: whether what the stage leaves for others still exists.
    """

    name: str
    limit: float
    what: str
    command: Callable[[Place], list[str] | Outcome]
    read: Callable[[Place, Run], Outcome]
    output: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    there: Callable[[Place], bool] = lambda place: True


# --- running ---------------------------------------------------------------------------------------------------------


def run_all(
    stages: Sequence[Stage],
    place: Place,
    *,
    again: Sequence[str] = (),
    patience: float = 1.0,
    after_each: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """Run the stages that are not done; returns all records. An interrupt leaves them valid, and is raised again.

    Args:
        again: names of stages to run even if they are done, or "all".
        patience: factor of the limits.
    """
    place.folder.mkdir(parents=True, exist_ok=True)
    place.work.mkdir(parents=True, exist_ok=True)
    records, spare = [], 0.0
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        old = read_record(place, stage)
        if "all" not in again and stage.name not in again and is_done(old, place, stage):
            say(f"{title}: {told(old)}, at this revision before")
            records.append(old)
            continue
        own = stage.limit * patience
        limit = own + min(spare, own)
        say(f"{title}: {stage.what}; at most {limit:.0f} s")
        records.append(record := run_one(stage, place, limit))
        say(f"{' ' * len(title)}  {told(record)}")
        after_each()
        spare = max(spare + own - record["seconds"], 0.0)
    return records


def run_one(stage: Stage, place: Place, limit: float) -> dict[str, Any]:
    """Run a stage; returns its record, which has been written."""
    record = {
        "stage": stage.name,
        "status": "begun",
        "done": False,
        "pretended": place.pretended,
        "device": place.device,
        "revision": place.revision,
        "source": place.source,
        "setup": dict(place.setup),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "limit_s": round(limit, 1),
        "seconds": 0.0,
    }
    write_json(place.file(f"{stage.name}.json"), record)  # what is left after a kill
    start = time.monotonic()
    try:
        try:
            command = stage.command(place)
        except OSError as error:
            command = Outcome("not run", f"It could not be started ({error}).")
        if isinstance(command, Outcome):
            outcome = command
        else:
            record["command"] = [shown(word) for word in command]
            run = run_process(command, stage, place, limit)
            record["exit_code"] = run.code
            outcome = judge(stage, place, run)
    except KeyboardInterrupt:
        finish(record, Outcome("interrupted"), time.monotonic() - start, place)
        raise
    return finish(record, outcome, time.monotonic() - start, place)


def judge(stage: Stage, place: Place, run: Run) -> Outcome:
    """What came of a run. If its results cannot be read, the stage has failed, and nothing else."""
    try:
        outcome = stage.read(place, run)
    except Exception as error:  # whatever a stage left behind
        outcome = Outcome("failed", f"Its result cannot be read ({type(error).__name__}: {error}).")
    if run.code is None:
        return Outcome("timed out", f"Killed after {run.seconds:.0f} s.", outcome.figures, outcome.result)
    if run.code < 0:
        crash = re.search(r"^Current thread .*\n\s+(File .*)", run.log, re.MULTILINE)
        where = f" at {crash[1]}" if crash else ""
        why = f"Killed by {signal.Signals(-run.code).name}{where}."
        return Outcome("crashed", why, outcome.figures, outcome.result)
    if run.code != outcome.code and outcome.status == "passed":
        return Outcome("failed", f"Exit code {run.code}. {last_line(run.log)}", outcome.figures, outcome.result)
    return outcome


def finish(record: dict[str, Any], outcome: Outcome, seconds: float, place: Place) -> dict[str, Any]:
    """Complete a record and write it."""
    record |= {
        "status": outcome.status,
        "done": outcome.status in DONE,
        "seconds": round(seconds, 1),
        "why": outcome.why,
        "figures": f"pretended: {outcome.figures}" if place.pretended and outcome.figures else outcome.figures,
        "result": {"pretended": True, **outcome.result} if place.pretended and outcome.result else outcome.result,
    }
    write_json(place.file(f"{record['stage']}.json"), record)
    return record


def run_process(command: list[str], stage: Stage, place: Place, limit: float) -> Run:
    """Run a command and all its children in a process group, which is gone when this returns."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "", "PYTHONFAULTHANDLER": "1"}
    environment |= stage.environment
    log = place.file(f"{stage.name}.log")
    start = time.monotonic()
    with open(log, "wb") as text, open(place.work / stage.output if stage.output else os.devnull, "wb") as output:
        out: IO[bytes] = output if stage.output else text
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": text}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGABRT)  # Python prints where its threads are; its children would mix theirs in
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            signal_group(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver cannot be killed
                process.wait(GRACE)
    return Run(code, log.read_text(errors="replace"), time.monotonic() - start)


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to all processes that are left in a group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


# --- records ---------------------------------------------------------------------------------------------------------


def read_record(place: Place, stage: Stage) -> dict[str, Any]:
    """What an earlier call wrote about a stage; empty if there is nothing, or nothing that can be read."""
    try:
        record = json.loads(place.file(f"{stage.name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_of(record: Mapping[str, Any], place: Place) -> bool:
    """Whether a record is of these sources, on this device and with these packages."""
    same = {"source": place.source, "device": place.device, "setup": dict(place.setup), "pretended": place.pretended}
    return all(record.get(name) == value for name, value in same.items())


def is_done(record: Mapping[str, Any], place: Place, stage: Stage) -> bool:
    """Whether a stage was already run to its end with these sources, device and packages."""
    if not record.get("done") or not is_of(record, place):
        return False
    return record["status"] != "not installed" and stage.there(place)


def write_json(path: Path, document: Any) -> None:
    """Write a file atomically."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(document, indent=2) + "\n")
    fresh.replace(path)


def told(record: Mapping[str, Any]) -> str:
    """A record in one line."""
    parts = [record["figures"], record["why"]]
    return f"{record['status']} in {record['seconds']:.0f} s" + "".join(f"; {part}" for part in parts if part)


def last_line(log: str) -> str:
    """The last line of a log, shortened."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def shown(word: str) -> str:
    """A word of a command as recorded: without this machine's path to the project."""
    return "python" if word == sys.executable else word.replace(f"{ROOT}{os.sep}", "")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)
