"""The demo's page: its picture, what it printed, its report, and the commands for your own data."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from nemo_dali.io.terminal import printable


def page(said: Sequence[str], commands: Sequence[str]) -> bytes:
    """An HTML page that needs no network and shows ``mosaics.png`` and ``report.html`` beside it.

    Args:
        said: lines that the demo printed; an indented line belongs to the one before.
        commands: shell commands.
    """
    steps: list[list[str]] = []
    for line in said:
        text = escape(printable(line.strip()))
        if line.startswith(" ") and steps:
            steps[-1].append(text)
        else:
            steps.append([text])
    template = Template((files("nemo_dali.commands") / "demo_page.html").read_text(encoding="utf-8"))
    return template.substitute(
        steps="\n".join(f"<li>{'<br>'.join(step)}</li>" for step in steps),
        commands="\n".join(map(escape, commands)),
    ).encode()
