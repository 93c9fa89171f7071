"""The check of a GPU: its stages hide nothing of each other, it goes on where it stood, and it can be rehearsed."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.cuda_host import needs_compiler
from tests.helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
check, runs, setup, stages, summaries = map(
    importlib.import_module, ("gpu_check", "gpu_run", "gpu_setup", "gpu_stages", "gpu_summary")
)


@pytest.fixture
def place(tmp_path):
    return runs.Place(tmp_path / "results", tmp_path / "work", "A GPU", "abc", "digest", {"python": "3"})


def stage(name, code, *, limit=60, read=None, **options):
    """A stage that runs Python code; what it prints goes to its log."""
    command = [sys.executable, "-c", code]
    passed = runs.Outcome("passed", figures="1 thing")
    return runs.Stage(name, limit, "a test", lambda place: command, read or (lambda place, run: passed), **options)


def by_name(records):
    return {record["stage"]: record for record in records}


def alive(process):
    """Whether a process runs; one that has ended may wait for somebody to ask how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def unreadable(place, run):
    return json.loads("{")


def counted(folder, name):
    """Code that leaves a file for each time that it is run."""
    return f"import tempfile; tempfile.mkstemp(dir={str(folder)!r}, prefix='{name}-')"


# A process and a child of it that both hang; the child's number is in a file.
HANG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("{file}", "w").write(str(child.pid))
time.sleep(600)
"""


def test_a_stage_hides_nothing_of_another(place, tmp_path):
    file = tmp_path / "child"
    some = [
        stage("hanging", HANG.format(file=file), limit=3),
        stage("failing", "print('no luck'); raise SystemExit(3)"),
        stage("crashing", "import os; print('here', flush=True); os.kill(os.getpid(), 11)"),
        stage("unreadable", "", read=unreadable),
        replace(stage("absent", ""), command=lambda place: runs.Outcome("not run", "Nothing is there.")),
        stage("sound", "print('fine')"),
    ]
    found = by_name(runs.run_all(some, place))
    assert {name: record["status"] for name, record in found.items()} == {
        "failing": "failed",
        "crashing": "crashed",
        "hanging": "timed out",
        "unreadable": "failed",
        "absent": "not run",
        "sound": "passed",
    }
    assert "Exit code 3. no luck" in found["failing"]["why"] and "Killed by SIGSEGV at File" in found["crashing"]["why"]
    assert "JSONDecodeError" in found["unreadable"]["why"] and found["sound"]["figures"] == "1 thing"
    assert {name for name, record in found.items() if record["done"]} == {"failing", "crashing", "unreadable", "sound"}
    assert not alive(int(file.read_text()))
    assert 'File "<string>", line 5' in (place.folder / "hanging.log").read_text()  # where it hung
    for name, record in found.items():
        assert json.loads((place.folder / f"{name}.json").read_text()) == record
        assert (record["revision"], record["source"], record["pretended"]) == ("abc", "digest", False)
    summary = summaries.write_summary(place, some)
    assert not summary["passed"] and [row["stage"] for row in summary["stages"]] == [one.name for one in some]
    text = (place.folder / "summary.md").read_text()
    assert "| hanging | **timed out** |" in text and "| sound | passed |" in text and "pretended" not in text.lower()


def test_it_goes_on_where_it_stood(place, tmp_path):
    some = [
        stage("slow", counted(tmp_path, "slow") + "; import time; time.sleep(600)", limit=1),
        stage("sound", counted(tmp_path, "sound")),
        stage("failing", counted(tmp_path, "failing") + "; raise SystemExit(1)"),
    ]

    def times(*again, here=place, of=some):
        for path in tmp_path.glob("*-*"):
            path.unlink()
        runs.run_all(of, here, again=again)
        return [len([*tmp_path.glob(f"{one.name}-*")]) for one in of]

    assert times() == [1, 1, 1]
    assert times() == [1, 0, 0]
    assert times("sound") == [1, 1, 0]
    assert times("all") == [1, 1, 1]
    assert times(here=replace(place, source="other")) == [1, 1, 1]
    assert times(here=replace(place, setup={"python": "4"})) == [1, 1, 1]
    gone = [replace(one, there=lambda place: False) for one in some[1:2]]  # what it left for others
    assert times(here=replace(place, setup={"python": "4"}), of=gone) == [1]
    for broken in ("", "[]", '{"done"'):
        (place.folder / "failing.json").write_text(broken)
        assert times(here=replace(place, setup={"python": "4"}), of=some[2:]) == [1]


def test_what_a_stage_leaves_of_its_time_the_next_may_use(place):
    some = [stage("short", "", limit=40), stage("next", "", limit=10), stage("last", "", limit=30)]
    limits = [record["limit_s"] for record in runs.run_all(some, place)]
    assert limits[:2] == [40, 20] and 55 < limits[2] <= 60  # as much again as its own, and no more
    limits = [record["limit_s"] for record in runs.run_all(some, place, again=["next", "last"])]
    assert limits[0] == 40 and limits[1] == 10  # nothing of a stage that was not run


def test_an_interrupt_leaves_records_and_no_process(place, tmp_path):
    file = tmp_path / "child"
    interrupt = f"import os, signal; open({str(file)!r}, 'w').write(str(os.getpid())); "
    interrupt += "os.kill(os.getppid(), signal.SIGINT); import time; time.sleep(600)"
    some = [stage("sound", ""), stage("interrupted", interrupt), stage("last", "")]
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(some, place)
    assert not alive(int(file.read_text()))
    found = [runs.read_record(place, one) for one in some]
    assert [record.get("status") for record in found] == ["passed", "interrupted", None]
    summary = summaries.write_summary(place, some)
    assert [row["status"] for row in summary["stages"]] == ["passed", "interrupted", "not run"]
    assert [runs.is_done(record, place, one) for record, one in zip(found, some, strict=True)] == [True, False, False]


def test_a_summary_is_there_from_the_first_stage_on(place):
    some, seen = [stage("one", ""), stage("two", "")], []
    runs.run_all(some, place, after_each=lambda: seen.append(summaries.write_summary(place, some)))
    statuses = [[row["status"] for row in summary["stages"]] for summary in seen]
    assert statuses == [["passed", "not run"], ["passed", "passed"]]
    assert [summary["passed"] for summary in seen] == [False, True]


def test_what_tests_noted_is_in_the_summary(place):
    noted = runs.Outcome("passed", result={"noted": {"damaged JPEG, zeros": "shown"}})
    some = [stage("one", "", read=lambda place, run: noted), stage("two", "")]
    runs.run_all(some, place)
    summaries.write_summary(place, some)
    assert "* damaged JPEG, zeros: shown\n" in place.file("summary.md").read_text()
    pretended = replace(place, pretended=True)
    runs.run_all(some, pretended)
    assert json.loads(pretended.file("one.json").read_text())["result"]["pretended"] is True


def test_a_record_that_is_being_made_is_not_done(place):
    """That is what a kill of the check itself leaves."""
    seen = []

    def look(place):
        seen.append(json.loads((place.folder / "one.json").read_text()))
        return runs.Outcome("passed")

    runs.run_all([replace(stage("one", ""), command=look)], place)
    assert seen[0]["status"] == "begun" and not seen[0]["done"]


# --- the stages ------------------------------------------------------------------------------------------------------


def test_the_limits_add_up_to_eight_minutes(capsys):
    assert check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*(one.name for one in stages.STAGES), "together"]
    assert sum(one.limit for one in stages.STAGES) <= 480


def test_every_file_with_tests_for_a_gpu_is_in_one_stage():
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    grouped = [path for group in stages.GROUPS for path in stages.gpu_tests(group)]
    assert len(grouped) == len(set(grouped)) and set(grouped) == marked - {ROOT / "tests/benchmarks/test_gpu_check.py"}


TESTS = {
    "passing": "def test_a(record_property): record_property('decoder', 'grey')\ndef test_b(): pass",
    "failing": "def test_c(): assert 0, 'wrong bytes'",
    "skipped": "import pytest\ndef test_d(): pytest.skip('no nvcc')",
    "lacking": "import no_such_package.of_mine\ndef test_e(): pass",
}


@pytest.mark.parametrize(
    ("names", "status", "why", "figures"),
    [
        (["passing"], "passed", "", "2 passed"),
        (["failing", "passing"], "failed", "wrong bytes", "2 passed, 1 failure"),
        (["passing", "skipped"], "failed", "no nvcc", "2 passed, 1 skipped"),
        (["lacking", "passing"], "failed", "no_such_package is missing: install what", "2 passed, 1 error"),
        ([], "failed", "No test was run.", ""),
    ],
)
def test_skipped_tests_are_failures_and_a_missing_module_is_named(place, tmp_path, names, status, why, figures):
    for name, text in TESTS.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    files = [tmp_path / f"test_{name}.py" for name in names] or [tmp_path / "test_passing.py"]
    place.work.mkdir()
    command = stages.pytest_command(place, "kernel-tests", files, "" if names else "gpu")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = runs.judge(
        stage("kernel-tests", "", read=lambda place, run: stages.read_tests(place, run, "kernel-tests")),
        place,
        runs.Run(done.returncode, done.stdout + done.stderr),
    )
    assert (found.status, found.figures) == (status, figures), (found, done.stdout, done.stderr)
    assert why in found.why
    assert not names or found.result["noted"] == {"decoder": "grey"}


def test_tests_that_had_no_time_to_end_are_counted(place):
    place.work.mkdir(parents=True)
    log = "tests/a.py::test_a PASSED [ 1%]\ntests/a.py::test_b[x] PASSED [ 2%]\ntests/a.py::test_c FAILED [ 3%]\n"
    found = runs.judge(
        stage("x", "", read=lambda place, run: stages.read_tests(place, run, "x")), place, runs.Run(None, log, 9)
    )
    assert (found.status, found.figures) == ("timed out", "2 passed, 1 failed")


def test_without_pytest_a_sentence_says_so(place, monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "/bin/true")
    for found in (stages.run_tests(place, "other-tests"), stages.run_sanitizer(place, "memcheck")):
        assert found == runs.Outcome("not run", "pytest is missing: pip install pytest hypothesis.")


def test_a_doctor_that_cannot_begin_says_what_is_missing(place):
    place.work.mkdir(parents=True)
    (place.work / "doctor.json").write_text("")
    found = stages.read_doctor(place, runs.Run(1, "Traceback\nModuleNotFoundError: No module named 'typer'\n"))
    assert found == runs.Outcome("failed", "typer is missing: install what pyproject.toml lists.")
    report = {"findings": [{"level": "problem", "what": "CuPy is old."}, {"level": "warning", "what": "x"}]}
    (place.work / "doctor.json").write_text(json.dumps(report))
    found = stages.read_doctor(place, runs.Run(1, ""))
    assert (found.status, found.why, found.figures) == ("failed", "CuPy is old.", "problems: 1, warnings: 1")


def test_a_sanitizer_is_given_tests_of_every_kernel(place):
    place.work.mkdir(parents=True)
    files = [path for path in stages.gpu_tests("kernel-tests") if path.parent.parent.name == "kernels"]
    command = [*stages.pytest_command(place, "memcheck", files, "gpu and not fuzz"), "-k", stages.SANITIZED]
    listed = subprocess.run([*command, "--collect-only", "-qq"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {path.parent.name for path in files} == {"gather", "letterbox", "mask", "mosaic", "text"}
    for path in files:
        assert f"tests/kernels/{path.parent.name}/test_gpu.py" in listed, path


@pytest.mark.parametrize(
    ("code", "summary", "status"),
    [(0, "========= ERROR SUMMARY: 0 errors\n", "passed"), (86, "========= ERROR SUMMARY: 3 errors\n", "failed")],
)
def test_what_a_sanitizer_says(place, monkeypatch, code, summary, status):
    monkeypatch.setattr(stages, "read_tests", lambda *_: runs.Outcome("passed", figures="9 passed"))
    found = stages.read_sanitizer(place, runs.Run(code, summary), "memcheck")
    assert found.status == status and found.figures == f"{summary.strip('=').strip()}; 9 passed"
    monkeypatch.setattr(stages, "find_sanitizer", lambda: None)
    assert stages.run_sanitizer(place, "memcheck").status == "not installed"


def test_a_host_that_waits_for_a_busy_gpu_fails_the_stage(place):
    (place.work / "gpu_stream").mkdir(parents=True)
    result = {"samples_per_s": {"median": 12345.6}, "ratio_decode_only": {"median": 0.9}}
    result |= {"hardware_difference": {"max": 3}}
    for waits in (False, True):
        document = result | {"next_while_busy": {"synchronises": waits}}
        (place.work / "gpu_stream" / "gpu_stream.x.json").write_text(json.dumps(document))
        found = stages.read_stream(place, runs.Run(0, ""))
        assert found.status == ("failed" if waits else "passed")
        assert found.figures == "12,346 samples/s, 0.90 of decode-only; hardware decoder off by 3 levels at most"


# --- the sources -----------------------------------------------------------------------------------------------------


def test_without_git_the_sources_have_a_name_of_their_own(monkeypatch, tmp_path):
    assert not setup.revision_of().startswith("sources")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.revision_of() == f"sources {setup.digest_of_sources()}"
    files = {str(path.relative_to(ROOT)) for path in setup.source_files()}
    assert {"nemo_dali/metrics.py", "kernels/mosaic/mosaic.cu", "pyproject.toml", "tests/conftest.py"} <= files
    assert not any("results" in file or "__pycache__" in file for file in files)


def test_without_a_gpu_a_sentence_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "first_gpu", dict)
    with pytest.raises(SystemExit) as ended:
        check.main(["--output", str(tmp_path)])
    assert ended.value.code == 1 and "--pretend" in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", ["doctor", "doctor=", "doctor=0", "doctor=x", "nobody=3", "doctor=nan"])
def test_limits_that_cannot_be(text, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main(["--list", "--limit", text])
    assert ended.value.code == 2 and f"--limit ({text}) must be" in capsys.readouterr().err


# --- the rehearsal ---------------------------------------------------------------------------------------------------

# What compute-sanitizer does, as far as the check can tell.
SANITIZER = """#!{python}
import subprocess, sys
command = sys.argv[1:]
code = subprocess.run(command[command.index({python!r}):]).returncode
print("========= ERROR SUMMARY: 0 errors", flush=True)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.process
@needs_compiler
def test_a_rehearsal_runs_every_stage_and_can_be_taken_for_no_record(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("g++", "as", "ld"):  # no git
        (programs / name).symlink_to(shutil.which(name))
    (programs / "compute-sanitizer").write_text(SANITIZER.format(python=sys.executable))
    (programs / "compute-sanitizer").chmod(0o755)
    output, names = tmp_path / "results", [one.name for one in stages.STAGES]
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--pretend", "--output", output]
    command += ["--work", tmp_path / "work"]
    environment = {**os.environ, "PATH": str(programs)}

    first = subprocess.run([*command, "--limit", "doctor=0.1"], env=environment, capture_output=True, text=True)
    assert first.returncode == 1 and first.stderr == "", first.stderr
    assert first.stdout.count("timed out in") == 1 and first.stdout.count("\n") == 2 * len(names) + 2
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("at this revision before") == len(names) - 1 and "[1/13] doctor: what" in again.stdout

    (folder,) = output.iterdir()
    assert folder.name == "pretended" and all(".pretended." in path.name for path in folder.iterdir())
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["pretended"] is True
    summary = json.loads((folder / "summary.pretended.json").read_text())
    assert [row["status"] for row in summary["stages"]] == ["passed"] * len(names)
    assert summary["revision"] == f"sources {summary['source']}" and len(summary["unreached"]) > 3
    assert {"python", "torch", "numpy", "numba-cuda", "torch's CUDA"} <= set(summary["setup"])
    text = (folder / "summary.pretended.md").read_text()
    assert text.startswith("# pretended\n") and "rehearsal" in text and all(f"| {name} |" in text for name in names)
    records = {name: json.loads((folder / f"{name}.pretended.json").read_text()) for name in names}
    assert records["kernel-tests"]["result"]["counts"]["error"] > 100
    assert records["memcheck"]["result"]["tests"]["counts"]["error"] > 20
    assert {case["kernel"] for case in records["gpu_kernels"]["result"]["cases"]} == {"mosaic", "mask", "gather"}
    assert records["gpu_stream"]["result"]["memory_mib"] == {"device": 0, "torch": 0}
    assert records["loader-device"]["result"]["mode"] == "device"
    assert all(record["result"] is None or record["result"]["pretended"] for record in records.values())


@pytest.mark.slow
@pytest.mark.process
@needs_compiler
def test_the_check_ends_in_good_order_where_it_is_told_to(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--pretend", "--output", tmp_path, "--work", tmp_path / "w"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "records go to" in process.stdout.readline() and "[1/13] doctor" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert "goes on from here" in process.communicate(timeout=60)[0] and process.returncode == 130
    record = json.loads((tmp_path / "pretended" / "doctor.pretended.json").read_text())
    assert record["status"] == "interrupted" and not record["done"]
    summary = json.loads((tmp_path / "pretended" / "summary.pretended.json").read_text())
    assert not summary["passed"] and summary["stages"][1]["status"] == "not run"
