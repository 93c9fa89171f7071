"""What the site has beside the pages in this folder: pages made of the sources, and links that lead somewhere.

mkdocs calls the functions whose names begin with ``on_``. Anchors are those that GitHub makes of a heading, so that a
link works in both places. A link to a file that is no page leads into the repository if ``repo_url`` is set in
mkdocs.yml, and is the file's name if not.
"""

import ast
import html
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Pages that are files of the repository, by their place in the site.
INCLUDED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "design-notes.md": "benchmarks/NOTES.md",
}
# Sections of README.md that pages show, by their anchors there: links to them lead here.
SHOWN = {"file-formats": "file-formats.md#what-is-in-each-file", "what-has-run-where": "status.md"}
# Public modules, each a page. A name of the first that another has, too, is explained there.
MODULES = ("", "data", "fn", "loader", "metrics", "mining", "plan", "presets", "synthetic", "text", "tiles")
FENCED = re.compile(r"(^( *)(`{3,}|~{3,}).*?^\2\3[^\n]*$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
HEADING = re.compile(r"^(#{1,6} )(.+?) *$", re.MULTILINE)


# --- what mkdocs calls -----------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for uri, content in made_pages().items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Complete the page on file formats, and mend links and anchors of every page that somebody wrote."""
    uri = page.file.src_uri
    if uri.startswith("api/"):
        return markdown
    places = {f"docs/{file.src_uri}": file.src_uri for file in files}
    places |= {source: place for place, source in INCLUDED.items()}

    def mended(text: str, source: str) -> str:
        return relinked(text, source=source, uri=uri, places=places, repository=config.repo_url)

    markdown = mended(markdown, {**INCLUDED, "status.md": "README.md"}.get(uri, f"docs/{uri}"))
    if uri == "file-formats.md":
        begin, rule, rest = markdown.partition("\n## ")
        content = mended(section("File formats", (ROOT / "README.md").read_text("utf-8")), "README.md")
        markdown = f"{begin}\n## What is in each file\n\n{content}\n{rule}{rest}"
    return anchored(markdown)


# --- pages that are made ---------------------------------------------------------------------------------------------


def made_pages() -> dict[str, str]:
    """Markdown by place in the site."""
    pages = {uri: (ROOT / source).read_text("utf-8") for uri, source in INCLUDED.items()}
    pages["commands.md"] = commands_page()
    status = section("What has run where", (ROOT / "README.md").read_text("utf-8"))
    pages["status.md"] = f"# What has run where\n\n{status}\n"
    public = {module: public_names(module) for module in MODULES}
    for module in MODULES:
        pages[f"api/{module or 'nemo_dali'}.md"] = module_page(module, public)
    return pages


def commands_page() -> str:
    """Every command with its usage, arguments and options, as its parser has them."""
    from typer.main import get_command

    from nemo_dali.commands.cli import app

    parts = [
        "# Commands",
        "`nemo-dali COMMAND --help` says the same. An option whose value ends in `...` takes several values after one "
        "flag (`--grids 1 2`), or one each time it is given. The exit code is 0 on success, 1 on failure, with one "
        "line that says why, and 2 for wrong usage.",
    ]
    for path, command, context in commands_of(get_command(app)):
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        parts += [f"## {path.removeprefix('nemo-dali ')}", plain(command.help), f"```text\n{usage}\n```"]
        for param in command.get_params(context):
            if "--help" not in param.opts:
                shown, meaning = param.get_help_record(context)
                parts.append(f"`{shown}`\n:   {plain(meaning)}")
    return "\n\n".join(parts) + "\n"


def commands_of(group: Any) -> Iterator[tuple[str, Any, Any]]:
    """The line that each command begins with, the command, and its parser's context."""

    def below(command: Any, name: str, parent: Any) -> Iterator[tuple[str, Any, Any]]:
        context = command.context_class(command, info_name=name, parent=parent)
        if not hasattr(command, "commands"):
            yield context.command_path, command, context
            return
        for child in command.list_commands(context):
            yield from below(command.get_command(context, child), child, context)

    yield from below(group, "nemo-dali", None)


def plain(text: str) -> str:
    """Text of a terminal as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def public_names(module: str) -> list[str]:
    """``__all__`` of a module, which is not imported for it."""
    for node in module_source(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise LookupError(f"nemo_dali.{module} has no __all__")


def module_source(module: str) -> ast.Module:
    folder = ROOT / "nemo_dali"
    path = folder / module / "__init__.py" if (folder / module).is_dir() else folder / f"{module}.py"
    return ast.parse(path.read_text("utf-8"))


def module_page(module: str, public: Mapping[str, list[str]]) -> str:
    """A module's docstring, and mkdocstrings' directive for each public name."""
    full = f"nemo_dali.{module}" if module else "nemo_dali"
    homes = {name: other for other in MODULES[1:] for name in public[other]} if not module else {}
    parts = [f"# {full}", preformatted(ast.get_docstring(module_source(module)) or "")]
    if elsewhere := sorted(homes.keys() & set(public[module])):
        rows = [
            f"| [`{name}`]({homes[name]}.md#{full}.{homes[name]}.{name}) | `{full}.{homes[name]}` |"
            for name in elsewhere
        ]
        parts.append("\n".join(["| name | explained in |", "| --- | --- |", *rows]))
    parts += [f"::: {full}.{name}" for name in public[module] if name not in homes]
    return "\n\n".join(parts) + "\n"


def preformatted(docstring: str) -> str:
    """A docstring whose tables and drawings, which stand as they are in a terminal, are fenced."""
    blocks = []
    for block in docstring.split("\n\n"):
        drawn = not block.startswith(("    ", "* ")) and re.search(r"\S {2,}\S", block)
        blocks.append(f"```text\n{block}\n```" if drawn else block)
    return "\n\n".join(blocks)


def section(title: str, text: str) -> str:
    """What stands below a heading of a page, up to the next one of its level or above."""
    found = re.search(rf"^(##+) {re.escape(title)}\n+(.+?)(?=^#{{2}}(?!#) |^\1 |\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise LookupError(f"README.md has no section '{title}', which a page of the site shows")
    return found[2].strip()


# --- links and anchors -----------------------------------------------------------------------------------------------


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """A page with everything changed but its fenced code."""
    parts, end = [], 0
    for fence in FENCED.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def relinked(text: str, *, source: str, uri: str, places: Mapping[str, str], repository: str | None) -> str:
    """A page whose relative links lead to pages of the site, or into the repository.

    Args:
        source: the file in the repository that the text stands in; its links count from there.
        uri: the page that it is shown on.
        places: pages and pictures of the site by their files in the repository.
        repository: its address; None: there is none, and a link into it becomes the file's name.
    """

    def change(link: re.Match[str]) -> str:
        picture, shown, target = link.groups()
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if file == "README.md" and anchor in SHOWN:
            place, mark, anchor = SHOWN[anchor].partition("#")
            to = "" if place == uri and anchor else posixpath.relpath(place, posixpath.dirname(uri) or ".")
        elif file in places:
            to = posixpath.relpath(places[file], posixpath.dirname(uri) or ".")
        elif not (ROOT / file).exists():
            return link[0]  # mkdocs will say so
        elif repository:
            to = f"{repository.rstrip('/')}/{'tree' if (ROOT / file).is_dir() else 'blob'}/HEAD/{file}"
        else:
            return shown if file in shown else f"{shown} (`{file}`)"
        return f"{picture}[{shown}]({to}{mark}{anchor})"

    return outside_code(text, lambda part: LINK.sub(change, part))


def anchored(text: str) -> str:
    """A page with GitHub's anchor behind every heading."""
    seen: dict[str, int] = {}

    def change(heading: re.Match[str]) -> str:
        anchor = re.sub(r"[^\w\- ]", "", heading[2].lower()).replace(" ", "-")
        count = seen[anchor] = seen.get(anchor, -1) + 1
        return f"{heading[0].rstrip()} {{ #{anchor}{f'-{count}' if count else ''} }}"

    return outside_code(text, lambda part: HEADING.sub(change, part))
