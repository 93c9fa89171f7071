"""What the commands' lines may say, what help says of it, and numbers that no command can do anything with."""

import re
from typing import get_args

import pytest
from typer.main import get_command

from nemo_dali._choices import BoxFormat, DType, Exif, LayoutName, PeerDType, Placement, Resample
from nemo_dali.commands.cli import app, main

DATA = ["data.ris.h5", "data.neg.h5"]
MINE = ["mine", "data.ris.h5", "--embeddings", "e.neg.h5", "-o", "out.neg.h5"]
TILES = ["tiles", "data.ris.h5", "-o", "out.tiles.h5"]
BENCH = ["bench", "loader", *DATA]
PEERS = ["bench", "peers", *DATA]
INTEGERS = [
    (["demo"], "--steps"),
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
    (["preview", *DATA, "-o", "out.png"], "--epoch"),
    (["report", *DATA, "-o", "out.html"], "--examples"),
    (["report", *DATA, "-o", "out.html"], "--seed"),
    (["report", *DATA, "-o", "out.html"], "--grid"),
    (["tune", *DATA, "-o", "out.json"], "--grid"),
    *((BENCH, option) for option in ("--batch-size", "--size", "--num-threads", "--pairs", "--steps")),
    *((PEERS, option) for option in ("--batch-size", "--size", "--num-threads", "--pairs", "--steps")),
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


# --- several values behind one flag ----------------------------------------------------------------------------------


class Reached(Exception):
    """A command's work was about to begin."""


def arguments_of(words, function, monkeypatch):
    """What a command gives to the function that does its work."""
    seen = {}

    def reached(*positional, **named):
        seen.update(named, positional=positional)
        raise Reached

    monkeypatch.setattr(function, reached)
    with pytest.raises(Reached):
        main(words)
    return seen


@pytest.mark.parametrize(
    ("words", "grids"),
    [
        ("d.ris.h5", [1, 2]),
        ("d.ris.h5 --grids 3", [3]),
        ("d.ris.h5 --grids=3", [3]),
        ("d.ris.h5 --grids 1 2 3", [1, 2, 3]),
        ("d.ris.h5 --grids 1 --grids 2", [1, 2]),
        ("--grids 1 2 --num-threads 1 d.ris.h5 --grids=3", [1, 2, 3]),
        ("--grids 1 2 -- d.ris.h5", [1, 2]),
    ],
)
def test_a_flag_takes_several_values_at_once_or_again_and_again(words, grids, monkeypatch):
    words = ["tiles", "--size", "32", "-o", "out.tiles.h5", *words.split()]
    given = arguments_of(words, "nemo_dali.tiles.build.make_tiles", monkeypatch)
    assert (str(given["positional"][0]), given["grids"]) == ("d.ris.h5", grids)


@pytest.mark.parametrize("words", ["--max-similarity -0.2 -.3 4e-1", "--max-similarity -0.2 --max-similarity -.3 .4"])
def test_negative_numbers_are_values(words, monkeypatch):
    given = arguments_of(["inspect", "f.h5", *words.split()], "nemo_dali.commands.inspection.inspect_file", monkeypatch)
    assert [tau for tau, _ in given["pools"]] == [-0.2, -0.3, 0.4]


def test_models_and_their_weights_come_in_lists(monkeypatch):
    words = (
        "mine d.ris.h5 --model A B --pretrained x --pretrained y -o out.neg.h5 --exclude-photos-of g.ris.h5 h.ris.h5"
    )
    given = arguments_of(words.split(), "nemo_dali.mining.job.mine", monkeypatch)
    assert (given["model"], given["pretrained"], given["embeddings"]) == (["A", "B"], ["x", "y"], None)
    assert [str(name) for name in given["exclusions"].photos_of] == ["g.ris.h5", "h.ris.h5"]


def test_folders_of_photos_are_given_one_by_one(monkeypatch):
    """What follows such a folder may be the source."""
    words = "index -o out.ris.h5 --leave-out a.jpg b.jpg --images one --images s3://two/2 REFER_ROOT"
    given = arguments_of(words.split(), "nemo_dali.data.annotations.read_annotations", monkeypatch)
    assert str(given["positional"][0]) == "REFER_ROOT"
    assert (given["images"], given["leave_out"]) == (["one", "s3://two/2"], ["a.jpg", "b.jpg"])


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("tiles d.ris.h5 --size 32 -o --verbose", "-o"),
        ("tiles d.ris.h5 --size 32 -o", "-o"),
        ("tiles d.ris.h5 -o out.tiles.h5 --size 32 --grids --verbose", "--grids"),
        ("tiles d.ris.h5 -o out.tiles.h5 --size 32 --grids", "--grids"),
        ("tiles -o out.tiles.h5 --size -- d.ris.h5", "--size"),
    ],
)
def test_an_option_without_its_value_is_told(words, flag, capsys):
    """It is not taken from the next option: nothing is written under the name "--verbose"."""
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    *usage, line = capsys.readouterr().err.splitlines()
    assert usage[0].startswith("usage: nemo-dali tiles ")
    assert line.startswith("nemo-dali tiles: error: ") and f"'{flag}' requires" in line


# --- help ------------------------------------------------------------------------------------------------------------

COMMANDS = ["demo", "synth", "index", "mine", "tune", "report", "preview", "tiles", "inspect", "doctor", "bench"]
CHOICES = {
    "synth": {"--layout": LayoutName},
    "index": {"--box-format": BoxFormat, "--exif": Exif},
    "tiles": {"--resample": Resample},
    "bench loader": {"--resample": Resample, "--dtype": DType, "--mode": Placement},
    "bench peers": {"--dtype": PeerDType},
}


def parameters(command):
    """A command's own parameters, by the name that help shows."""
    group = get_command(app)
    for word in command.split():
        group = group.commands[word]
    return {param.opts[0] if param.param_type_name == "option" else param.metavar: param for param in group.params}


@pytest.mark.parametrize("command", [*COMMANDS[:-1], "bench loader", "bench peers"])
def test_help_explains_every_option_in_80_plain_columns(command, monkeypatch, capsys):
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: nemo-dali {command} ") and not err
    assert all(len(line) <= 80 and line.isascii() and line.isprintable() for line in out.splitlines())
    text = " ".join(out.split())
    for name, param in parameters(command).items():
        assert param.help.endswith("."), name
        assert f"{name} " in text
        if param.required:
            assert param.metavar in text.partition(param.help)[0]
        elif param.default not in (None, False):
            assert "[default:" in text.partition(" ".join(param.help.split()))[2].split(" --")[0], name
    for option, literal in CHOICES.get(command, {}).items():
        shown = re.search(rf"{option} [<\[]([\w|-]+)[>\]]", text)
        assert shown is not None and set(get_args(literal)) <= set(shown[1].split("|")), option


def test_help_lists_the_commands_in_the_order_of_the_work(capsys):
    assert main(["-h"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines()] == COMMANDS


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("synth out --layout coco", "--layout"),
        ("index x.jsonl --images p -o o.ris.h5 --exif turn", "--exif"),
        ("tiles d.ris.h5 --size 32 -o o.tiles.h5 --resample nearest", "--resample"),
        ("bench loader d.ris.h5 d.neg.h5 --dtype float64", "--dtype"),
    ],
)
def test_a_choice_that_there_is_not_is_refused_with_those_that_there_are(words, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    *_, line = capsys.readouterr().err.splitlines()
    literal = {name: choices for each in CHOICES.values() for name, choices in each.items()}[option]
    assert option in line and all(choice in line for choice in get_args(literal))
    assert not list(tmp_path.iterdir())
