"""Numbers that no command can do anything with: refused in a line, before anything is opened, taken or written."""

import re

import pytest

from nemo_dali.commands.cli import main

DATA = ["data.ris.h5", "data.neg.h5"]
MINE = ["mine", "data.ris.h5", "--embeddings", "e.neg.h5", "-o", "out.neg.h5"]
TILES = ["tiles", "data.ris.h5", "-o", "out.tiles.h5"]
BENCH = ["bench", "loader", *DATA]
INTEGERS = [
    (["synth", "out"], "--images"),
    (["synth", "out"], "--seed"),
    (["synth", "out", "--distractors", "1"], None),
    (MINE, "--depth"),
    (MINE, "--batch-size"),
    ([*MINE, "--approximate"], "--probes"),
    (TILES, "--size"),
    ([*TILES, "--size", "32"], "--grids"),
    ([*TILES, "--size", "32"], "--num-threads"),
    (["inspect", "data.neg.h5"], "--top-k"),
    (["preview", *DATA, "-o", "out.png"], "--count"),
    (["preview", *DATA, "-o", "out.png"], "--seed"),
    (["preview", *DATA, "-o", "out.png"], "--size"),
    (["report", *DATA, "-o", "out.html"], "--examples"),
    (["report", *DATA, "-o", "out.html"], "--seed"),
    (["report", *DATA, "-o", "out.html"], "--grid"),
    (["tune", *DATA, "-o", "out.json"], "--grid"),
    *((BENCH, option) for option in ("--batch-size", "--size", "--num-threads", "--pairs", "--steps")),
    ([*BENCH, "--mode", "device", "--tiles", "t.tiles.h5"], "--device-budget"),
]
NUMBERS = [
    (MINE, "--exclude-similar-photos"),
    (MINE, "--exclude-siblings"),
    (["inspect", "data.neg.h5"], "--max-similarity"),
    (["report", *DATA, "-o", "out.html"], "--passing"),
    (["tune", *DATA, "-o", "out.json"], "--passing"),
    (BENCH, "--starve"),
    (BENCH, "--p-mined"),
]
NO_NUMBERS = ["nan", "inf", "-1e999", "1e999", "x\x1b[2J\u202e", ""]
CASES = [
    *((words, option, value) for words, option in INTEGERS for value in ("9" * 30, "1" * 5000, "-1", *NO_NUMBERS)),
    *((words, option, value) for words, option in NUMBERS for value in NO_NUMBERS),
]


@pytest.mark.parametrize(("words", "option", "value"), CASES)
def test_an_impossible_number_ends_with_2_and_one_short_line(words, option, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*words, value] if option is None else [*words, f"{option}={value}"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out
    *usage, line = err.splitlines()
    assert usage[0].startswith("usage: nemo-dali") and len(line) < 200
    assert re.search(r"(must be|expected|invalid choice)", line) and line.isprintable()
    assert option is None or option in line
    assert not list(tmp_path.iterdir())
