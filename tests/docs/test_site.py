"""The site: mkdocs.yml, and docs/hooks.py, which makes pages of the sources and mends links."""

import inspect
import os
import re
import subprocess
import sys
from html import unescape
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import yaml

from docs import hooks
from nemo_dali.commands.cli import main
from tests.helpers.paths import ROOT
from tests.test_structure import PUBLIC

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
WRITTEN = sorted((ROOT / "docs").rglob("*.md"))
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text("utf-8") for path in WRITTEN} | hooks.made_pages()
PLACES = {f"docs/{uri}": uri for uri in PAGES} | {source: uri for uri, source in hooks.INCLUDED.items()}


def leaves(nav):
    for entry in nav:
        for below in entry.values():
            yield from [below] if isinstance(below, str) else leaves(below)


def shown(uri, repo_url=None):
    """A page as mkdocs gets it."""
    files = [
        SimpleNamespace(src_uri=name) for name in [*PAGES, "mosaics.jpg", "report.jpg", "peers.svg", "scaling.svg"]
    ]
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    return hooks.on_page_markdown(PAGES[uri], page, SimpleNamespace(repo_url=repo_url), files)


def test_every_page_is_in_the_navigation_once():
    assert sorted(leaves(CONFIG["nav"])) == sorted(PAGES)


@pytest.mark.parametrize(
    ("link", "without", "with_repository"),
    [
        ("[tau](choosing-tau-and-k.md#depth)", "[tau](choosing-tau-and-k.md#depth)", None),
        ("[notes](../benchmarks/NOTES.md#ranking)", "[notes](design-notes.md#ranking)", None),
        ("![sheet](mosaics.jpg)", "![sheet](mosaics.jpg)", None),
        ("[here](#below)", "[here](#below)", None),
        ("[paper](https://arxiv.org/abs/2411.01494)", "[paper](https://arxiv.org/abs/2411.01494)", None),
        (
            "[results](../benchmarks/results)",
            "results (`benchmarks/results`)",
            "[results](REPO/tree/HEAD/benchmarks/results)",
        ),
        (
            "[tune.py](../nemo_dali/mining/tune.py)",
            "tune.py (`nemo_dali/mining/tune.py`)",
            "[tune.py](REPO/blob/HEAD/nemo_dali/mining/tune.py)",
        ),
        ("[the LICENSE](../LICENSE)", "the LICENSE", "[the LICENSE](REPO/blob/HEAD/LICENSE)"),
        ("[yet](../README.md#what-has-run-where)", "[yet](status.md)", None),
        ("[all](../README.md#file-formats)", "[all](file-formats.md#what-is-in-each-file)", None),
        ("[all](../README.md#limits)", "all (`README.md`)", "[all](REPO/blob/HEAD/README.md#limits)"),
        ("[it](../LICENSE#x)", "it (`LICENSE`)", "[it](REPO/blob/HEAD/LICENSE#x)"),
        ("[gone](../no/such.py)", "[gone](../no/such.py)", None),
        ("```\n[it](../LICENSE)\n```\n", "```\n[it](../LICENSE)\n```\n", None),
    ],
)
def test_links_lead_to_pages_or_into_the_repository_if_it_has_an_address(link, without, with_repository):
    places = PLACES | {"docs/mosaics.jpg": "mosaics.jpg"}
    for repository, expected in ((None, without), ("REPO/", with_repository or without)):
        found = hooks.relinked(link, source="docs/x.md", uri="x.md", places=places, repository=repository)
        assert found == expected


def test_a_file_that_is_shown_elsewhere_keeps_its_links():
    assert (
        hooks.relinked(
            "[set-up](CONTRIBUTING.md#set-up) [data](docs/datasets.md) [a](#b)",
            source="CHANGELOG.md",
            uri="api/x.md",
            places=PLACES,
            repository=None,
        )
        == "[set-up](../contributing.md#set-up) [data](../datasets.md) [a](#b)"
    )


def test_anchors_are_githubs():
    page = "# A `b_c`, d\n\n## A B\n\n```sh\n# no heading\n```\n\n### A B\n"
    anchors = "# A `b_c`, d { #a-b_c-d }\n\n## A B { #a-b }\n\n```sh\n# no heading\n```\n\n### A B { #a-b-1 }\n"
    assert hooks.anchored(page) == anchors


def test_links_between_pages_lead_to_pages_and_to_headings():
    pages = {uri: shown(uri) for uri in PAGES}
    anchors = {uri: set(re.findall(r"^#.* \{ #(.+) \}$", text, re.MULTILINE)) for uri, text in pages.items()}
    checked = 0
    for uri, text in pages.items():
        for _, _, target in hooks.LINK.findall(hooks.FENCED.sub("", text)):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target) or path.endswith((".jpg", ".svg")):
                continue
            place = os.path.normpath(os.path.join(os.path.dirname(uri), path)) if path else uri
            assert place in PAGES, f"{uri}: {target}"
            assert not anchor or place.startswith("api/") or anchor in anchors[place], f"{uri}: {target}"
            checked += 1
    assert checked > 80


def test_every_command_is_there_with_all_that_it_takes(capsys):
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGES["commands.md"], re.MULTILINE | re.DOTALL))
    found = []

    def visit(*path):
        assert main([*path, "--help"]) == 0
        text = capsys.readouterr().out
        below = re.findall(r"^  (\w+)  ", text.partition("Commands:\n")[2], re.MULTILINE)
        for name in below:
            visit(*path, name)
        if not below:
            section = unescape(sections[" ".join(path)])
            found.append(" ".join(path))
            assert text.splitlines()[0].removeprefix("usage: ") in section
            flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.partition("Options:")[2])) - {"-h", "--help"}
            assert flags <= set(re.findall(r"--?[a-z][\w-]*", section)) and len(section) > 100

    visit()
    assert found == list(sections) and len(found) > 10


def test_what_is_in_each_file_stands_beside_the_rules():
    text = shown("file-formats.md")
    contents, index = text.index("## What is in each file"), text.index("## The index")
    table = text.index("| `/neighbors` | i4 [sentences, N]")
    assert contents < table < index and text.count("`/neighbors`") >= 3 and "](docs/" not in text
    with pytest.raises(LookupError, match="no section 'File formats'"):
        hooks.section("File formats", "# nemo-dali\n\n## Limits\n")


def test_a_section_ends_where_the_next_of_its_level_begins():
    page = "# P\n\n## A\n\none\n\n### B\n\ntwo\n\n### C\n\nthree\n\n## D\n\nfour\n"
    assert hooks.section("A", page) == "one\n\n### B\n\ntwo\n\n### C\n\nthree"
    assert (hooks.section("B", page), hooks.section("C", page), hooks.section("D", page)) == ("two", "three", "four")


def test_what_has_run_where_is_shown():
    text = shown("status.md")
    assert "| kernel `mosaic`, both resamplings |" in text and "## " not in text and "](docs/" not in text


def test_every_public_module_has_its_page():
    assert {f"nemo_dali.{module}".rstrip(".") for module in hooks.MODULES} == set(PUBLIC)


@pytest.mark.parametrize("module", hooks.MODULES)
def test_every_public_name_has_its_place(module):
    full = f"nemo_dali.{module}".rstrip(".")
    page = PAGES[f"api/{module or 'nemo_dali'}.md"]
    for name in import_module(full).__all__:
        assert f"\n::: {full}.{name}\n" in page or f"\n| [`{name}`](" in page, name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as ``make docs`` builds it."""
    if not find_spec("mkdocs") or not find_spec("mkdocstrings"):
        pytest.skip("the extra 'docs' is not installed")
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.process
def test_the_site_has_every_page_and_every_public_name(site):
    for uri in PAGES:
        page = (site / uri).with_suffix(".html").read_text("utf-8")
        assert not re.findall(r"<(?!a )[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", page), uri
    for module in hooks.MODULES:
        full = f"nemo_dali.{module}".rstrip(".")
        page = unescape((site / f"api/{module or 'nemo_dali'}.html").read_text("utf-8"))
        for name in import_module(full).__all__:
            assert f'id="{full}.{name}"' in page or f"<code>{name}</code>" in page, name
            if f'id="{full}.{name}"' in page and inspect.isroutine(getattr(import_module(full), name)):
                signature = re.sub("<[^>]+>", "", page.partition(f'id="{full}.{name}"')[2][:30000])
                for parameter in inspect.signature(getattr(import_module(full), name)).parameters:
                    assert re.search(rf"\b{parameter}\b", signature), f"{name}: {parameter}"
    loader = (site / "api/loader.html").read_text("utf-8")
    for name in ("state_dict", "load_state_dict", "set_epoch", "__len__"):  # of a base class that is private
        assert f'id="nemo_dali.loader.Loader.{name}"' in loader
    text = " ".join(re.sub("<[^>]+>", "", loader).replace("\N{EN DASH}", "-").split())
    assert "policy, seed, batch_size, rank, world_size - as given or chosen" in text
    assert "format - the BatchFormat that" in text  # without the type of another attribute
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".pyc")]


@pytest.mark.slow
@pytest.mark.process
def test_it_is_read_and_searched_from_the_disk_and_asks_nothing_of_other_hosts(site, browser):
    tab = browser.new_page(viewport={"width": 1300, "height": 900})
    problems = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    tab.goto((site / "index.html").as_uri())
    tab.click(".md-search__input")
    tab.keyboard.type("letterbox")
    tab.locator(".md-search-result__item").first.wait_for()
    shown = tab.locator(".md-search-result__list").inner_text()
    assert "letterbox" in shown.lower()
    for width in (1300, 390):
        tab.set_viewport_size({"width": width, "height": 900})
        for uri in PAGES:
            tab.goto((site / uri).with_suffix(".html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, (
                uri
            )  # tables and code scroll by themselves
    assert problems == []
    tab.close()
