import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nemo_dali

ROOT = Path(__file__).resolve().parents[1]
LOOK = (
    "import importlib.util as u, nemo_dali, nemo_dali.kernels.reference as r;"
    "print(nemo_dali.__file__, r.__file__, u.find_spec('kernels') is not None)"
)


def look(*, cwd, path):
    """What a Python process in ``cwd`` with only ``path`` and the site's packages imports."""
    # -P keeps cwd off the path; nemo_dali's own editable install is behind what PYTHONPATH names.
    run = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=cwd, env={"PYTHONPATH": str(path), "PATH": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    package, kernel, found = run.stdout.split()
    return Path(package), Path(kernel), found == "True"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in run.stdout.split("\0"):
        if name.startswith(("nemo_dali/", "kernels/", "pyproject.toml", "README.md", "LICENSE")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_a_bare_checkout_imports_the_kernels(tmp_path):
    package, kernel, _ = look(cwd=tmp_path, path=ROOT)
    assert package == ROOT / "nemo_dali/__init__.py"
    assert kernel == ROOT / "kernels/reference.py"


def test_the_installation_that_tests_run_in_has_no_top_level_kernels(tmp_path):
    package, kernel, top_level = look(cwd=tmp_path, path="")
    assert package.parent.name == "nemo_dali" and kernel.name == "reference.py"
    assert not top_level


def test_a_wheel_imports_the_kernels_and_leaves_the_name_alone(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(("kernels", "tests", "benchmarks"))]
        archive.extractall(site)
    package, kernel, top_level = look(cwd=tmp_path, path=site)
    assert package == site / "nemo_dali/__init__.py"
    assert kernel == site / "nemo_dali/kernels/reference.py"
    assert not top_level
    schema = "nemo_dali/json_lines.schema.json"
    assert (site / schema).read_bytes() == (ROOT / schema).read_bytes()


def test_another_projects_kernels_package_is_not_shadowed(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("whose = 'theirs'")
    code = "import kernels, nemo_dali.kernels.tile as t; print(kernels.whose, t.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert run.stdout.split() == ["theirs", str(site / "nemo_dali/kernels/tile.py")], run.stderr


def test_every_source_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "nemo_dali", "kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {f"nemo_dali/{name}" if name.startswith("kernels/") else name for name in tracked}
    assert expected <= names


def test_public_names():
    assert nemo_dali.__all__ == [
        "AnnotationError",
        "Batch",
        "Dataset",
        "FileFormatError",
        "Loader",
        "MosaicPolicy",
        "NegativeTable",
        "NemoError",
        "PhotoError",
        "StateError",
    ]
    for name in nemo_dali.__all__:
        assert getattr(nemo_dali, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = nemo_dali.no_such_thing


def test_importing_the_package_imports_nothing_heavy():
    heavy = "torch", "nvidia.dali", "numba", "open_clip", "cupy", "h5py"
    code = f"import sys, nemo_dali; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
