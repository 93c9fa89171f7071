"""Commands and options that the pages name exist."""

import re

import pytest
from typer.main import get_command

from nemo_dali.commands.cli import app
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINE = re.compile(r"(?:^    |`)nemo-dali ([a-z]\w*(?:[^\n`#]|\n {6,}(?=\S))*)", re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_their_options_exist(path):
    for line in LINE.findall(path.read_text("utf-8")):
        command, (name, *words) = get_command(app), line.split()
        while hasattr(command, "commands"):
            assert name in command.commands, f"nemo-dali {line}"
            command = command.commands[name]
            name = words[0] if words else ""
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", line)) <= known | {"--help"}, f"nemo-dali {line}"
