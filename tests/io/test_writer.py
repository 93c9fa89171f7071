"""Writing files of ours: whole or not at all, the same bytes each time, and open to h5py."""

import json
import os
import re
import signal
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

from nemo_dali.errors import FileFormatError
from nemo_dali.io.index import UNFINISHED
from nemo_dali.io.writer import write_h5
from tests.helpers import fork_server
from tests.helpers.h5_files import ATTRIBUTES, KIND, assert_views_agree, begin, content, fill, opened, write
from tests.helpers.lanes import lanes


def test_h5py_shows_what_the_index_says(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int32).reshape(20, 3)
    write(tmp_path / "a.h5", values)
    assert_views_agree(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["group/values"][:], values * 2)
        offsets = file["group/names_offsets"][:]
        names = [file["group/names"][a:b].tobytes().decode() for a, b in pairwise(offsets)]
    assert names == ["", "blue jay", "größer 犬"]


def test_a_reader_written_from_the_description_alone_finds_everything(tmp_path: Path) -> None:
    """docs/file-formats.md."""
    values = np.arange(60, dtype=np.int32).reshape(20, 3)
    write(tmp_path / "a.h5", values)
    raw = (tmp_path / "a.h5").read_bytes()
    line, rest = raw.split(b"\n", 1)
    kind, version, user_block, length, digest = line.split()
    text = rest[: int(length)]
    assert (kind, version, int(user_block)) == (b"nemo-dali/test", b"3", 16384)
    assert digest.decode() == xxhash.xxh3_64_hexdigest(text)
    found = {}
    for name, entry in json.loads(text)["arrays"].items():
        count = int(np.prod(entry["shape"]))
        array = np.frombuffer(raw, entry["dtype"], count, entry["offset"]).reshape(entry["shape"])
        assert xxhash.xxh3_64_hexdigest(array.tobytes()) == entry["checksum"]
        found[name] = array
    np.testing.assert_array_equal(found["values"], values)
    begins = found["group/names_offsets"].tolist()
    assert [found["group/names"][a:b].tobytes().decode() for a, b in pairwise(begins)] == ["", "blue jay", "größer 犬"]
    assert json.loads(text)["attributes"] == ATTRIBUTES


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        write(tmp_path / name, np.arange(1000))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), RuntimeError("x"), FileNotFoundError(2, "x")])
def test_an_exception_while_writing_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.h5"
    write(path, np.arange(3))
    old = path.read_bytes()
    with pytest.raises(type(error)), write_h5(path, **KIND) as write_content:
        write_content(content(np.arange(10)))
        raise error
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


FILL_DISK = """
import pathlib, resource, sys
import numpy as np
from nemo_dali.errors import FileFormatError
from nemo_dali.io.writer import Content, write_h5
path, what, limit = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a write beyond it fails as on a full disk
columns = {
    "one": {"array": np.arange(100_000)},
    "many": {f"array{number}": np.arange(100) for number in range(60)},
    "strings": {"strings": [f"expression {i}" for i in range(5000)]},
}
try:
    with write_h5(path, format="nemo-dali/test", version=3) as write:
        write(Content(columns[what], {}, "a" * 64))
except FileFormatError as error:
    print(error)
"""


@pytest.mark.process
@pytest.mark.parametrize("limit", lanes([0, 500, 20_000, 60_000], fast=[500]))
@pytest.mark.parametrize("what", ["one", "many", "strings"])
def test_a_full_disk_is_told_in_one_sentence_and_changes_nothing(tmp_path: Path, what: str, limit: int) -> None:
    path = tmp_path / "a.h5"
    write(path, np.arange(3))
    old = path.read_bytes()
    process = fork_server.start(FILL_DISK, path, what, limit)
    out, err = process.communicate()
    assert re.fullmatch(r"Cannot write .*a\.h5: File too large\. Free some space .*\n", out)
    assert err == ""  # HDF5 prints failures in destructors
    assert process.returncode == 0
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


WRITE_AND_WAIT = """
import sys, time
import numpy as np
from nemo_dali.io.writer import Content, write_h5
with write_h5(sys.argv[1], format="nemo-dali/test", version=3) as write:
    write(Content({"values": np.arange(100_000)}, {}, "a" * 64))
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_nothing_under_the_name_and_the_next_run_works(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    process = fork_server.start(WRITE_AND_WAIT, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    with pytest.raises(FileFormatError, match="another run is writing it"), write_h5(path, **KIND):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not path.exists()
    write(path, np.arange(5))
    assert list(tmp_path.iterdir()) == [path]
    assert len(opened(path).array("values", "<i8", (None,))) == 5


def test_two_writers_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with write_h5(tmp_path / "a.h5", **KIND) as write_content:
        with pytest.raises(FileFormatError, match="another run"), write_h5(tmp_path / "a.h5", **KIND):
            pass
        write_content(content(np.arange(3)))
    opened(tmp_path / "a.h5")


def test_places_that_cannot_be_written_are_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "folder", "it is a folder"),
        (tmp_path / "no" / "a.h5", "its folder does not exist"),
    ):
        with pytest.raises(FileFormatError, match=reason), write_h5(path, **KIND):
            pytest.fail("the block must not run")


@pytest.mark.parametrize("what", [b"notes", None])
def test_something_else_under_the_name_is_not_replaced(tmp_path: Path, what: bytes | None) -> None:
    path = tmp_path / "a.h5"
    if what is None:
        write(path, np.arange(3))
    else:
        path.write_bytes(what)
    before = path.read_bytes()
    with pytest.raises(FileFormatError, match=r"it exists and is not .* Choose another place with -o\."):
        with write_h5(path, format="nemo-dali/other", version=1):
            pass
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_version_1_may_be_replaced_by_one_of_its_format_only(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["values"] = np.arange(100_000)
        file.attrs["format"] = "nemo-dali/test"
    with pytest.raises(FileFormatError, match="it exists and is not"), write_h5(path, format="nemo-dali/x", version=1):
        pass
    write(path, np.arange(3))
    opened(path)


# --- files that take long to fill ------------------------------------------------------------------------------------


def test_a_run_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    with begin(tmp_path / "whole.h5") as made:
        fill(made, 0, 6)
        made.finish("a" * 64)
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "a.h5") as made:
        fill(made, 0, 3)
        raise KeyboardInterrupt
    with pytest.raises(FileFormatError, match="is half built"):
        opened(tmp_path / "a.h5.partial")
    with (
        pytest.raises(FileFormatError, match=r"3 rows are done for a 1, not 2\. To continue,"),
        begin(tmp_path / "a.h5", a=2),
    ):
        pass
    with begin(tmp_path / "a.h5") as made:
        fill(made, 3, 6)
        made.finish("a" * 64)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert_views_agree(tmp_path / "a.h5")
    file = opened(tmp_path / "a.h5")
    rows = file.rows("rows")
    rows.check_all()
    assert rows.array[:, 0].tolist() == list(range(6))


def test_a_run_killed_while_it_puts_the_index_in_place_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    pwrite = os.pwrite

    def torn(file: int, data: bytes, offset: int) -> int:
        if offset == 0 and len(data) > 100:
            pwrite(file, data[:300], 0)
            raise KeyboardInterrupt
        return pwrite(file, data, offset)

    with pytest.raises(KeyboardInterrupt), begin(path) as made:
        fill(made, 0, 6)
        monkeypatch.setattr(os, "pwrite", torn)
        made.finish("a" * 64)
    monkeypatch.undo()
    with begin(path) as made:
        assert made.file.mapped.index.fingerprint == UNFINISHED
        assert made.file.mapped.array("done", "<i8", (1,))[0] == 6
        made.finish("a" * 64)
    opened(path).rows("rows").check_all()


@pytest.mark.parametrize("what", ["link", "dangling", "foreign", "linked", "fifo"])
def test_what_is_in_the_way_is_neither_followed_nor_destroyed(tmp_path: Path, what: str) -> None:
    path, partial, other = tmp_path / "a.h5", tmp_path / "a.h5.partial", tmp_path / "precious.txt"
    other.write_bytes(b"precious")
    if what == "link":
        partial.symlink_to(other)
    elif what == "dangling":
        partial.symlink_to(tmp_path / "none")
    elif what == "foreign":
        partial.write_bytes(b"precious")
    elif what == "linked":
        os.link(other, partial)
    else:
        os.mkfifo(partial)
    for writer in (begin(path), write_h5(path, **KIND)):
        with pytest.raises(FileFormatError, match=r"a\.h5\.partial is .*Remove it, or choose another place with -o\."):
            with writer:
                pytest.fail("the block must not run")
    assert other.read_bytes() == b"precious" and not (tmp_path / "none").exists()
    assert os.path.lexists(partial) and (what != "foreign" or partial.read_bytes() == b"precious")
