"""Damaged and forged files of ours: refused in a sentence, never a signal, a hang or an unnoticed difference."""

import json

import numpy as np
import pytest

from nemo_dali.tiles.build import make_tiles
from tests.helpers import fork_server
from tests.helpers.counts import examples
from tests.helpers.damage import SIZE
from tests.helpers.files import make_files
from tests.helpers.forged import forge

KINDS = ("ris", "neg", "tiles")
PROGRAM = """
import json, sys
from pathlib import Path
from tests.helpers.damage import try_files
kind, folder, what, begin, end, loader = sys.argv[1:]
counts = try_files(kind, Path(folder), what, int(begin), int(end), loader=loader == "1")
print(json.dumps(counts))
"""


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    files = make_files(folder, photos=9, refs_per_photo=1)
    make_tiles(files.dataset, size=SIZE, output=folder / "sound.tiles.h5", num_threads=1)
    files.dataset.rename(folder / "sound.ris.h5")
    files.negatives.rename(folder / "sound.neg.h5")
    return folder


def attempt(folder, kind, what, count, *, loader, begin=0):
    program = fork_server.start(PROGRAM, kind, folder, what, begin, begin + count, int(loader))
    out, err = program.communicate(timeout=1500)
    assert program.returncode == 0, out[-300:] + err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_always_noticed(folder, kind):
    counts = attempt(folder, kind, "damage", examples(5000), loader=False)
    assert counts["refused"] > 0.5 * sum(counts.values())  # other bytes lie between the arrays


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_forgeries_are_taken_or_refused(folder, kind):
    counts = attempt(folder, kind, "forgery", examples(5000), loader=False)
    assert counts["refused"] > 0.3 * sum(counts.values())


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.process
@pytest.mark.parametrize("what", ["damage", "forgery"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_bears_them(folder, kind, what):
    counts = attempt(folder, kind, what, examples(300), loader=True, begin=100_000)
    assert counts["refused"] > 0.3 * sum(counts.values())


# --- every command that can open a file ------------------------------------------------------------------------------


def put(name, place, value):
    return lambda parts: parts.arrays[name].__setitem__(place, value)


FAULTS = {
    "ris": {
        "a photo's row out of range": put("refs/image", 2, 9),
        "run lengths of another area": put("rle/counts", 1, 2**32 - 1),
        "a photo of no width": put("images/width", 0, 0),
        "a name that leaves the folder": lambda parts: parts.set_strings("images/file_name", ["../x.jpg"] * 9),
        "sentences that are not UTF-8": lambda parts: parts.arrays["sentences/text"].fill(255),
        "strings that lie nowhere": put("images/file_name_offsets", -1, 2**62),
        "a count that is none": lambda parts: parts.attributes.update(left_out=1e300),
        "an image root that is none": lambda parts: parts.attributes.update(image_root="s3://a@b/c"),
        "a missing column": lambda parts: parts.arrays.pop("images/digest"),
    },
    "neg": {
        "a photo that there is not": put("neighbors", (slice(None), 1), -7),
        "a photo twice": lambda parts: put("neighbors", (slice(None), 1), parts.arrays["neighbors"][:, 0])(parts),
        "no number": put("similarity", (slice(None), 0), np.nan),
        "similarities that climb": put("similarity", (slice(None), 2), 0.9),
        "a depth that does not fit": lambda parts: parts.attributes.update(depth=3),
        "another data set": lambda parts: parts.attributes.update(dataset_fingerprint="0" * 64),
        "text in place of a list": lambda parts: parts.attributes.update(exclusions="own photo"),
    },
    "tiles": {
        "a size that does not fit": lambda parts: parts.attributes.update(size=2**40),
        "grids of another type": lambda parts: parts.attributes.update(grids=[1.5]),
        "another data set": lambda parts: parts.attributes.update(dataset_fingerprint="0" * 64),
        "too few photos": lambda parts: parts.arrays.update(digest=parts.arrays["digest"][:-1]),
    },
}
COMMANDS = {
    "inspect {it}": KINDS,
    "mine {ris} --embeddings {neg} -o {out}.neg.h5": ("ris", "neg"),
    "tiles {ris} --size 32 -o {out}.tiles.h5": ("ris",),
    "preview {ris} {neg} -o {out}.png --count 9": ("ris", "neg"),
    "report {ris} {neg} -o {out}.html": ("ris", "neg"),
    "tune {ris} {neg} -o {out}.json": ("ris", "neg"),
    "bench loader {ris} {neg} --pairs 1 --steps 3 --batch-size 4": ("ris", "neg"),
    "bench loader {ris} {neg} --mode host --tiles {tiles} --size 32 --pairs 1 --steps 3 --batch-size 4": KINDS,
}
# What is looked at when it is used, and the commands that always use it; the others may do their work.
USED_BY = {
    "run lengths of another area": ("inspect",),
    "a name that leaves the folder": ("inspect", "tiles", "preview"),
    "strings that lie nowhere": ("inspect", "tiles", "preview"),
    "sentences that are not UTF-8": ("inspect", "preview", "report"),
}
RUN = """
import contextlib, io, json, sys
from nemo_dali.commands.cli import main
from tests.helpers.damage import limit
for words in json.loads(sys.argv[1]):
    limit()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind in KINDS for fault in FAULTS[kind]])
def test_each_command_refuses_it_in_a_sentence(folder, tmp_path, kind, fault):
    files = {name: str(folder / f"sound.{name}.h5") for name in KINDS} | {"out": str(tmp_path / "out")}
    bad = forge(folder / f"sound.{kind}.h5", FAULTS[kind][fault], tmp_path / f"bad.{kind}.h5")
    files |= {kind: str(bad), "it": str(bad)}
    commands = [command for command, kinds in COMMANDS.items() if kind in kinds]
    lines = [[word.format(**files) for word in command.split()] for command in commands]
    run = fork_server.run(RUN, json.dumps(lines))
    assert run.returncode == 0, run.stdout + run.stderr
    for command, line in zip(commands, run.stdout.splitlines(), strict=True):
        code, said = json.loads(line)
        if code == 0 and fault in USED_BY and not command.startswith(USED_BY[fault]):
            continue
        assert code == 1, command
        assert said.startswith("nemo-dali: ") and said.count("\n") == 1, (command, said)
        assert f"bad.{kind}.h5" in said and said.rstrip().endswith((".h5", ".", "DIR")), (command, said)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".partial") == []
