"""Packages that extras bring: what needs one that is missing says how to install it, and nothing else does."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError

import pytest

from nemo_dali.commands.cli import main
from nemo_dali.commands.report.page import report
from nemo_dali.errors import NemoError
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.job import mine
from nemo_dali.plan.policy import MosaicPolicy
from nemo_dali.text.tokens import tokenize
from tests.helpers.files import index_refer
from tests.helpers.paths import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# By an extra's name the packages that it brings, as they are imported; one is also known by its distribution's name.
PACKAGES = {
    "faiss": {"faiss"},
    "mining": {"open_clip", "safetensors"},
    "nouns": {"textblob"},
    "parquet": {"pyarrow"},
    "report": {"plotly"},
}
# Where open_clip has been found before, by load_clip or by run_demo.
BEHIND = {"_inputs.py", "_quick_gelu.py", "_weights.py", "clip.py", "demo.py"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return index_refer(tmp_path_factory.mktemp("lazy"), photos=9)


def test_packages_of_extras_are_imported_where_a_missing_one_is_told():
    brings = {name: {re.split("[<>=]", each)[0] for each in EXTRAS[name]} for name in PACKAGES}
    assert brings["mining"] == {"open_clip_torch", "safetensors"} and brings["report"] == {"plotly"}
    guarded, bare = set(), set()
    for path in sorted((ROOT / "nemo_dali").rglob("*.py")):
        inside = {}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.With) and (said := re.match(r"extra\('([\w,]+)', ", ast.unparse(node.items[0]))):
                inside |= {id(each): said[1].split(",") for each in ast.walk(node)}
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                for package in {name.partition(".")[0] for name in names} & set.union(*PACKAGES.values()):
                    of = next(name for name, packages in PACKAGES.items() if package in packages)
                    if of in inside.get(id(node), []):
                        guarded.add(package)
                    elif path.name not in BEHIND or package != "open_clip":
                        bare.add(f"{path.name}:{node.lineno} {package}")
    assert bare == set() and guarded == set.union(*PACKAGES.values())


def told(package, extra):
    return rf"needs the package '{package}', which is not installed\. .*: pip install 'nemo-dali\[{extra}\]'$"


def test_without_open_clip_its_extra_is_told(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for fingerprint in (None, "f"):
        with pytest.raises(NemoError, match="^Tokenizer 'clip' " + told("open_clip", "mining")):
            tokenize(["a"], fingerprint=fingerprint)
    with pytest.raises(NemoError, match="^Tokenizer 'clip' " + told("open_clip", "mining")):
        Loader(dataset, batch_size=4, policy=MosaicPolicy(p_mined=0))
    with pytest.raises(NemoError, match="^The model ViT-B-32 " + told("open_clip", "mining")):
        mine(dataset, model="ViT-B-32", pretrained="x", output=tmp_path / "a.neg.h5")
    assert not list(tmp_path.glob("a.neg.h5*"))


def test_where_open_clip_never_was_the_tokenizer_tells_its_extra(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("nemo_dali.text.tokens.version", version)
    with pytest.raises(NemoError, match=told("open_clip_torch", "mining")):
        tokenize(["a"], fingerprint="f")


def test_without_plotly_report_and_demo_tell_before_they_do_anything(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(NemoError, match=r"^The report needs the package 'plotly.*pip install 'nemo-dali\[report\]'$"):
        report(dataset, tmp_path / "none.neg.h5", output=tmp_path / "r.html")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "pip install 'nemo-dali[mining,report]'" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_the_loader_works_without_any_of_them(dataset):
    code = """
import json, sys
for name in sys.argv[2:]:
    sys.modules[name] = None
import numpy as np
import nemo_dali
loader = nemo_dali.Loader(
    sys.argv[1],
    batch_size=4,
    policy=nemo_dali.MosaicPolicy(p_mined=0),
    size=32,
    tokenizer=lambda texts: np.ones((len(texts), 3), np.int32),
)
print(json.dumps([list(tensor.shape) for tensor in [*next(iter(loader))][:3]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(dataset), *set.union(*PACKAGES.values())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[4, 3, 32, 32], [4, 32, 32], [4, 3]]
