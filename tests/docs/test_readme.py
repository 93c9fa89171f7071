"""README.md: its snippets and commands run, its names exist, and it stays short."""

import ast
import re
import shlex

import pytest

from nemo_dali.commands.cli import main
from nemo_dali.presets import PRESETS
from nemo_dali.synthetic import synthesize
from tests.helpers.paths import ROOT

PAGE = (ROOT / "README.md").read_text("utf-8")
STEPS = (ROOT / "docs" / "first-steps.md").read_text("utf-8")
MOST_WORDS = 900  # of prose, before the reference of the file formats


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text):
    return re.findall(r"^    (nemo-dali \w.*)$", text, re.MULTILINE)


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def prose(text):
    """A page without code, tables, comments and the targets of links."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(    |\|).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "", text)


def test_the_first_batch_is_the_example():
    source = (ROOT / "examples" / "first_batch.py").read_text()
    docstring = ast.parse(source).body[0]
    assert snippets(section(PAGE, "A first batch")) == [
        "\n".join(source.splitlines()[docstring.end_lineno :]).strip() + "\n"
    ]


def test_what_comes_before_the_reference_is_short():
    front, _, reference = PAGE.partition("\n## File formats\n")
    assert reference and len(prose(front).split()) <= MOST_WORDS


def test_every_preset_is_named():
    assert set(re.findall(r"`(\w+)`", prose(section(PAGE, "Presets")))) == set(PRESETS)


@pytest.fixture(scope="module")
def made(tmp_path_factory, clip):
    """A folder in which README's commands have run, with generated data and a tiny model."""
    folder = tmp_path_factory.mktemp("readme")
    synthesize(folder / "data", images=30)
    own = {
        "REFER_ROOT": "data",
        "train2014": "data/images/mscoco/images/train2014",
        "ViT-B-32": str(clip[0] / "tiny.json"),
        "laion2b_s34b_b79k": str(clip[0] / "tiny.pt"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands(section(PAGE, "On RefCOCO")):
            words = [own.get(word, word) for word in shlex.split(command)[1:]]
            assert main(words) == 0, command
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page, title", [("README.md", "On RefCOCO"), ("docs/loader.md", None), ("docs/resident-tiles.md", None)]
)
def test_the_commands_make_what_the_loaders_read(made, monkeypatch, page, title):
    text = (ROOT / page).read_text("utf-8")
    monkeypatch.chdir(made)
    for code in snippets(section(text, title) if title else text):
        space = {}
        exec(code.replace("range(40)", "range(1)"), space)
        assert space["image"].shape == (8, 3, 480, 480) and space["mask"].any()
        space["loader"].close()


@pytest.mark.slow
def test_the_preset_of_the_page_yields_what_it_says(made, monkeypatch):
    monkeypatch.chdir(made)
    (code,) = snippets(section(PAGE, "Presets"))
    space = {}
    exec(code, space)
    image, tokens, mask = next(iter(space["loader"]))
    assert image.shape == (8, 3, 416, 416) and tokens.shape == (8, 17) and mask.shape == (8, 416, 416)
    space["loader"].close()


def test_first_steps_explain_the_same_commands():
    assert commands(section(PAGE, "On RefCOCO")) == commands(section(STEPS, "RefCOCO"))
