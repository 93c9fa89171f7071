import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

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
def built(tmp_path_factory):
    """The wheel and the source distribution; the wheel is built from what the source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("built")
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in run.stdout.split("\0"):
        if name.startswith(("nemo_dali/", "kernels/", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture
def wheel(built):
    return built[0]


def test_a_bare_checkout_imports_the_kernels(tmp_path):
    package, kernel, _ = look(cwd=tmp_path, path=ROOT)
    assert package == ROOT / "nemo_dali/__init__.py"
    assert kernel == ROOT / "nemo_dali/kernels/reference.py" and kernel.resolve() == ROOT / "kernels/reference.py"


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
    links = {name for name in tracked if (ROOT / name).is_symlink()}
    expected = {f"nemo_dali/{name}" if name.startswith("kernels/") else name for name in set(tracked) - links}
    assert expected <= names


def test_the_source_distribution_holds_the_kernels_where_python_looks(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        archive.extractall(tmp_path)
    (unpacked,) = tmp_path.iterdir()
    package, kernel, _ = look(cwd=tmp_path, path=unpacked)
    assert package == unpacked / "nemo_dali/__init__.py" and kernel == unpacked / "nemo_dali/kernels/reference.py"
    assert (unpacked / "nemo_dali/kernels/mosaic/mosaic.cu").read_bytes() == (
        ROOT / "kernels/mosaic/mosaic.cu"
    ).read_bytes()
