"""What docs/training.md names of examples/train_ris.py is there."""

import ast
import re

from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "training.md").read_text("utf-8")
EXAMPLE = (ROOT / "examples" / "train_ris.py").read_text("utf-8")


def test_what_is_changed_for_another_model_is_in_the_example():
    table = PAGE.split("## With a model of your own\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(cells)))
    nodes = list(ast.walk(ast.parse(EXAMPLE)))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert len(named) > 5 and named <= defined


def test_the_examples_command_lines_have_its_options():
    lines = re.findall(r"examples/train_ris\.py (.*)$", PAGE, re.MULTILINE)
    flags = {flag for line in lines for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", line)}
    assert len(lines) == 3 and flags <= set(re.findall(r'add_argument\("(--[\w-]+)"', EXAMPLE)) and "--resume" in flags
