"""The README's table of what has run where says what the records in benchmarks/results say, and nobody else says it."""

import json
import re

import pytest

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"
# The stages of gpu_check.py that must have passed on a device for a row, by its first words of code, to have run there.
STAGES = {
    "mosaic": {"kernel-tests", "gpu_kernels"},
    "gather": {"kernel-tests", "gpu_kernels"},
    "letterbox": {"kernel-tests", "loader-tests"},
    "mask": {"kernel-tests", "gpu_kernels"},
    "text": {"kernel-tests", "loader-tests"},
    'Loader(device="cuda")': {"loader-tests", "gpu_stream", "loader-stream"},
    'placement="pinned"': {"loader-tests", "loader-pinned", "loader-device"},
    "nemo_dali.fn": {"kernel-tests"},
    "nemo-dali tiles --device cuda": {"data", "loader-tests"},
    "nemo-dali mine --device cuda": {"other-tests"},
    "nemo-dali doctor": {"doctor", "other-tests"},
    "benchmarks/gpu_kernels.py": {"gpu_kernels", "gpu_stream"},
    "ranks": None,  # on several GPUs: no stage tries it
}
KERNELS = {path.parent.name for path in (ROOT / "kernels").glob("*/gpu.py")}


def table(text):
    """Names of the table's rows, and what is in their cells behind the first."""
    part = text.split("### What has run where")[1].split("\n#")[0]
    for line in re.findall(r"^\| (?!---)(\w.+|`.+) \|$", part, re.MULTILINE):
        feature, *cells = line.split(" | ")
        code = re.search(r"`([^`]+)`", feature)
        yield (code[1] if code else feature.split()[0]), cells


def rows(text):
    return dict(table(text))


def passed_on(results, stages):
    """Folders of the devices on which all of these stages have passed; what was pretended is none."""
    devices = set()
    for path in results.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        passed = {one["stage"] for one in summary["stages"] if one["status"] == "passed"}
        if not summary["pretended"] and stages is not None and stages <= passed:
            devices.add(path.parent.name)
    return devices


def wrong_rows(text, results):
    """Rows whose last cell is neither "no" where no device has run them, nor links all summaries of those that have."""
    wrong = {}
    for name, cells in rows(text).items():
        linked = set(re.findall(r"\]\(benchmarks/results/([^/)]+)/summary\.md\)", cells[-1]))
        devices = passed_on(results, STAGES[name])
        if linked != devices or (cells[-1] == "no") != (not devices):
            wrong[name] = (cells[-1], devices)
    return wrong


def test_every_row_says_what_the_records_say():
    assert list(rows(README)) == list(STAGES)
    assert wrong_rows(README, RESULTS) == {}


def test_compilers_and_ptx_are_of_kernels_and_of_all_of_them():
    found = rows(README)
    assert set(found) >= KERNELS
    for name, (_, ptx, compiled, _) in found.items():
        if name in KERNELS:  # its tests run its PTX
            tests = (ROOT / "tests" / "kernels" / name / "test_gpu.py").read_text("utf-8")
            assert re.search(r"from tests\.helpers\.(cpu_launches|ptx)", tests)
        assert (ptx, compiled) == (("yes", "yes") if name in KERNELS else ("–", "–"))  # noqa: RUF001


def record(folder, device, *, pretended=False, **status):
    names = {stage for stages in STAGES.values() for stage in stages or ()}
    stages = [{"stage": name, "status": status.get(name.replace("-", "_"), "passed")} for name in sorted(names)]
    (folder / device).mkdir()
    (folder / device / "summary.json").write_text(json.dumps({"pretended": pretended, "stages": stages}))


def saying(names, cell):
    """The README with this last cell in some rows and "no" in the others."""
    text = README
    for name, cells in table(README):
        line = next(line for line in text.splitlines() if line.endswith(f"| {cells[-1]} |") and named(line, name))
        text = text.replace(line, line.removesuffix(f"{cells[-1]} |") + f"{cell if name in names else 'no'} |")
    return text


def named(line, name):
    first = line.split(" | ")[0]
    return f"`{name}`" in first or first.startswith(f"| {name} ")


def test_a_table_that_says_too_much_or_too_little_is_found(tmp_path):
    link = "[H100](benchmarks/results/nvidia-h100/summary.md)"
    assert wrong_rows(saying((), ""), tmp_path) == {}
    assert set(wrong_rows(saying(STAGES, link), tmp_path)) == set(STAGES)
    record(tmp_path, "pretended", pretended=True)
    assert wrong_rows(saying((), ""), tmp_path) == {}
    record(tmp_path, "nvidia-h100", loader_tests="failed")
    ran = {name for name, stages in STAGES.items() if stages is not None and "loader-tests" not in stages}
    assert set(wrong_rows(saying((), ""), tmp_path)) == ran >= {"mosaic", "gather", "mask"}
    assert wrong_rows(saying(ran, link), tmp_path) == {}
    assert set(wrong_rows(saying({*ran, "letterbox"}, link), tmp_path)) == {"letterbox"}
    assert set(wrong_rows(saying(ran, "yes"), tmp_path)) == ran
    record(tmp_path, "nvidia-l4")
    assert set(wrong_rows(saying(ran, link), tmp_path)) == set(STAGES) - {"ranks"}


@pytest.mark.parametrize("folder", ["README.md", "docs", "nemo_dali", "kernels", "benchmarks", "examples"])
def test_the_table_is_the_only_place_that_says_what_no_gpu_has_run(folder):
    paths = [ROOT / folder] if folder.endswith(".md") else sorted((ROOT / folder).rglob("*"))
    stale = re.compile(
        r"no gpu\W+has\W+(run|confirmed)|not\W+run\W+on\W+a\W+gpu|has not been run on a gpu", re.IGNORECASE
    )
    for path in paths:
        if path.suffix in (".md", ".py", ".cu", ".cuh"):
            assert not stale.search(path.read_text("utf-8")), path
