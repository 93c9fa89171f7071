"""The commands as a user types them, most of them in one process."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nemo_dali.commands.cli import main
from nemo_dali.data.dataset import Dataset
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import read_index
from nemo_dali.mining.job import mine as api_mine
from tests.helpers import fork_server
from tests.helpers.paths import ROOT
from tests.helpers.refer import write_refer


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
    assert (dataset["format"], dataset["version"], dataset["photos"], dataset["refs"]) == ("nemo-dali/ris", 2, 12, 24)

    asked = ("--max-similarity", 0.2, 0.9, "--top-k", 3, 5)
    assert run("inspect", "--json", mined / "train.neg.h5", *asked) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["dataset_fingerprint"] == dataset["fingerprint"]
    assert (table["depth"], table["neighbors"], table["sentences"]) == (1000, 11, dataset["sentences"])
    assert table["exclusions"] == ["own photo", "photos outside the split"] and table["method"] == "exact"
    assert table["model"].endswith("tiny.json") and table["recall"] == []
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


def test_synth_takes_weights_of_kinds_of_expression(tmp_path, capsys):
    words = ("synth", tmp_path / "data", "--images", 3, "--expressions", "attribute=2", "place=0.5")
    assert run(*words, "--seed", 3) == 0
    info = json.loads((tmp_path / "data" / "refcoco" / "instances.json").read_text())["info"]
    assert info["expressions"] == {"attribute": 2.0, "place": 0.5}
    for given, told in (
        (["place"], "('place') must be KIND=WEIGHT, such as attribute=2"),
        (["place=x\x1b[2J"], "must be KIND=WEIGHT"),
        (["place=nan"], "(place=nan) must have weights from 0"),
        (["place=1", "place=2"], "('place=2') must name a kind once"),
        (["colour=1"], "('colour') must be weights of attribute, place, zone, rank, relation"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run("synth", tmp_path / "other", "--expressions", *given)
        line = capsys.readouterr().err.splitlines()[-1]
        assert "expressions" in line and told in line and line.isprintable()
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_policy_file_goes_where_a_policy_goes(mined, tmp_path, capsys):
    data, policy = (mined / "train.ris.h5", mined / "train.neg.h5"), tmp_path / "policy.json"
    assert run("tune", *data, "-o", policy) == 0
    capsys.readouterr()
    content = json.loads(policy.read_text())
    content["top_k"] = 4
    policy.write_text(json.dumps(content))

    def pools():
        assert run("inspect", "--json", data[1], "--policy", policy) == 0
        return [(pool["max_similarity"], pool["top_k"]) for pool in json.loads(capsys.readouterr().out)["pools"]]

    assert pools() == [(content["max_similarity"], 4)]
    assert run("preview", *data, "--policy", policy, "--count", 2, "-o", tmp_path / "sheet.png") == 0
    short = ("--batch-size", 4, "--size", 48, "--pairs", 1, "--steps", 2, "--json", tmp_path / "bench.json")
    assert run("bench", "loader", *data, "--policy", policy, *short) == 0
    assert json.loads((tmp_path / "bench.json").read_text())["config"]["policy"]["top_k"] == 4
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("bench", "loader", *data, "--policy", policy, "--p-mined", 1, *short)
    content |= {"p_mined": {"steps": {"0": 0, "3": 0.5}}, "top_k": {"linear": {"0": 8, "6": 4}}}
    content["max_similarity"] = {"steps": {"0": None, "6": 0.5, "9": 0.5}}
    policy.write_text(json.dumps(content))
    capsys.readouterr()
    assert pools() == [(None, 8), (None, 6), (0.5, 4)]
    assert run("bench", "loader", *data, "--policy", policy, *short) == 0
    config = json.loads((tmp_path / "bench.json").read_text())["config"]
    assert config["policy"]["p_mined"] == 0.5 and config["policy"]["top_k"] == 6
    assert run("preview", *data, "--policy", policy, "--count", 2, "--epoch", 3, "-o", tmp_path / "sheet.png") == 0
    policy.write_text("[]")
    capsys.readouterr()
    for command in (("preview", *data, "-o", tmp_path / "other.png"), ("inspect", data[1])):
        fails_in_one_line(capsys, run(*command, "--policy", policy), "policy.json", "nemo-dali tune")


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
    assert index(refer, output) == 0
    capsys.readouterr()
    earlier = output.read_bytes()
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
    assert output.read_bytes() == earlier


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
    fails_in_one_line(capsys, code, "a different data set", "nemo-dali mine")
    cut = tmp_path / "cut.neg.h5"
    cut.write_bytes((mined / "train.neg.h5").read_bytes()[:-1000])
    fails_in_one_line(capsys, run("preview", mined / "train.ris.h5", cut, "-o", sheet), "truncated")
    fails_in_one_line(capsys, run("inspect", cut), "truncated")
    fails_in_one_line(
        capsys, run("preview", mined / "train.neg.h5", mined / "train.neg.h5", "-o", sheet), "nemo-dali/neg"
    )
    fails_in_one_line(capsys, run("inspect", tmp_path / "nothing.h5"), "does not exist")
    fails_in_one_line(capsys, run("inspect", __file__), "HDF5")
    assert not sheet.exists()


@pytest.mark.process
@pytest.mark.slow
def test_a_disk_that_fills_up_while_mining_ends_in_one_line(mined, clip, tmp_path):
    """EFBIG stands in for ENOSPC: both are a write that fails half way."""
    output = tmp_path / "out.neg.h5"
    shutil.copy(mined / "train.neg.h5", output)
    earlier = output.read_bytes()
    code = (
        "import resource, sys; from nemo_dali.commands.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); sys.exit(main(sys.argv[1:]))"
    )
    words = ["mine", mined / "train.ris.h5", "--model", clip[0] / "tiny.json", "--pretrained", clip[0] / "tiny.pt"]
    done = fork_server.run(code, *words, "-o", output)
    assert done.returncode == 1, done.stderr
    assert (
        done.stderr.splitlines()[-1].startswith(f"nemo-dali: Cannot write {output}: File too large")
        and "Traceback" not in done.stderr
    )
    assert output.read_bytes() == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["out.neg.h5"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["index"],
        ["bench"],
        ["index", "folder", "--images", "photos", "-o", "x.ris.h5"],
        ["index", "x.jsonl", "--dataset", "refcoco", "--images", "photos", "-o", "x.ris.h5"],
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


def test_no_command_writes_over_another_kind_of_file(mined, clip, tmp_path, capsys):
    for name in ("train.ris.h5", "train.neg.h5"):
        shutil.copy(mined / name, tmp_path / name)
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    dataset, table, notes = (tmp_path / name for name in ("train.ris.h5", "train.neg.h5", "notes.txt"))
    refer = write_refer(tmp_path / "refer", photos=6)
    for output in (dataset, notes):
        fails_in_one_line(capsys, mine(dataset, clip, output), output, "-o")
    for output in (table, notes):
        fails_in_one_line(capsys, index(refer, output), output, "-o")
    wrong = fails_in_one_line(capsys, run("preview", dataset, dataset, "-o", tmp_path / "s.png"), "nemo-dali/ris")
    assert " -o " not in wrong  # no advice to write over the data set
    fails_in_one_line(capsys, run("bench", "loader", dataset, table, "--json", dataset), "it is the input")
    with pytest.raises(SystemExit):
        run("bench", "loader", dataset, table, "--json", notes)
    capsys.readouterr()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.neg.h5").symlink_to(table)
    for output in (table, tmp_path / "sub" / ".." / "train.neg.h5", tmp_path / "sub" / "other.neg.h5"):
        code = run("mine", dataset, "--embeddings", table, "-o", output)
        fails_in_one_line(capsys, code, "it is the input", output)
    with pytest.raises(FileFormatError, match="it is the input"):
        api_mine(dataset, embeddings=table, output=tmp_path / "sub" / "other.neg.h5")
    assert {path: content for path, content in snapshot(tmp_path).items() if path in before} == before


def test_inspect_finds_a_single_changed_bit(mined, tmp_path, capsys):
    for name, where in (("train.ris.h5", "refs/ref_id"), ("train.neg.h5", "similarity")):
        path = tmp_path / name
        shutil.copy(mined / name, path)
        assert run("inspect", path) == 0
        capsys.readouterr()
        content = bytearray(path.read_bytes())
        with open(path, "rb") as file:
            content[read_index(file.fileno()).arrays[where].offset] ^= 1
        path.write_bytes(content)
        fails_in_one_line(capsys, run("inspect", path), f"/{where} does not match its checksum")


@pytest.mark.slow
def test_indexing_twice_gives_the_same_bytes(tmp_path):
    refer = write_refer(tmp_path)
    first, second = tmp_path / "a.ris.h5", tmp_path / "b.ris.h5"
    assert index(refer, first) == 0
    time.sleep(1.1)  # HDF5's times are in seconds
    assert index(refer, second) == 0
    assert first.read_bytes() == second.read_bytes()


def test_an_interrupt_ends_in_one_line(mined, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_dali.commands.inspection.inspect_file", interrupted)
    fails_in_one_line(capsys, run("inspect", mined / "train.neg.h5"), "interrupted")


def test_the_systems_refusals_end_in_one_line(mined, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nemo_dali.loader._frames.memory_bytes", lambda: 2**20)
    huge = run("preview", mined / "train.ris.h5", mined / "train.neg.h5", "-o", tmp_path / "s.png", "--size", 480)
    fails_in_one_line(capsys, huge, "this machine has 0.0", "size")
    refer = write_refer(tmp_path)
    fails_in_one_line(capsys, index(refer, tmp_path / ("x" * 300)), "too long")


def shell(command):
    words = ["bash", "-o", "pipefail", "-c", f"ulimit -c 0; {command}"]
    return subprocess.run(words, capture_output=True, env={**os.environ, "NEMO": f"{sys.executable} -m nemo_dali"})


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [
        ("$NEMO inspect --json {table} | true", 0, b""),
        ("$NEMO inspect {table} >&-", 0, b""),
        ("$NEMO inspect {table} >/dev/full", 1, b"No space left on device"),
        pytest.param("$NEMO --help | head -0", 0, b"", marks=pytest.mark.slow),
        pytest.param("$NEMO --help >/dev/full", 1, b"No space left on device", marks=pytest.mark.slow),
        pytest.param("$NEMO --version >&-", 0, b"", marks=pytest.mark.slow),
        pytest.param("$NEMO inspect nothing >&-", 1, b"nothing", marks=pytest.mark.slow),
        pytest.param("$NEMO inspect nothing 2>&-", 1, b"", marks=pytest.mark.slow),
        pytest.param("$NEMO inspect nothing 2>/dev/full", 1, b"", marks=pytest.mark.slow),
        pytest.param("$NEMO fly >&- 2>&- <&-", 2, b"", marks=pytest.mark.slow),
    ],
)
def test_streams_that_nobody_holds_are_no_traceback(mined, command, code, reason):
    done = shell(command.format(table=mined / "train.neg.h5"))
    assert done.returncode == code and reason in done.stderr and done.stderr.count(b"\n") == bool(reason)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&- 2>&- <&-", "2>&1 | head -0"])
def test_work_is_done_for_nobody_too_and_nothing_is_printed_into_it(mined, tmp_path, streams):
    made, other = tmp_path / "a.ris.h5", tmp_path / "b.tiles.h5"
    refer = write_refer(tmp_path)
    index = f"$NEMO index {refer.root} --dataset refcoco --split-by unc --split train --images {refer.photos} -o {made}"
    assert shell(f"{index} {streams}").returncode == 0
    assert len(Dataset.open(made).images.id) == 6
    assert shell(f"$NEMO tiles {made} --size 32 -o {other} {streams}").returncode == 0
    assert main(["inspect", str(other)]) == 0


@pytest.mark.slow
def test_names_that_are_not_utf8_are_written_to_and_shown(mined, tmp_path):
    data = f"{mined / 'train.ris.h5'} {mined / 'train.neg.h5'}"
    for command, name in (
        (f"preview {data} --count 2 --size 32", "a\\xe9.png"),
        (f"report {data} --examples 1", "a\\xe9.html"),
        (f"tune {data}", "a\\xe9.json"),
        (f"tiles {mined / 'train.ris.h5'} --size 32", "a\\xe9.tiles.h5"),
        (f"mine {mined / 'train.ris.h5'} --embeddings {mined / 'train.neg.h5'}", "a\\xe9.neg.h5"),
    ):
        done = shell(f"$NEMO {command} -o {tmp_path}/$'{name}'")
        assert done.returncode == 0 and f"{tmp_path}/{name}".encode() in done.stdout, done.stderr
        assert os.path.exists(os.fsencode(tmp_path) + b"/" + name.encode().replace(b"\\xe9", b"\xe9"))


def test_a_name_that_cannot_be_stored_ends_in_one_line(tmp_path, capsys):
    refer = write_refer(tmp_path, photos=6)
    photos = refer.photos.rename(tmp_path / os.fsdecode(b"photos\xe9"))
    code = index(refer._replace(photos=photos), tmp_path / "out.ris.h5")
    fails_in_one_line(capsys, code, "photos\\xe9", "UTF-8")
    assert not (tmp_path / "out.ris.h5").exists()
    demo = tmp_path / os.fsdecode(b"demo\xe9")
    fails_in_one_line(capsys, run("demo", "--out", demo), "demo\\xe9", "UTF-8")
    assert not demo.exists()


def test_errors_and_logs_hold_nothing_that_a_terminal_obeys(mined, tmp_path, capsys):
    hostile = tmp_path / "\x1b[2J\u202e\x9b\n.h5"
    assert "\\x1b[2J\\u202e\\x9b\\n.h5" in fails_in_one_line(capsys, run("inspect", hostile), "does not exist")
    with pytest.raises(SystemExit):
        run("preview", hostile, hostile, "-o", f"{hostile}.jpg")
    assert all(line.isprintable() for line in capsys.readouterr().err.split("\n"))
    code = "import logging, sys; from nemo_dali.commands.cli import main; main(['inspect', 'x']);"
    code += "logging.getLogger('nemo_dali').warning('%s', '\\x1b[2J')"
    assert fork_server.run(code).stderr.endswith("\n\\x1b[2J\n")


def test_names_from_annotations_are_spelt_on_the_terminal(tmp_path, capsys):
    name = "\u202e\u2066\u2028\u200b\xad.jpg"  # index itself refuses control characters

    def edit(refs, instances):
        instances["images"][2]["file_name"] = name

    refer = write_refer(tmp_path, edit=edit)
    (refer.photos / name).write_bytes(b"no photo")
    shown = name.encode("ascii", "backslashreplace").decode()
    assert shown in fails_in_one_line(capsys, index(refer, tmp_path / "a.ris.h5"))
    assert index(refer, tmp_path / "a.ris.h5", "--verify", "--skip-corrupt") == 0
    out, err = capsys.readouterr()
    assert shown in out and all(line.isprintable() for line in (out + err).split("\n"))


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [150_000, 2_000_000, 5_000_000])
@pytest.mark.parametrize("command", ["preview {0} {1} --count 2", "tiles {0}"])
def test_too_little_address_space_is_told(mined, tmp_path, command, kilobytes):
    command = command.format(mined / "train.ris.h5", mined / "train.neg.h5")
    done = shell(f"ulimit -v {kilobytes}; $NEMO {command} --size 32 -o {tmp_path / 'out.png'}")
    *_, line = done.stderr.decode().splitlines()
    assert done.returncode == 1 and line.startswith("nemo-dali: ") and "(ulimit -v)" in line and not done.stdout
    assert b"Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_without_a_place_for_compiled_kernels_they_are_compiled_anew(tmp_path):
    """As for a user without a writable home and with a package that somebody else installed."""
    shutil.copytree(ROOT / "nemo_dali", tmp_path / "nemo_dali", ignore=shutil.ignore_patterns("__pycache__"))
    for folder, _, _ in os.walk(tmp_path / "nemo_dali"):
        Path(folder).chmod(0o555)
    (tmp_path / "home").mkdir(mode=0o555)
    command = [
        sys.executable,
        "-c",
        "from nemo_dali.plan.planner import Planner; import nemo_dali.kernels.plan.draws as d; print(d)",
    ]
    if os.geteuid() == 0:  # root may write anywhere unless it gives that right up
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, or a user other than root")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    where = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(command, env=where, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "nemo_dali" / "kernels" / "plan" / "draws.py") in done.stdout
    assert "NUMBA_CACHE_DIR" in done.stderr
