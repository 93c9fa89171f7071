"""docs/tutorial.md does what it says: its commands and its Python run as they stand, in order, in one folder."""

import re
import shlex

import pytest

from nemo_dali.commands.cli import main
from tests.helpers.paths import ROOT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs_from_its_first_line_to_its_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran, session = [], {"__name__": "__main__"}
    for language, block in BLOCK.findall((ROOT / "docs/tutorial.md").read_text("utf-8")):
        ran.append(language)
        if language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)
                assert program == "nemo-dali" and main(arguments) == 0, line
        elif language == "python":
            exec(compile(block, "tutorial.md", "exec"), session)
        else:
            assert language == "text"
    assert ran.count("sh") >= 4 and ran.count("python") >= 8
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    first, second = map(float, re.findall(r"epoch \d: loss (\d\.\d+)", shown))
    assert second < first < 1
    assert "mined 2 x 2 target in cell" in shown and "single 1 x 1 target in cell 0" in shown
    assert "pool max_similarity 0.9, top_k 20, sentences 537" in shown and "95 negatives for each of 537" in shown
