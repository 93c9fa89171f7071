"""The stages of ``gpu_check.py``: what each runs, for how long at most, and what it makes of the result."""

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_run import Outcome, Place, Run, Stage
from gpu_setup import ROOT

HERE = ROOT / "benchmarks"
PLAYED = HERE / "pretended_gpu.py"
TESTS = ROOT / "tests"
# The stage that runs a test file, by its folder below tests/; all others are in other-tests.
GROUPS = {"kernel-tests": ("kernels", "pipeline"), "loader-tests": ("loader", "tiles"), "other-tests": ()}
COVERED = "tests/benchmarks/test_gpu.py::test_both_run_on_a_gpu"  # by two stages, which run more of both
# Of the kernels' tests those without generated examples, on small photos: a sanitizer takes ten times as long or more.
SMALL = "cpus_kernel_at_the_ends and (shapes0 or shapes2 or shapes4)"  # of the letterbox
SANITIZED = f"surroundings or any_shape or kernel_on_a_gpu or takes_what or ({SMALL})"
SANITIZER_FAILED = 86  # exit code
MODULE = re.compile(r"No module named '([\w.]+)'")
IMAGES = 200  # generated
BATCH = 64


def played(place: Place, script: str, *arguments: object) -> list[str]:
    """A command line for a script of this folder, or for nemo-dali's own command."""
    start = [sys.executable, *([str(PLAYED)] if place.pretended else [])]
    name = [script] if place.pretended else ["-m", "nemo_dali"] if script == "nemo_dali" else [str(HERE / script)]
    return [*start, *name, *map(str, arguments)]


# --- doctor ----------------------------------------------------------------------------------------------------------


def read_doctor(place: Place, run: Run) -> Outcome:
    """The doctor's report; its problems are the reasons for a failure."""
    text = (place.work / "doctor.json").read_text()
    if not text.strip():  # it could not even start
        return Outcome("failed", last_error(run.log))
    report = json.loads(text)
    levels = Counter(finding["level"] for finding in report["findings"])
    problems = [finding["what"] for finding in report["findings"] if finding["level"] == "problem"]
    figures = f"problems: {levels['problem']}, warnings: {levels['warning']}"
    return Outcome("failed" if problems else "passed", " ".join(problems), figures, report)


# --- data ------------------------------------------------------------------------------------------------------------


def data(place: Place) -> dict[str, Path]:
    """The generated files."""
    return {end: place.work / "data" / f"data.{end}.h5" for end in ("ris", "neg", "tiles")}


def images(place: Place) -> int:
    """How many photos are generated."""
    return 40 if place.pretended else IMAGES


def data_is_there(place: Place, *ends: str) -> bool:
    """Whether the generated files with these ends, or all of them, exist."""
    return all(path.exists() for end, path in data(place).items() if end in ends or not ends)


def make_data(place: Place) -> list[str]:
    """Generate photos, and tiles of them with the GPU's decoder."""
    shutil.rmtree(place.work / "data", ignore_errors=True)
    return played(place, "gpu_data.py", place.work / "data", "--images", images(place))


def read_data(place: Place, run: Run) -> Outcome:
    """Passed if all files exist."""
    figures = f"{images(place)} photos"
    return Outcome("passed", "", figures) if data_is_there(place) else Outcome("failed", last_error(run.log))


# --- tests -----------------------------------------------------------------------------------------------------------


def gpu_tests(group: str) -> list[Path]:
    """The files of a group that hold tests marked gpu; no others are imported, as each may need what is missing."""
    grouped = {folder: name for name, folders in GROUPS.items() for folder in folders}
    return [
        path
        for path in sorted(TESTS.rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
        and grouped.get(path.relative_to(TESTS).parts[0], "other-tests") == group
        and path.name != "test_gpu_check.py"
    ]


def pytest_command(place: Place, stage: str, files: Sequence[Path], mark: str) -> list[str]:
    """Tests, each recorded in STAGE.xml in the work folder; a file that cannot be imported does not stop the others."""
    xml = place.work / f"{stage}.xml"
    xml.unlink(missing_ok=True)
    # Without the plugin for time limits pytest warns about its option, and warnings are errors.
    more = ["-W", "ignore::pytest.PytestConfigWarning", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    more += ["-W", "default::DeprecationWarning", "-W", "default::FutureWarning"]  # of versions not known here
    command = [sys.executable, "-m", "pytest", "-m", mark, "-v", "--tb=short", f"--junitxml={xml}", *more]
    return [*command, f"--deselect={COVERED}", *map(str, files)]


def run_tests(place: Place, stage: str) -> list[str] | Outcome:
    """All tests marked gpu of a group."""
    if find_spec("pytest") is None:
        return Outcome("not run", "pytest is missing: pip install pytest hypothesis.")
    return pytest_command(place, stage, gpu_tests(stage), "gpu")


def read_tests(place: Place, run: Run, stage: str) -> Outcome:
    """Passed if tests ran and all of them passed; a skipped test has not run, and that is a failure."""
    xml = place.work / f"{stage}.xml"
    if not xml.exists():
        counts = Counter(re.findall(r" (PASSED|FAILED|ERROR|SKIPPED) ", run.log))
        so_far = ", ".join(f"{count} {word.lower()}" for word, count in counts.items())
        return Outcome("failed", missing(run.log) or last_error(run.log), so_far)
    counts, wrong, text, noted = Counter[str](), [], [], {}
    for case in ElementTree.parse(xml).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        counts[kinds[0] if kinds else "passed"] += 1
        noted |= {one.get("name"): one.get("value") for one in case.iter("property")}
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                message = " ".join(child.get("message", "").split())[:300]
                wrong.append({"test": f"{case.get('classname')}::{case.get('name')}", "is": child.tag, "why": message})
                text.append(child.text or "")
    figures = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failure", "error", "skipped") if counts[kind])
    result = {"counts": dict(counts), "wrong": wrong, "noted": noted, "left out": [COVERED]}
    if place.pretended:
        return pretended_tests(counts, figures, result)
    if counts["passed"] and not wrong:
        return Outcome("passed", "", figures, result)
    why = missing("\n".join(text)) or (f"{wrong[0]['test']}: {wrong[0]['why']}" if wrong else "No test was run.")
    return Outcome("failed", why, figures, result)


def pretended_tests(counts: Counter[str], figures: str, result: dict[str, Any]) -> Outcome:
    """Without a GPU every test must fail because there is none, and for no other reason."""
    others = [one for one in result["wrong"] if "needs a CUDA device" not in one["why"]]
    if others or counts["passed"] or not result["wrong"]:
        why = f"{others[0]['test']}: {others[0]['why']}" if others else "Tests were expected to need a GPU."
        return Outcome("failed", why, figures, result)
    return Outcome("passed", "", f"{len(result['wrong'])} need a GPU, as expected", result, code=1)


def missing(text: str) -> str:
    """A sentence that names the modules that could not be imported; empty where there were none."""
    names = sorted({name.partition(".")[0] for name in MODULE.findall(text)})
    verb = "are" if len(names) > 1 else "is"
    return f"{' and '.join(names)} {verb} missing: install what pyproject.toml lists." if names else ""


def last_error(log: str) -> str:
    """The modules that a log reports missing, or else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return missing(log) or (lines[-1][:300] if lines else "It printed nothing.")


# --- benchmarks ------------------------------------------------------------------------------------------------------


def result_of(place: Place, benchmark: str) -> dict[str, Any]:
    """The only document of a benchmark in the work folder."""
    (path,) = (place.work / benchmark).glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def benchmark(place: Place, name: str, *arguments: object) -> list[str]:
    """The command of a benchmark that writes into a folder of its own."""
    shutil.rmtree(place.work / name, ignore_errors=True)
    more = ["--revision", place.revision, "--output", place.work / name]
    return played(place, f"{name}.py", *arguments, *more)


def run_kernels(place: Place) -> list[str]:
    """Some of the batch sizes, all types."""
    sizes = ["--quick"] if place.pretended else ["--batches", 8, 64, 256, "--rounds", 15]
    return benchmark(place, "gpu_kernels", *sizes)


def read_kernels(place: Place, run: Run) -> Outcome:
    """The share of the copy rate of the case that counts: float16, 2x2, the largest batch up to 64."""
    if run.code != 0:
        return Outcome("failed", last_error(run.log))
    result = result_of(place, "gpu_kernels")
    shares = {
        (case["kernel"], case["resample"]): case["share_of_copy_rate"]
        for case in sorted(result["cases"], key=lambda case: case["batch"])
        if (case["grid"], case["placement"]) == (2, "device") and case["batch"] <= BATCH
        if case["dtype"] == "float16" or case["kernel"] == "mask"
    }
    figures = ", ".join(f"{kernel} {resample or ''}".strip() + f" {s:.2f}" for (kernel, resample), s in shares.items())
    return Outcome("passed", "", f"of the copy rate: {figures}", result)


def run_stream(place: Place) -> list[str]:
    """On the generated data if it exists, else on data of its own."""
    files = [path for end, path in data(place).items() if end != "tiles"] if data_is_there(place, "ris", "neg") else []
    return benchmark(place, "gpu_stream", *files, *(["--quick"] if place.pretended else ["--pairs", 5, "--no-sweep"]))


def read_stream(place: Place, run: Run) -> Outcome:
    """Failed if the host waits for a GPU that has other work."""
    if run.code != 0:
        return Outcome("failed", last_error(run.log))
    result = result_of(place, "gpu_stream")
    figures = f"{rate(result)}, {result['ratio_decode_only']['median']:.2f} of decode-only; hardware decoder off by "
    figures += f"{result['hardware_difference']['max']} levels at most"
    if result["next_while_busy"]["synchronises"] and not place.pretended:
        return Outcome("failed", "The host waits for a busy GPU (next_while_busy).", figures, result)
    return Outcome("passed", "", figures, result)


def run_loader(place: Place, mode: str) -> list[str] | Outcome:
    """``nemo-dali bench loader`` in a mode."""
    if not data_is_there(place, "ris", "neg", *([] if mode == "stream" else ["tiles"])):
        return Outcome("not run", "The data stage left no files.")
    files, output = data(place), place.work / f"loader-{mode}.json"
    output.unlink(missing_ok=True)
    batch, pairs, steps = (4, 1, 2) if place.pretended else (BATCH, 3, 20)
    options: list[object] = ["--mode", mode, "--device", "cuda", "--dtype", "float16", "--json", output]
    options += ["--batch-size", batch, "--pairs", pairs, "--steps", steps]
    options += [] if mode == "stream" else ["--tiles", files["tiles"]]
    return played(place, "nemo_dali", "bench", "loader", files["ris"], files["neg"], *options)


def read_loader(place: Place, run: Run, mode: str) -> Outcome:
    """Samples per second."""
    if run.code != 0:
        return Outcome("failed", last_error(run.log))
    result = json.loads((place.work / f"loader-{mode}.json").read_text())
    return Outcome("passed", "", rate(result), result)


def rate(result: dict[str, Any]) -> str:
    """The median of a result, for the table."""
    return f"{result['samples_per_s']['median']:,.0f} samples/s"


# --- sanitizers ------------------------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, or in a CUDA toolkit."""
    roots = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), *sorted(glob("/usr/local/cuda*"))]
    folders = [os.path.join(root, end) for root in roots if root for end in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def run_sanitizer(place: Place, tool: str) -> list[str] | Outcome:
    """Some of the kernels' tests under a tool of compute-sanitizer."""
    program = find_sanitizer()
    if program is None:
        return Outcome("not installed", "compute-sanitizer comes with the CUDA toolkit.")
    if find_spec("pytest") is None:
        return Outcome("not run", "pytest is missing: pip install pytest hypothesis.")
    files = [path for path in gpu_tests("kernel-tests") if path.parent.parent.name == "kernels"]
    # A library newer than the driver asks it for functions that it lacks: that is not a kernel's fault.
    options = [
        "--tool",
        tool,
        "--report-api-errors",
        "no",
        "--target-processes",
        "all",
        f"--error-exitcode={SANITIZER_FAILED}",
    ]
    tests = pytest_command(place, tool, files, "gpu and not fuzz")
    return [program, *options, *tests, "-k", SANITIZED]


def read_sanitizer(place: Place, run: Run, tool: str) -> Outcome:
    """Failed if the tool or a test found something, or if no test was run."""
    found = [line.lstrip("= ") for line in run.log.splitlines() if re.match(r"=+ \w+ SUMMARY:", line)]
    tests = read_tests(place, run, tool)
    figures = "; ".join(filter(None, [*dict.fromkeys(found), tests.figures]))
    result = {"summary": found, "tests": tests.result}
    if run.code == SANITIZER_FAILED:
        return Outcome("failed", f"{tool} found errors, see the log.", figures, result)
    if not found:
        return Outcome("failed", tests.why or last_error(run.log), figures, result)
    return Outcome(tests.status, tests.why, figures, result, tests.code)


# --- all -------------------------------------------------------------------------------------------------------------


def doctor_stage() -> Stage:
    """What is installed, and small pipelines; kernels are compiled here, and kept for later stages."""
    command = [sys.executable, "-m", "nemo_dali", "doctor", "--json"]
    what = "what is installed, and whether small pipelines give the right pixels"
    return Stage("doctor", 70, what, lambda place: command, read_doctor, output="doctor.json")


def tests_stage(name: str, limit: float) -> Stage:
    """Tests marked gpu."""
    what = f"tests marked gpu of {', '.join(GROUPS[name]) or 'all else'}"
    required = {"FAIL_WITHOUT_CUDA": "1"}
    read = partial(read_tests, stage=name)
    return Stage(name, limit, what, partial(run_tests, stage=name), read, environment=required)


def loader_stage(mode: str) -> Stage:
    """The Loader's rate."""
    what = f"nemo-dali bench loader --mode {mode}"
    return Stage(f"loader-{mode}", 15, what, partial(run_loader, mode=mode), partial(read_loader, mode=mode))


def sanitizer_stage(tool: str, limit: float) -> Stage:
    """A tool of compute-sanitizer. Without torch's cache the tool knows where each array ends."""
    what = f"compute-sanitizer --tool {tool} on tests of the kernels, if it is installed"
    required = {"FAIL_WITHOUT_CUDA": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    read = partial(read_sanitizer, tool=tool)
    return Stage(tool, limit, what, partial(run_sanitizer, tool=tool), read, environment=required)


STAGES = (
    doctor_stage(),
    Stage("data", 25, "generated photos, and tiles of them", make_data, read_data, there=data_is_there),
    tests_stage("kernel-tests", 50),
    tests_stage("loader-tests", 60),
    tests_stage("other-tests", 75),
    Stage("gpu_kernels", 55, "benchmarks/gpu_kernels.py: bytes, and share of the copy rate", run_kernels, read_kernels),
    Stage("gpu_stream", 40, "benchmarks/gpu_stream.py: photos decoded by the GPU", run_stream, read_stream),
    *(loader_stage(mode) for mode in ("stream", "pinned", "device")),
    *(sanitizer_stage(tool, limit) for tool, limit in (("memcheck", 25), ("racecheck", 20), ("synccheck", 15))),
)
