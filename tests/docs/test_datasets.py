"""The JSON lines and the commands of docs/datasets.md, run as they stand on generated photos."""

import re
import shlex

from PIL import Image

from nemo_dali.commands.cli import main
from nemo_dali.data.dataset import Dataset
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "datasets.md").read_text("utf-8")


def section(title):
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def commands(text):
    return [shlex.split(line) for line in re.findall(r"^    nemo-dali (.*)$", text, re.MULTILINE)]


def test_the_json_lines_of_the_page_become_a_data_set(tmp_path, monkeypatch):
    own = section("Your own data: JSON lines")
    lines, (command,) = re.findall(r"^    (\{.*)$", own, re.MULTILINE), commands(own)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR" / "kitchen").mkdir(parents=True)
    Image.new("RGB", (200, 150), "white").save("DIR/kitchen/1.jpg")
    (tmp_path / "FILE.jsonl").write_text("\n".join(lines) + "\n")
    assert main(command) == 0
    dataset = Dataset.open("F.ris.h5")
    assert dataset.sentences.text[:] == ["red cup", "the cup on the left", "both plates", "a green cup"]
    assert [bool(dataset.mask(ref).any()) for ref in range(3)] == [True, True, False]
    assert [dataset.category_name[row] for row in dataset.refs.category[:1]] == ["cup"]


def test_the_generators_commands_make_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    every, some = commands(section("Generated data"))
    assert main([*every, "--images", "12"]) == 0
    index = re.search(r"nemo-dali (index .*)", capsys.readouterr().out)[1]
    assert main(shlex.split(index)) == 0
    some[1] = "OTHER"
    assert main([*some, "--images", "12"]) == 0
