"""The commands as a user types them, most of them in one process."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nemo_dali.cli import main
from tests.refer_files import write_refer


def run(*words):
    return main([str(word) for word in words])


def index(refer, output, *more, split="train"):
    return run(
        *("index", refer.root, "--dataset", "refcoco", "--split-by", "unc", "--split", split),
        *("--images", refer.photos, "-o", output, *more),
    )


@pytest.fixture(scope="module")
def mined(tmp_path_factory, clip):
    """A folder with REFER files, train.ris.h5 and train.neg.h5, made by the commands."""
    folder = tmp_path_factory.mktemp("cli")
    refer = write_refer(folder, photos=12)
    assert index(refer, folder / "train.ris.h5", "--verify") == 0
    assert mine(folder / "train.ris.h5", clip, folder / "train.neg.h5") == 0
    return folder


def mine(dataset, clip, output, *more):
    weights = clip[0] / "tiny.json", clip[0] / "tiny.pt"
    return run("mine", dataset, "--model", weights[0], "--pretrained", weights[1], "-o", output, *more)


def test_from_annotations_to_a_picture(mined, capsys):
    assert run("preview", mined / "train.ris.h5", mined / "train.neg.h5", "-o", mined / "sheet.png", "--count", 4) == 0
    sheet = np.asarray(Image.open(mined / "sheet.png"))
    assert sheet.ndim == 3 and sheet.std() > 10
    capsys.readouterr()

    assert run("inspect", "--json", mined / "train.ris.h5") == 0
    dataset = json.loads(capsys.readouterr().out)
    assert (dataset["format"], dataset["version"], dataset["photos"], dataset["refs"]) == ("nemo-dali/ris", 1, 12, 24)

    asked = ("--max-similarity", 0.2, 0.9, "--top-k", 3, 5)
    assert run("inspect", "--json", mined / "train.neg.h5", *asked) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["dataset_fingerprint"] == dataset["fingerprint"]
    assert (table["depth"], table["neighbors"], table["sentences"]) == (1000, 11, dataset["sentences"])
    assert table["exclusions"] == ["own photo"] and table["model"].endswith("tiny.json")
    pairs = [(pool["max_similarity"], pool["top_k"]) for pool in table["pools"]]
    assert pairs == [(0.2, 3), (0.2, 5), (0.9, 3), (0.9, 5)]
    assert table["pools"][3]["quantiles"]["50"] == 5

    assert run("inspect", mined / "train.neg.h5") == 0
    assert "fingerprint" in capsys.readouterr().out


def test_synth_writes_what_index_reads(tmp_path, capsys):
    assert run("synth", tmp_path / "data", "--images", 12, "--seed", 3) == 0
    command = capsys.readouterr().out.split("nemo-dali ", 1)[1].split()
    assert run(*command[:-1], tmp_path / "made.ris.h5", "--verify") == 0
    assert (tmp_path / "made.ris.h5").exists()


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails_in_one_line(capsys, code, *words):
    """The one line on stderr of a command that ends with 1."""
    out, err = capsys.readouterr()
    assert code == 1 and not out
    assert err.startswith("nemo-dali: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err
    return err


def test_bad_annotations_end_in_one_line_and_touch_nothing(tmp_path, capsys):
    refer = write_refer(tmp_path)
    output = tmp_path / "out.ris.h5"
    output.write_bytes(b"somebody's")
    pickle = refer.root / "refcoco" / "refs(unc).p"
    good = pickle.read_bytes()
    cases = {
        b"cposix\nsystem\n(S'touch evil'\ntR.": "posix.system",
        good[: len(good) // 2]: "refs(unc).p",
        b"": "refs(unc).p",
    }
    for content, word in cases.items():
        pickle.write_bytes(content)
        before = snapshot(tmp_path)
        fails_in_one_line(capsys, index(refer, output), word)
        assert snapshot(tmp_path) == before
    pickle.write_bytes(good)
    fails_in_one_line(capsys, index(refer, output, split="vall"), "vall", "train")
    assert output.read_bytes() == b"somebody's"


def test_bad_photos_end_in_one_line_and_touch_nothing(tmp_path, capsys):
    refer = write_refer(tmp_path)
    victim = sorted(refer.photos.iterdir())[2]
    good = victim.read_bytes()
    output = tmp_path / "out.ris.h5"

    victim.unlink()
    fails_in_one_line(capsys, index(refer, output), victim.name)
    victim.write_bytes(good[:-300])
    fails_in_one_line(capsys, index(refer, output, "--verify"), victim.name, "--skip-corrupt")
    Image.new("RGB", (31, 33)).save(victim)
    fails_in_one_line(capsys, index(refer, output), victim.name, "31x33")
    assert not output.exists()

    victim.write_bytes(good[:-300])
    assert index(refer, output, "--verify", "--skip-corrupt") == 0
    assert victim.name in capsys.readouterr().out
    assert run("inspect", "--json", output) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == 1


def test_tables_that_do_not_fit_end_in_one_line(mined, tmp_path, capsys):
    other = write_refer(tmp_path, photos=12, seed=9)
    assert index(other, tmp_path / "other.ris.h5") == 0
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    code = run("preview", tmp_path / "other.ris.h5", mined / "train.neg.h5", "-o", sheet)
    fails_in_one_line(capsys, code, "another data set", "nemo-dali mine")
    cut = tmp_path / "cut.neg.h5"
    cut.write_bytes((mined / "train.neg.h5").read_bytes()[:-1000])
    fails_in_one_line(capsys, run("preview", mined / "train.ris.h5", cut, "-o", sheet), "cut short")
    fails_in_one_line(capsys, run("inspect", cut), "cut short")
    fails_in_one_line(
        capsys, run("preview", mined / "train.neg.h5", mined / "train.neg.h5", "-o", sheet), "nemo-dali/neg"
    )
    fails_in_one_line(capsys, run("inspect", tmp_path / "nothing.h5"), "does not exist")
    fails_in_one_line(capsys, run("inspect", __file__), "HDF5")
    assert not sheet.exists()


def test_a_disk_that_fills_up_while_mining_ends_in_one_line(mined, clip, tmp_path):
    """EFBIG stands in for ENOSPC: both are a write that fails half way."""
    output = tmp_path / "out.neg.h5"
    output.write_bytes(b"somebody's")
    code = (
        "import resource, sys; from nemo_dali.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["mine", mined / "train.ris.h5", "--model", clip[0] / "tiny.json", "--pretrained", clip[0] / "tiny.pt"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("nemo-dali: Cannot write") and "Traceback" not in done.stderr
    assert output.read_bytes() == b"somebody's"
    assert [path.name for path in tmp_path.iterdir()] == ["out.neg.h5"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["index"],
        ["bench"],
        ["synth", "x", "--images", "0"],
        ["mine", "x.ris.h5", "--model", "ViT-B-32", "--pretrained", "x", "-o", "y", "--depth", "0"],
    ],
)
def test_wrong_usage_ends_with_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: nemo-dali" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_installed_command_answers(tmp_path):
    command = shutil.which("nemo-dali", path=f"{sys.prefix}/bin")
    assert command is not None
    done = subprocess.run([command, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()[0]) == (0, "nemo-dali")
    head = subprocess.run(f"{command} --help | head -1", shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert "usage" in head.stdout and not head.stderr
