"""The HDF5 files of ours: whole or not at all, and refused when they are not what they claim to be."""

import os
import re
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from nemo_dali.errors import FileFormatError
from nemo_dali.io import h5
from nemo_dali.io.h5 import (
    MappedFile,
    fingerprint,
    map_array,
    open_h5,
    read_strings,
    write_array,
    write_h5,
    write_strings,
)
from tests.helpers import fork_server
from tests.helpers.lanes import lanes

KIND = {"format": "nemo-dali/test", "version": 3}


def write(path: Path, values: np.ndarray) -> None:
    with write_h5(path, **KIND) as file:
        write_array(file, "values", values)
        write_array(file, "group/values", values * 2)
        write_strings(file, "group/names", ["", "blue jay", "größer 犬"])
        file.attrs["fingerprint"] = "abc"


def test_what_is_written_is_read_and_mapped_beyond_the_life_of_the_file(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int32).reshape(20, 3)
    write(tmp_path / "a.h5", values)
    with open_h5(tmp_path / "a.h5", **KIND, remedy="") as file:
        mapped, names = map_array(file["group/values"]), read_strings(file["group/names"])
        assert file.attrs["made_by"].startswith("nemo-dali ")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, values * 2)
    assert names == ["", "blue jay", "größer 犬"]
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_an_empty_column_can_be_mapped(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", np.empty((0, 4), np.float32))
    with open_h5(tmp_path / "a.h5", **KIND, remedy="") as file:
        assert map_array(file["values"]).shape == (0, 4)


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), RuntimeError("x"), FileNotFoundError(2, "x")])
def test_an_exception_while_writing_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.h5"
    write(path, np.arange(3))
    old = path.read_bytes()
    with pytest.raises(type(error)), write_h5(path, **KIND) as file:
        write_array(file, "values", np.arange(10))
        raise error
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


FILL_DISK = """
import pathlib, resource, sys
import numpy as np
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import write_array, write_h5, write_strings
path, what, limit = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a write beyond it fails as on a full disk
try:
    with write_h5(path, format="nemo-dali/test", version=3) as file:
        for number in range(200 if what == "many" else 1):
            if what == "strings":
                write_strings(file, "strings", [f"expression {i}" for i in range(5000)])
            else:
                write_array(file, f"array{number}", np.arange(100 if what == "many" else 100_000))
        file.attrs["fingerprint"] = "x"
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
    assert re.fullmatch(r"Cannot write .*a\.h5: File too large\. Nothing was changed; .*\n", out)
    assert err == ""  # HDF5 prints failures in destructors
    assert process.returncode == 0
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


WRITE_AND_WAIT = """
import sys, time
import numpy as np
from nemo_dali.io.h5 import write_array, write_h5
with write_h5(sys.argv[1], format="nemo-dali/test", version=3) as file:
    write_array(file, "values", np.arange(100_000))
    file.flush()
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
    with open_h5(path, **KIND, remedy="") as file:
        assert len(file["values"]) == 5


def test_two_writers_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with write_h5(tmp_path / "a.h5", **KIND) as file:
        with pytest.raises(FileFormatError, match="another run"), write_h5(tmp_path / "a.h5", **KIND):
            pass
        file.attrs["fingerprint"] = "x"
    assert (tmp_path / "a.h5").exists()


def test_a_lock_on_a_file_that_was_renamed_meanwhile_is_no_lock(tmp_path: Path) -> None:
    partial = tmp_path / "a.h5.partial"
    partial.touch()
    lock = os.open(partial, os.O_RDWR)
    try:
        partial.rename(tmp_path / "a.h5")
        assert not h5.locked(lock, partial)
        partial.touch()
        assert not h5.locked(lock, partial)
    finally:
        os.close(lock)


def test_places_that_cannot_be_written_are_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, reason in ((tmp_path / "folder", "it is a folder"), (tmp_path / "no" / "a.h5", "No such file")):
        with pytest.raises(FileFormatError, match=reason), write_h5(path, **KIND):
            pytest.fail("the block must not run")


def test_other_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    def message(path: Path, remedy: str = ". Make it with: nemo-dali index", **kind: object) -> str:
        with pytest.raises(FileFormatError) as caught:
            open_h5(path, **(KIND | kind), remedy="Make it with: nemo-dali index")
        assert str(caught.value).endswith(remedy)
        assert str(path) in str(caught.value)
        return str(caught.value)

    path = tmp_path / "a.h5"
    assert "does not exist" in message(path)
    assert "is a folder" in message(tmp_path)
    path.write_bytes(b"not HDF5")
    assert "is not an HDF5 file or has been cut short" in message(path)
    path.unlink()
    with h5py.File(path, "w"):
        pass
    assert "is of format 'unknown', not 'nemo-dali/test'" in message(path)
    path.unlink()
    write(path, np.arange(10))
    assert "is of format 'nemo-dali/test', not 'other'" in message(
        path, ". Give a 'other' file in its place.", format="other"
    )
    assert "is version 3; this nemo-dali reads version 4" in message(path, version=4)
    for attribute, text in (("fingerprint", "carries no fingerprint"), ("version", "is version unknown")):
        with h5py.File(path, "r+") as file:
            del file.attrs[attribute]
        assert text in message(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, np.arange(3000))
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="has been cut short"):
            open_h5(path, **KIND, remedy="")


def add_external_link(file: h5py.File, other: Path) -> None:
    file["group/link"] = h5py.ExternalLink(str(other), "/values")


def add_external_link_to_a_missing_file(file: h5py.File, other: Path) -> None:
    file["link"] = h5py.ExternalLink(str(other) + "x", "/values")


def add_soft_link(file: h5py.File, other: Path) -> None:
    file["link"] = h5py.SoftLink("/values")


def add_external_data(file: h5py.File, other: Path) -> None:
    file.create_dataset("secret", (10,), "u1", external=[(str(other), 0, 10)])


def add_virtual_data(file: h5py.File, other: Path) -> None:
    layout = h5py.VirtualLayout((5,), "i8")
    layout[:] = h5py.VirtualSource(str(other), "values", (5,))
    file.create_virtual_dataset("group/virtual", layout)


@pytest.mark.parametrize(
    "add",
    [add_external_link, add_external_link_to_a_missing_file, add_soft_link, add_external_data, add_virtual_data],
)
def test_files_that_lead_to_other_files_are_refused(tmp_path: Path, add) -> None:
    write(tmp_path / "other.h5", np.arange(5))
    write(tmp_path / "a.h5", np.arange(5))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        add(file, tmp_path / "other.h5")
    with pytest.raises(FileFormatError, match="links to other files"):
        open_h5(tmp_path / "a.h5", **KIND, remedy="")


def test_what_cannot_be_mapped_or_read_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("chunked", data=np.arange(100), chunks=(10,))
        file.create_dataset("fixed", data=np.array([b"abc"]))
        strings = h5py.string_dtype("utf-8")
        file.create_dataset("endless", (10**12,), strings, chunks=(1000,))
        file.create_dataset("latin1", data=["größer".encode("latin1")], dtype=strings)
        with pytest.raises(FileFormatError, match="not contiguous"):
            map_array(file["chunked"])
        with pytest.raises(FileFormatError, match="not a column of strings"):
            read_strings(file["fixed"])
        with pytest.raises(FileFormatError, match="too short for the strings"):
            read_strings(file["endless"])
        with pytest.raises(FileFormatError, match="not UTF-8"):
            read_strings(file["latin1"])


def opened(path: Path) -> tuple[MappedFile, np.ndarray]:
    with open_h5(path, **KIND, remedy="") as file:
        return MappedFile(file, path), map_array(file["values"])


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced by a shorter one", "longer"])
def test_a_mapped_file_may_be_replaced_but_not_cut_short(tmp_path: Path, change: str) -> None:
    path, values = tmp_path / "a.h5", np.arange(100_000)
    write(path, values)
    mapped, array = opened(path)
    if change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(tmp_path / "b.h5")
    elif change == "longer":
        with open(path, "ab") as file:
            file.write(b"more")
    else:
        write(path, np.arange(3))
    mapped.check()
    np.testing.assert_array_equal(array, values)
    assert Path(mapped.still).stat().st_size >= values.nbytes
    os.truncate(mapped.still, 100)  # under whatever name it has now, or none
    with pytest.raises(FileFormatError, match=r"a\.h5 was cut short while it was in use, from \d{6,} to 100 bytes\."):
        mapped.check()


CUT_SHORT = """
import os, pathlib, sys
import numpy as np
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import MappedFile, map_array, open_h5
path = pathlib.Path(sys.argv[1])
with open_h5(path, format="nemo-dali/test", version=3, remedy="") as file:
    mapped, values = MappedFile(file, path), map_array(file["values"])
os.truncate(path, 5000)
try:
    mapped.check()
except FileFormatError as error:
    print(error, flush=True)
print(values[-1])
"""


def test_without_the_check_a_file_cut_short_ends_the_process(tmp_path: Path) -> None:
    """What README says; and that ``check`` is told before."""
    write(tmp_path / "a.h5", np.arange(100_000))
    process = fork_server.start(CUT_SHORT, tmp_path / "a.h5")
    out, _ = process.communicate()
    assert re.fullmatch(r".*a\.h5 was cut short while it was in use, from \d+ to 5000 bytes\. .*\n", out)
    assert process.returncode == -signal.SIGBUS


def test_a_file_replaced_while_it_is_opened_is_refused(tmp_path: Path) -> None:
    """The places of its arrays are no longer those of the file under the name."""
    write(tmp_path / "a.h5", np.arange(3))
    with open_h5(tmp_path / "a.h5", **KIND, remedy="") as file:
        write(tmp_path / "a.h5", np.arange(5))
        with pytest.raises(FileFormatError, match="was replaced while it was opened"):
            map_array(file["values"])


def test_a_mapped_file_keeps_one_descriptor_and_gives_it_back(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", np.arange(3))
    before = set(os.listdir("/proc/self/fd"))
    with open_h5(tmp_path / "a.h5", **KIND, remedy="") as file:
        mapped = MappedFile(file, tmp_path / "a.h5")
    assert len(set(os.listdir("/proc/self/fd")) - before) == 1
    assert not os.get_inheritable(mapped._descriptor)  # no program started from here has it
    del mapped
    assert set(os.listdir("/proc/self/fd")) == before


def test_fingerprints_tell_contents_apart() -> None:
    base = {"a": np.arange(4, dtype=np.int32), "b": ["x", "yz"], "c": 3}
    same = {"c": 3, "b": ["x", "yz"], "a": np.arange(8, dtype=np.int32)[:4]}
    assert fingerprint(base) == fingerprint(same)
    others = [
        base | {"a": np.arange(4, dtype=np.int64)},
        base | {"a": np.arange(4, dtype=np.int32).reshape(2, 2)},
        base | {"b": ["xy", "z"]},
        base | {"b": ["x", "y", "z"]},
        base | {"c": 4},
        {"a": base["a"], "b": base["b"]},
        {"a": base["a"], "d": base["b"], "c": 3},
    ]
    assert len({fingerprint(parts) for parts in [base, *others]}) == 1 + len(others)


def test_a_file_that_the_user_has_open_in_h5py_opens_too(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with write_h5(path, format="test", version=1) as file:
        file.attrs["fingerprint"] = "0"
    with h5py.File(path, "r"):  # HDF5 demands one way of locking of all that open a file in one process
        open_h5(path, format="test", version=1, remedy="Do.").close()


@pytest.mark.parametrize("content", [b"notes", b"", None])
def test_something_else_under_the_name_is_not_replaced(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.h5"
    if content is None:
        write(path, np.arange(3))
        content = path.read_bytes()
    else:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"Choose another place with -o\."):
        with write_h5(path, format="nemo-dali/other", version=1):
            pass
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
