"""The house: what is public, what is private to its folder, and how much a room may hold."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from typing import get_args

import pytest

from nemo_dali._choices import DType, MaskDType, Resample
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "nemo_dali"
PUBLIC = {
    "nemo_dali": [
        "AnnotationError",
        "Batch",
        "ByEpoch",
        "Dataset",
        "FileFormatError",
        "Loader",
        "MosaicPolicy",
        "NegativeTable",
        "NemoError",
        "PhotoError",
        "StateError",
        "preview",
        "read_policy",
    ],
    "nemo_dali.data": ["Dataset", "index_dataset", "read_annotations"],
    "nemo_dali.fn": ["mosaic", "remap_mask"],
    "nemo_dali.loader": ["Batch", "BatchFormat", "Loader"],
    "nemo_dali.metrics": ["PROTOCOLS", "Protocol", "Segmentation"],
    "nemo_dali.mining": ["Exclusions", "NegativeTable", "mine", "mine_scores"],
    "nemo_dali.plan": ["KINDS", "PLAN", "ByEpoch", "MosaicPolicy", "read_policy", "write_policy"],
    "nemo_dali.presets": [
        "CLIP_MEAN",
        "CLIP_STD",
        "IMAGENET_MEAN",
        "IMAGENET_STD",
        "caris",
        "cgformer",
        "cris",
        "detris",
        "dmmi",
        "etris",
        "lavt",
        "maskris",
        "nemo",
        "rela",
        "rmsin",
    ],
    "nemo_dali.synthetic": ["expression_kinds", "synthesize"],
    "nemo_dali.text": ["mask_nouns", "mask_tokens", "noun_runs", "tokenize"],
    "nemo_dali.tiles": ["TileFile", "make_tiles"],
}
MOST_FILES, MOST_LINES = 16, 400
MOST_LINES_OF_LOADER = 250


def modules(folder):
    return [path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    found = import_module(module)
    assert found.__all__ == PUBLIC[module]
    for name in found.__all__:
        assert getattr(found, name) is not None and name in dir(found)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = found.no_such_thing


def test_docs_name_nothing_but_what_is_public():
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]
    for path in texts:
        text = path.read_text()
        for name in set(re.findall(r"\bnemo_dali(?:\.\w+)+", text)):
            module, _, attribute = name.rpartition(".")
            assert name in PUBLIC or attribute in PUBLIC.get(module, ()), f"{path.name}: {name}"
        for module, names in re.findall(r"^from (nemo_dali[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
            for name in names.replace(" ", "").split(","):
                assert f"{module}.{name}" in PUBLIC or name in PUBLIC[module], f"{path.name}: {module}.{name}"


def anchors(path):
    """What a page's headings are called in links to them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return [f"{name}-{before}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]


def test_docs_link_to_what_exists():
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", path.read_text()):
            if "://" not in target:
                page = path.parent / target if target else path
                assert page.exists(), f"{path.name}: {target}"
                assert not anchor or page.suffix != ".md" or anchor in anchors(page), f"{path.name}: {target}#{anchor}"


def test_the_package_itself_is_small():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= MOST_FILES


@pytest.mark.parametrize("folder", ["nemo_dali", "kernels"])
def test_no_module_is_long(folder):
    lengths = {str(path): len(path.read_text().splitlines()) for path in modules(ROOT / folder)}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}
    assert max([lines for path, lines in lengths.items() if "/loader/" in path], default=0) <= MOST_LINES_OF_LOADER


def test_what_begins_with_an_underscore_is_held_private():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    protected = {}
    for contract in contracts:
        if contract["type"] == "protected":
            (importer,) = contract["allowed_importers"]
            protected |= dict.fromkeys(contract["protected_modules"], importer)
    private = {}
    for path in modules(PACKAGE):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        folder, _, last = name.rpartition(".")
        if last.startswith("_") and not last.startswith("__") and folder != "nemo_dali":
            private[name] = folder
    assert protected == private


@pytest.mark.parametrize("folder", ["nemo_dali", "kernels"])
def test_what_options_may_be_is_listed_once(folder):
    """In ``nemo_dali._choices``; only the keys of a dict may repeat it, which gives each a meaning."""
    choices, found = [set(get_args(one)) for one in (DType, MaskDType, Resample)], set()
    for path in modules(ROOT / folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple | ast.List | ast.Set) and path.name != "_choices.py":
                values = [element.value for element in node.elts if isinstance(element, ast.Constant)]
                if len(values) == len(node.elts) > 1 and any(one.issuperset(values) for one in choices):
                    found.add(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == set()


@pytest.mark.parametrize("folder", ["nemo_dali", "kernels"])
def test_only_one_module_prints(folder):
    """What commands show goes through ``io.terminal``, which takes out what a terminal would obey."""
    streams = {f"sys.{stream}.{name}" for stream in ("stdout", "stderr") for name in ("write", "writelines", "buffer")}
    others = {"print", "rich.print", "tqdm.write", "typer.echo", "typer.secho"}
    found = set()
    for path in modules(ROOT / folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in {*others, *streams}:
                found.add(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == set()


WRITE = {"os.rename", "os.replace", "os.link", "shutil.move", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"}
NOT_KEPT = {"nemo_dali/commands/bench.py", "nemo_dali/mining/clip.py"}  # a switch of the kernel's, a temporary folder


@pytest.mark.parametrize("folder", ["nemo_dali", "kernels"])
def test_only_one_module_writes_files_that_are_kept_and_says_that_one_cannot_be(folder):
    found = set()
    for path in modules(ROOT / folder):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            writes = isinstance(node, ast.Attribute) and (
                ast.unparse(node) in WRITE or (node.attr in {"write_bytes", "write_text"} and name not in NOT_KEPT)
            )
            if writes or (isinstance(node, ast.Constant) and "Cannot write " in str(node.value)):
                found.add(name)
    assert found <= {"nemo_dali/io/output.py"}


def test_who_asks_the_cache_has_its_name_made_there():
    """And the algorithm of checksums stands beside the index and in the cache, which has a format of its own."""
    texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in modules(PACKAGE)}
    asking = [name for name, text in texts.items() if "io.cache import cached" in text]
    assert sorted(asking) == ["text/masking.py", "text/tokens.py"]
    assert not any("hashlib" in texts[name] for name in asking)
    assert sorted(name for name, text in texts.items() if "xxhash" in text) == ["io/cache.py", "io/index.py"]


def test_every_kernel_has_its_link():
    entries = {path.name for path in (ROOT / "kernels").iterdir()} - {"__pycache__"}
    links = {path.name: path for path in (PACKAGE / "kernels").iterdir() if path.is_symlink()}
    assert links.keys() == entries
    for name, path in links.items():
        assert str(path.readlink()) == f"../../kernels/{name}"


HEAVY = ("torch", "nvidia.dali", "numba", "open_clip", "cupy", "h5py", "cv2", "PIL", "rich", "pydantic")


@pytest.mark.parametrize(
    "code",
    [
        "import nemo_dali",
        "from nemo_dali.commands.cli import main; main(['--help'])",
        "import nemo_dali.commands.doctor.findings",  # which must work where a library is broken
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code):
    code = f"""
import sys
try:
    {code}
except SystemExit:
    pass
print([module for module in {HEAVY} if module in sys.modules], file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.strip() == "[]"
