"""The summary of ``gpu_check.py``: one table of all stages, as JSON and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_run import Place, Stage, is_of, read_record, write_json

PRETENDED = "**Pretended: no GPU was there. This is a rehearsal; no figure below is a measurement.**"
# What --pretend cannot reach, because nothing on a CPU can play it.
UNREACHED = (
    "What driver, NVRTC, NVVM and GPU do: the code for the GPU at hand, its memory, its clock and its streams.",
    "The tests marked gpu: that they are found and can be imported is rehearsed, and that one that does not run is a "
    "failure.",
    "nvJPEG and the hardware decoder: DALI's CPU decoder plays them.",
    "Launches by CuPy and by Numba (launch_host_microseconds of gpu_kernels), which compile for the GPU at hand.",
    "The sweep of gpu_stream, and more than one size of batch: left out to be quick.",
    "The doctor's pipelines on cuda, and compute-sanitizer.",
)


def write_summary(place: Place, stages: Sequence[Stage]) -> dict[str, Any]:
    """Write summary.json and summary.md from the current records; returns the content of summary.json."""
    records = [read_record(place, stage) for stage in stages]
    rows = [row(place, stage, record) for stage, record in zip(stages, records, strict=True)]
    summary = {
        "pretended": place.pretended,
        "device": place.device,
        "revision": place.revision,
        "source": place.source,
        "passed": all(one["status"] in ("passed", "not installed") for one in rows),
        "setup": versions(place, records),
        "stages": rows,
        "unreached": list(UNREACHED) if place.pretended else [],
    }
    write_json(place.file("summary.json"), summary)
    place.file("summary.md").write_text(table(summary))
    return summary


def row(place: Place, stage: Stage, record: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's line; a record of other sources or packages is ignored."""
    if not is_of(record, place):
        record = {"status": "not run"}
    names = ("status", "seconds", "limit_s", "revision", "figures", "why")
    noted = (record.get("result") or {}).get("noted", {})
    return {"stage": stage.name, **{name: record.get(name) for name in names}, "noted": noted}


def versions(place: Place, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Versions from the packages' metadata, and the CUDA versions that the doctor found on importing them."""
    found: dict[str, Any] = {}
    for record in records:
        if record.get("stage") == "doctor" and is_of(record, place) and record.get("result"):
            packages = record["result"]["facts"]["packages"]
            found = {f"{name}'s CUDA": one["cuda"] for name, one in packages.items() if one["cuda"]}
    return {**place.setup, **found}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown."""
    setup = summary["setup"]
    lines = [f"# {summary['device']}", ""]
    lines += [PRETENDED, ""] if summary["pretended"] else []
    sources = "" if summary["source"] in summary["revision"] else f" (sources {summary['source']})"
    lines += [f"Revision {summary['revision']}{sources}, by `make gpu-check`.", ""]
    lines += ["| stage | result | s | |", "| --- | --- | --- | --- |"]
    for one in summary["stages"]:
        said = "; ".join(part for part in (one["figures"], one["why"]) if part)
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.0f}"
        status = f"**{one['status']}**" if one["status"] not in ("passed", "not installed") else one["status"]
        lines.append(f"| {one['stage']} | {status} | {seconds} | {cell(said)} |")
    lines += ["", "| | version |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in setup.items())]
    if noted := {name: text for one in summary["stages"] for name, text in one["noted"].items()}:
        lines += ["", "What tests noted:", "", *(f"* {name}: {text}" for name, text in noted.items())]
    if summary["unreached"]:
        lines += ["", "What a rehearsal does not reach:", "", *(f"* {one}" for one in summary["unreached"])]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """A text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
