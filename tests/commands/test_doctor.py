"""Rules on machines that are not at hand, what is read from this one, and the command."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from nemo_dali.commands.cli import main
from nemo_dali.commands.doctor import findings as rules
from nemo_dali.commands.doctor import machine as probe
from nemo_dali.commands.doctor.driver import Driver, Gpu
from nemo_dali.commands.doctor.findings import (
    Finding,
    best_extra,
    diagnose,
    fitting_extras,
    raise_problems,
    render,
    report,
)
from nemo_dali.commands.doctor.machine import LIBRARIES, Answer, Facts, Package
from nemo_dali.commands.doctor.self_check import SIZES, Decoders, Pixels, check_pixels, compare_decoders
from nemo_dali.errors import NemoError
from tests.helpers.cuda_host import needs_compiler
from tests.helpers.paths import ROOT

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85 << 30)
V100 = Gpu("Tesla V100-SXM2-16GB", (7, 0), 16 << 30)
DRIVER_12 = Driver("570.86.15", "12.8", (H100,))
DRIVER_13 = Driver("580.82.07", "13.0", (H100, H100))
OLD_DRIVER = Driver("470.82.01", "11.4", (V100,))


def pixels(device="cpu", photos="JPEG", **changes):
    values = {"wrong_values": 0, "wrong_mask": 0, "mean_difference": 0.0, "largest_difference": 0.0, **changes}
    exact = device == "cpu" or photos == "PNG"
    return Pixels(device=device, resample="cv2-linear", photos=photos, exact=exact, values=1000, **values)


def machine(packages=(), **changes):
    """A machine with everything for CUDA 12 and a GPU, and what is different on it."""
    healthy = {name: Package((name.lower(),), "2.0") for name in LIBRARIES}
    healthy |= {
        "DALI": Package(("nvidia-dali-cuda120",), "2.4.0", "12.9"),
        "torch": Package(("torch",), "2.10.0+cu128", "12.8"),
        "CuPy": Package(("cupy-cuda12x",), "14.2.0", "12.9"),
        "numba-cuda": Package(("numba-cuda",), "0.30.4", "12.9"),
        "Pillow": Package(("pillow",), "12.3.0"),
    }
    facts = Facts(
        python="3.11.7",
        nemo_dali="0.1.0",
        packages=healthy | dict(packages),
        driver=DRIVER_12,
        nvrtc=Answer("12.8"),
        nvvm=Answer("12.8"),
        cores=16,
        core_quota=None,
        shared_memory=8 << 30,
        open_files=1 << 20,
        cache=Answer("/home/user/.cache/numba"),
        pixels={"cpu cv2-linear JPEG": Answer(pixels()), "cuda cv2-linear PNG": Answer(pixels("cuda", "PNG"))},
    )
    return replace(facts, **changes)


MISSING = Package(error="ModuleNotFoundError: No module named 'x'")
TORCH_13 = {"torch": Package(("torch",), "2.15.0", "13.2")}
ALL_13 = TORCH_13 | {
    "DALI": Package(("nvidia-dali-cuda130",), "2.4.0", "13.0"),
    "CuPy": Package(("cupy-cuda13x",), "14.2.0", "13.0"),
    "numba-cuda": Package(("numba-cuda",), "0.30.4", "13.1"),
}
COMPILERS_13 = {"nvrtc": Answer("13.0"), "nvvm": Answer("13.0")}


def not_ok(facts):
    return [finding for finding in diagnose(facts) if finding.level != "ok"]


@pytest.mark.parametrize(
    "facts",
    [
        machine(),
        machine(driver=DRIVER_13),
        machine(ALL_13, driver=DRIVER_13, **COMPILERS_13),
        machine(driver=Driver("525.60.13", "12.0", (V100, H100))),
        machine(driver=None),
        machine({"CuPy": MISSING, "numba-cuda": MISSING}, driver=None),
        machine({"CuPy": MISSING}, driver=Driver("570.86.15", "12.8")),
        machine({"torch": Package(("torch",), "2.10.0+cpu")}, driver=None),
        machine(core_quota=16.0, shared_memory=None, open_files=None),
    ],
)
def test_a_healthy_machine_has_no_problem(facts):
    assert not_ok(facts) == []
    assert report(facts, diagnose(facts))["ok"]
    raise_problems(diagnose(facts))


SWAP_TO_12 = (
    "pip install 'nvidia-dali-cuda120>=2.4,<2.5' 'cupy-cuda12x[ctk]>=14' 'numba-cuda[cu12]>=0.30' 'numpy<2.5' "
    "'torch<2.11' torchvision"
)
SWAP_TO_13 = SWAP_TO_12.replace("120", "130").replace("12x", "13x").replace("cu12", "cu13").replace("<2.11", ">=2.11")
NO_LIBRARY = "OSError: libcudart.so.12: cannot open shared object file"
CASES = {
    "a driver of before CUDA 12": (
        machine(driver=OLD_DRIVER),
        "problem",
        ["470.82.01", "11.4"],
        ["525.60.13", "580.65.06"],
    ),
    "a driver that does not start": (
        machine(driver=Driver("570.86.15", "12.8", error="CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)")),
        "problem",
        ["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)"],
        ["Restart", "--gpus all"],
    ),
    "torch for CUDA 13, all else for 12, driver of 12": (
        machine(TORCH_13),
        "problem",
        ["up to 12.8", "for CUDA 12: DALI, CuPy, numba-cuda; for CUDA 13: torch"],
        [SWAP_TO_12, "580.65.06"],
    ),
    "everything for CUDA 13, driver of 12": (
        machine(ALL_13),
        "problem",
        ["up to 12.8", "for CUDA 13: DALI, CuPy, numba-cuda, torch"],
        [f"pip uninstall -y nvidia-dali-cuda130 cupy-cuda13x && {SWAP_TO_12}"],
    ),
    "DALI for CUDA 13, torch for 12, driver of 12": (
        machine({"DALI": ALL_13["DALI"]}),
        "problem",
        ["for CUDA 13: DALI"],
        [f"pip uninstall -y nvidia-dali-cuda130 && {SWAP_TO_12}"],
    ),
    "everything for CUDA 13, driver of 13, a GPU that is too old": (
        machine(ALL_13, driver=replace(DRIVER_13, gpus=(H100, V100))),
        "problem",
        ["CUDA 13 has no code", "for CUDA 13: DALI"],
        [SWAP_TO_12],
    ),
    "torch for CUDA 13, all else for 12, driver of 13": (
        machine(TORCH_13, driver=DRIVER_13),
        "warning",
        ["for CUDA 13: torch", "580.65.06"],
        [f"pip uninstall -y nvidia-dali-cuda120 cupy-cuda12x && {SWAP_TO_13}"],
    ),
    "torch for CUDA 13, all else for 12, no GPU": (
        machine(TORCH_13, driver=None),
        "warning",
        ["for CUDA 13: torch", "580.65.06"],
        [SWAP_TO_13],
    ),
    "torch of CUDA 11": (
        machine({"torch": Package(("torch",), "2.4.0+cu118", "11.8")}),
        "warning",
        ["for CUDA 11: torch"],
        [SWAP_TO_12],
    ),
    "torch without CUDA beside a GPU": (
        machine({"torch": Package(("torch",), "2.10.0+cpu")}),
        "problem",
        ["2.10.0+cpu", "without CUDA"],
        ["pip install 'torch<2.11' torchvision"],
    ),
    "both DALI wheels": (
        machine({"DALI": Package(("nvidia-dali-cuda120", "nvidia-dali-cuda130"), "2.4.0", "12.9")}),
        "problem",
        ["nvidia-dali-cuda120 and nvidia-dali-cuda130"],
        ["pip uninstall -y nvidia-dali-cuda120 nvidia-dali-cuda130 && pip install 'nvidia-dali-cuda120>=2.4,<2.5'"],
    ),
    "both CuPy wheels": (
        machine({"CuPy": Package(("cupy-cuda12x", "cupy-cuda13x"), "14.2.0", "12.9")}),
        "problem",
        ["cupy-cuda12x and cupy-cuda13x"],
        ["pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install 'cupy-cuda12x[ctk]>=14'"],
    ),
    "no open_clip, which the loader can do without": (
        machine({"open_clip": MISSING}),
        "warning",
        ["open_clip is not installed; CLIP models and the tokenizer 'clip' need it"],
        ["pip install 'nemo-dali[mining]'"],
    ),
    "no DALI": (machine({"DALI": MISSING}, driver=None), "problem", ["DALI is not installed"], ["nvidia-dali-cuda120"]),
    "no CuPy beside a GPU": (
        machine({"CuPy": MISSING}),
        "problem",
        ["CuPy is not installed"],
        ["pip install 'cupy-cuda12x[ctk]>=14'"],
    ),
    "no CuPy beside a GPU, torch for CUDA 13": (
        machine(ALL_13 | {"CuPy": MISSING}, driver=DRIVER_13, **COMPILERS_13),
        "problem",
        ["CuPy is not installed"],
        ["pip install 'cupy-cuda13x[ctk]>=14'"],
    ),
    "torch that does not load": (
        machine({"torch": Package(("torch",), error=NO_LIBRARY)}),
        "problem",
        [f"torch cannot be imported: {NO_LIBRARY}"],
        ["pip install --force-reinstall 'torch<2.11' torchvision"],
    ),
    "CuPy that does not load, no GPU": (
        machine({"CuPy": Package(("cupy-cuda12x",), error=NO_LIBRARY)}, driver=None),
        "warning",
        ["CuPy cannot be imported"],
        ["--force-reinstall 'cupy-cuda12x[ctk]>=14'"],
    ),
    "Pillow 13": (
        machine({"Pillow": Package(("pillow",), "13.0.0")}),
        "warning",
        ["Pillow 13.0.0", "a different order"],
        ["'pillow>=10.1,<13'"],
    ),
    "no NVVM": (
        machine(nvvm=Answer(error="DynamicLibNotFoundError: nvvm")),
        "problem",
        ["numba-cuda cannot compile", "NVVM", "DynamicLibNotFoundError"],
        ["pip install 'numba-cuda[cu12]>=0.30' 'numpy<2.5'"],
    ),
    "no NVVM, no GPU": (machine(nvvm=Answer(error="nvvm"), driver=None), "warning", ["NVVM"], ["numba-cuda[cu12]"]),
    "no NVRTC": (
        machine(nvrtc=Answer(error="libnvrtc.so.12")),
        "problem",
        ["CuPy cannot compile", "libnvrtc.so.12"],
        ["cupy-cuda12x[ctk]"],
    ),
    "a compiler newer than the driver": (
        machine(nvvm=Answer("13.0")),
        "problem",
        ["CUDA 13.0", "up to 12.8"],
        ["numba-cuda[cu12]"],
    ),
    "a container's /dev/shm": (machine(shared_memory=64 << 20), "warning", ["64 MiB"], ["--shm-size=1g"]),
    "few open files": (machine(open_files=512), "warning", ["512", "up to 64 2x2 mosaics"], ["832", "ulimit"]),
    "next to no open files": (machine(open_files=260), "problem", ["260", "up to 1 2x2 mosaics"], ["ulimit"]),
    "a container's cores": (machine(core_quota=2.5), "warning", ["16 cores", "2.5"], ["num_threads=2"]),
    "no place for compiled kernels": (
        machine(cache=Answer(error="PermissionError: read-only")),
        "warning",
        ["PermissionError"],
        ["NUMBA_CACHE_DIR"],
    ),
    "a place for compiled kernels that does not last": (
        machine(cache=Answer(None)),
        "warning",
        ["20 s"],
        ["NUMBA_CACHE_DIR"],
    ),
    "a wrong pixel": (
        machine(pixels={"cpu cv2-linear JPEG": Answer(pixels(wrong_values=1))}),
        "problem",
        ["on cpu", "cv2-linear", "1 of 1,000 values"],
        ["Delete /home/user/.cache/numba", "constraints.txt"],
    ),
    "a wrong mask": (
        machine(pixels={"cuda cv2-linear JPEG": Answer(pixels("cuda", wrong_mask=7, mean_difference=0.3))}),
        "problem",
        ["on cuda", "7 mask pixels"],
        ["device='cpu'"],
    ),
    "a GPU that decodes to something else": (
        machine(pixels={"cuda cv2-linear JPEG": Answer(pixels("cuda", wrong_values=900, mean_difference=1.5))}),
        "problem",
        ["1.50 levels"],
        ["device='cpu'"],
    ),
    "a GPU that decodes a patch to something else": (
        machine(pixels={"cuda cv2-linear JPEG": Answer(pixels("cuda", wrong_values=9, largest_difference=40.0))}),
        "problem",
        ["40 at most"],
        ["device='cpu'"],
    ),
    "one level on PNG": (
        machine(pixels={"cuda cv2-linear PNG": Answer(pixels("cuda", "PNG", wrong_values=1, largest_difference=1.0))}),
        "problem",
        ["PNG", "1 of 1,000 values"],
        ["device='cpu'"],
    ),
    "a pipeline that fails": (
        machine(pixels={"cpu cv2-linear JPEG": Answer(error="the process ended with SIGSEGV")}),
        "problem",
        ["failed", "SIGSEGV"],
        ["constraints.txt"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_found_and_has_a_remedy(case):
    facts, level, words, remedy = CASES[case]
    (finding,) = not_ok(facts)
    assert finding.level == level
    for word in words:
        assert word in finding.what
    for word in remedy:
        assert word in finding.remedy
    findings = diagnose(facts)
    assert finding.what in render(facts, findings) and finding.remedy in render(facts, findings)
    assert report(facts, findings)["ok"] == (level != "problem")
    if level == "problem":
        with pytest.raises(NemoError, match=r"^1 problem found\. ") as raised:
            raise_problems(findings)
        assert finding.what in str(raised.value) and finding.remedy in str(raised.value)


def test_what_nvjpeg_may_differ_is_no_fault():
    found = pixels("cuda", wrong_values=500, mean_difference=0.4, largest_difference=5.0)
    facts = machine(pixels={"cuda cv2-linear JPEG": Answer(found)})
    assert not_ok(facts) == [] and "0.40 levels" in render(facts, diagnose(facts))


def test_several_problems_are_all_named():
    with pytest.raises(NemoError, match=r"^2 problems found\. .*CuPy is not installed.*wrong pixels"):
        raise_problems(
            diagnose(machine({"CuPy": MISSING}, pixels={"cpu cv2-linear JPEG": Answer(pixels(wrong_values=1))}))
        )


def test_what_a_broken_library_brings_down_is_told_once():
    facts = machine(
        {"h5py": Package(("h5py",), error="ImportError: libhdf5")},
        pixels={"cpu cv2-linear JPEG": Answer(error="ImportError: libhdf5")},
    )
    assert [finding.what for finding in not_ok(facts)] == ["h5py cannot be imported: ImportError: libhdf5."]


@pytest.mark.parametrize(
    ("driver", "packages", "fits", "best"),
    [
        (OLD_DRIVER, {}, (), 12),
        (DRIVER_12, {}, (12,), 12),
        (DRIVER_12, TORCH_13, (12,), 12),
        (DRIVER_13, {}, (12, 13), 12),
        (DRIVER_13, TORCH_13, (12, 13), 13),
        (replace(DRIVER_13, gpus=(V100,)), TORCH_13, (12,), 12),
        (None, {}, (12, 13), 12),
        (None, TORCH_13, (12, 13), 13),
        (DRIVER_13, ALL_13 | {"torch": Package(("torch",), "2.15.0+cpu")}, (12, 13), 13),
    ],
)
def test_which_extra_fits(driver, packages, fits, best):
    facts = machine(packages, driver=driver)
    assert (fitting_extras(facts), best_extra(facts)) == (fits, best)


def test_remedies_install_what_the_extras_do():
    """Each requirement of pyproject.toml's, and torchvision."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for major in (12, 13):
        command = shlex.split(rules._install(major, *rules.FOR_CUDA))
        assert {*project["optional-dependencies"][f"cuda{major}"], "torchvision"} <= set(command)
        assert len(command) == 2 + 6  # no more than these and torch
    assert rules._install(13, "torch") == "pip install 'torch>=2.11' torchvision"


def test_versions_in_remedies_are_those_of_the_package(monkeypatch):
    required = [
        'cupy-cuda12x[ctk,more]<19,>=17; extra == "cuda12"',
        "pillow<99,>=98",
        "Open_CLIP.torch>=3",
        'h5py>=7; extra == "dev"',
    ]
    monkeypatch.setattr(rules, "requires", lambda name: {"nemo-dali": required}[name])
    assert rules._install(12, "CuPy") == "pip install 'cupy-cuda12x[ctk,more]>=17,<19'"
    assert rules._install(12, "Pillow", "h5py") == "pip install 'pillow>=98,<99' h5py"
    assert rules._install(12, "open_clip") == "pip install 'Open_CLIP.torch>=3'"
    assert rules._install(13, "CuPy") == "pip install cupy-cuda13x"


def test_remedies_of_sources_that_are_not_installed_name_no_versions(monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(rules, "requires", requires)
    assert rules._install(12, "DALI", "torch") == "pip install nvidia-dali-cuda120 torch torchvision"


# --- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_this_machine(capsys):
    code = main(["doctor", "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    problems = [Finding(**one) for one in found["findings"] if one["level"] == "problem"]
    assert (code, found["ok"]) == ((1, False) if problems else (0, True)), err
    assert err.count("\n") == code and all(one.what in err and one.remedy in err for one in problems)
    facts = found["facts"]
    assert facts["python"] == sys.version.split()[0]
    assert facts["packages"]["NumPy"] == {"wheels": ["numpy"], "version": np.__version__, "cuda": None, "error": None}
    for name in ("DALI", "torch", "Numba", "h5py", "open_clip", "Pillow", "pycocotools"):
        assert facts["packages"][name]["version"] and len(facts["packages"][name]["wheels"]) == 1, name
    for resample in ("cv2-linear", "pillow-bilinear"):
        checked = facts["pixels"][f"cpu {resample} JPEG"]
        assert checked["error"] is None and checked["value"]["values"] == 4 * 3 * 256 * 256
        assert checked["value"]["wrong_values"] == checked["value"]["wrong_mask"] == 0


@pytest.mark.slow
def test_libraries_that_raise_print_and_crash_stop_nothing_else(tmp_path, monkeypatch, capsys):
    for name, code in {
        "h5py": "print('noise')\nraise ImportError('libhdf5.so.310: cannot open\\n shared object file')",
        "cupy": "import os\nos.abort()",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "problem  h5py cannot be imported: ImportError: libhdf5.so.310: cannot open shared object file." in out
    assert re.search("(warning|problem)  CuPy cannot be imported: the process ended with SIGABRT", out)
    assert re.search(r"^torch +\d", out, re.MULTILINE) and re.search(r"^DALI +\d", out, re.MULTILINE)
    assert "noise" not in out and "Traceback" not in out
    assert err.startswith("nemo-dali: ") and err.count("\n") == 1 and "libhdf5.so.310" in err


@pytest.mark.slow
def test_a_library_that_hangs_ends_in_time(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    (tmp_path / "quick.py").write_text("__version__ = '1.2'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(probe, "DEADLINE", 2)
    found = probe.ask(("import quick", "import sleeper", "import json"))
    assert found["import quick"] == Answer(["1.2", None])
    assert found["import sleeper"].error.startswith("nothing for 2 s")
    assert found["import json"].error.startswith("not tried")


def test_the_rules_need_no_library():
    code = (
        "import sys, nemo_dali.commands.cli, nemo_dali.commands.doctor.findings, nemo_dali.commands.doctor.machine;"
        "sys.exit(repr({'numpy', 'PIL', 'h5py', 'torch', 'numba', 'cupy', 'nvidia.dali'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_a_sabotaged_oracle_or_kernel_is_found(monkeypatch):
    from nemo_dali.kernels import reference
    from nemo_dali.kernels.tile import RESAMPLE

    def findings(found):
        return not_ok(machine(pixels={"cpu cv2-linear JPEG": Answer(found)}))

    right = check_pixels(device="cpu", resample="cv2-linear", photos="JPEG")
    assert findings(right) == [] and right.largest_difference == 0
    mosaic = reference.mosaic

    def off_by_a_bit(photos, **options):
        frame, mask = mosaic(photos, **options)
        frame[1, 17, 200] = np.nextafter(frame[1, 17, 200], np.float32(9))
        return frame, mask

    def off_by_a_pixel(photos, **options):
        frame, mask = mosaic(photos, **options)
        assert 0 < mask.mean() < 1
        mask[0, 0] ^= 1
        return frame, mask

    for sabotaged, wrong in ((off_by_a_bit, (4, 0)), (off_by_a_pixel, (0, 4))):
        with monkeypatch.context() as patch:
            patch.setattr(reference, "mosaic", sabotaged)
            found = check_pixels(device="cpu", resample="cv2-linear", photos="JPEG")
        assert (found.wrong_values, found.wrong_mask) == wrong
        assert [finding.level for finding in findings(found)] == ["problem"]
    monkeypatch.setitem(RESAMPLE, "cv2-linear", RESAMPLE["pillow-bilinear"])  # the kernel's other resampling
    found = check_pixels(device="cpu", resample="cv2-linear", photos="JPEG")
    assert found.wrong_values > 1000 and [finding.level for finding in findings(found)] == ["problem"]


@pytest.mark.gpu
@pytest.mark.parametrize("photos", ["JPEG", "PNG"])
@pytest.mark.parametrize("resample", ["cv2-linear", "pillow-bilinear"])
def test_the_gpus_pixels(resample, photos):
    found = check_pixels(device="cuda", resample=resample, photos=photos)
    assert not_ok(machine(pixels={f"cuda {resample} {photos}": Answer(found)})) == [], found


@pytest.mark.parametrize(
    ("found", "level", "text"),
    [
        (Answer(Decoders(values=9000, differing=0, largest_difference=0)), "ok", "the same pixels whether or not"),
        (
            Answer(Decoders(values=9000, differing=1200, largest_difference=3)),
            "ok",
            "1,200 of 9,000 values are off, by 3",
        ),
        (Answer(error="RuntimeError: no luck"), "warning", "could not be compared: RuntimeError: no luck."),
    ],
)
def test_what_is_said_of_the_hardware_decoder(found, level, text):
    (finding,) = set(diagnose(machine(decoders=found))) - set(diagnose(machine()))
    assert finding.level == level and text in finding.what
    assert (found.value is not None and found.value.differing == 0) or "hw_decoder_load=0" in f"{finding}"
    assert diagnose(machine(decoders=found, driver=None)) == diagnose(machine(driver=None))
    broken = {"CuPy": MISSING}  # told already
    assert found.error is None or diagnose(machine(broken, decoders=found)) == diagnose(machine(broken))


@needs_compiler
@pytest.mark.usefixtures("played")
def test_a_hardware_decoder_is_compared_with_the_other(monkeypatch):
    from nvidia.dali import fn

    same = compare_decoders()
    assert same == Decoders(values=sum(3 * h * w for h, w in SIZES), differing=0, largest_difference=0)
    decode = fn.decoders.image

    def darker_by_hardware(data, device="cpu", **options):
        image = decode(data, device=device, **options)
        return image // 2 if options["hw_decoder_load"] else image

    monkeypatch.setattr(fn.decoders, "image", darker_by_hardware)
    found = compare_decoders()
    assert (
        found.values == same.values and found.values * 0.9 < found.differing and 100 < found.largest_difference <= 128
    )


@pytest.mark.gpu
def test_the_gpus_decoders_are_compared(record_property):
    found = compare_decoders()
    record_property("hardware decoder", f"{found.differing} of {found.values} off, {found.largest_difference} at most")
    assert 0 <= found.differing <= found.values == sum(3 * h * w for h, w in SIZES)


# A driver of two GPUs in C: what ctypes must pass and read.
DRIVER_SOURCE = r"""
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { return STATUS ? STATUS : (int)flags; }
int cuGetErrorName(int status, const char** name) { *name = status == 803 ? "MISMATCH" : "OTHER"; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetName(char* name, int size, int device) {
    strncpy(name, device == 40 ? "First" : "Second", size);
    return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)(device - 38) << 33; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 8 + (device == 41) : attribute == 76 ? 6 : -1;
    return 0;
}
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char* version, unsigned size) { strncpy(version, "570.86.15", size); return 0; }
"""


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, Driver("570.86.15", "12.8", (Gpu("First", (8, 6), 2 << 33), Gpu("Second", (9, 6), 3 << 33)))),
        (100, Driver("570.86.15", "12.8")),
        (803, Driver("570.86.15", "12.8", error="MISMATCH (803)")),
    ],
)
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_driver_is_read_through_its_c_interface(tmp_path, monkeypatch, status, expected):
    source = tmp_path / "driver.c"
    source.write_text(DRIVER_SOURCE)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        command = ["cc", "-shared", "-fPIC", f"-DSTATUS={status}", "-o", str(tmp_path / name), str(source)]
        subprocess.run(command, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    answer = probe.ask(("driver",))["driver"]
    assert answer.error is None and probe._parse_driver(answer) == expected
