"""Reading files of ours: refused when they are not what they claim to be, and never by libhdf5."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import MappedFile, fingerprint, read_kind
from tests.helpers import fork_server
from tests.helpers.forged import Parts, forge
from tests.helpers.h5_files import KIND, begin, fill, opened, write


def numbers(file: MappedFile) -> Any:
    return file.array("values", "<i8", (None,))


def test_what_is_written_is_read_and_mapped_beyond_the_life_of_the_file(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int32).reshape(20, 3)
    write(tmp_path / "a.h5", values)
    file = opened(tmp_path / "a.h5")
    mapped, names = file.array("group/values", "<i4", (None, 3)), file.strings("group/names")
    assert file.index.made_by.startswith("nemo-dali ")
    assert (file.text("name"), file.text("empty"), file.texts("list")) == ("größer", "", ["a", "b"])
    assert file.integer("rows", least=0) == 3
    del file
    np.testing.assert_array_equal(mapped, values * 2)
    assert list(names) == ["", "blue jay", "größer 犬"] == names[:] and names[-1] == "größer 犬" and len(names) == 3
    with pytest.raises(IndexError):
        names[3]
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


def test_an_empty_column_can_be_mapped(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", np.empty((0, 4), np.float32))
    assert opened(tmp_path / "a.h5").array("values", "<f4", (None, 4)).shape == (0, 4)


def test_other_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    def message(path: Path, remedy: str = ". Make it with: nemo-dali index", **kind: Any) -> str:
        with pytest.raises(FileFormatError) as caught:
            MappedFile(path, **(KIND | kind), remedy="Make it with: nemo-dali index")
        assert str(caught.value).endswith(remedy)
        assert str(path) in str(caught.value)
        return str(caught.value)

    path = tmp_path / "a.h5"
    assert "does not exist" in message(path)
    assert "cannot be read: it is a folder" in message(tmp_path)
    path.write_bytes(b"not HDF5")
    assert "is not an HDF5 file of nemo-dali's, or is truncated" in message(path)
    path.unlink()
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "nemo-dali/test"
    assert "is of version 1, which this nemo-dali no longer reads" in message(path)
    path.unlink()
    os.mkfifo(path)
    assert "is not a regular file" in message(path)
    path.unlink()
    write(path, np.arange(10))
    assert read_kind(path, remedy="") == "nemo-dali/test"
    assert "has format 'nemo-dali/test', not 'other'" in message(
        path, ". Give a 'other' file in its place.", format="other"
    )
    assert "is version 3; this nemo-dali reads version 4" in message(path, version=4)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, np.arange(3000))
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"truncated|does not match its checksum"):
            opened(path)


def test_a_changed_byte_of_an_array_is_found_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write(path, np.arange(3000))
    entry, whole = opened(path).index.arrays["values"], path.read_bytes()
    for place in (entry.offset, entry.offset + entry.nbytes // 2, entry.offset + entry.nbytes - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FileFormatError, match=r"a\.h5 is damaged: /values does not match its checksum\. Make it"):
            numbers(opened(path))


def test_a_changed_byte_of_a_row_is_found_when_the_row_is_used(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with begin(path) as made:
        fill(made, 0, 6)
        made.finish("a" * 64)
    place, whole = opened(path).index.arrays["rows"].offset + 16 * 4, path.read_bytes()
    path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    rows = opened(path).rows("rows")
    rows.check(np.array([0, 5, 0]))
    for _ in range(2):
        with pytest.raises(FileFormatError, match=r"row 4 of /rows does not match its checksum"):
            rows.check(np.array([0, 4]))
    with pytest.raises(FileFormatError, match="row 4"):
        rows.check_all()


def test_libhdf5_parses_nothing(tmp_path: Path) -> None:
    """Whatever stands where HDF5's own structures are, the arrays are read."""
    write(tmp_path / "a.h5", np.arange(3000))
    forge(tmp_path / "a.h5", lambda parts: None)
    with pytest.raises(OSError, match="signature not found"):
        h5py.File(tmp_path / "a.h5")
    np.testing.assert_array_equal(numbers(opened(tmp_path / "a.h5")), np.arange(3000))


def offsets(*values: int) -> Any:
    return lambda parts: parts.arrays.update({"group/names_offsets": np.array(values, np.int64)})


@pytest.mark.parametrize(
    "edit",
    [
        offsets(),
        offsets(0, 8, 4, 18),
        offsets(0, 0, 8, 17),
        offsets(0, 0, 8, 2**62),
        offsets(1, 1, 8, 18),
        offsets(0, -(2**62), 8, 18),
        lambda parts: parts.arrays.pop("group/names_offsets"),
        lambda parts: parts.arrays.pop("group/names"),
        lambda parts: parts.arrays.update({"group/names": np.frombuffer(b"\xff" * 18, np.uint8)}),
        offsets(0, 0, 11, 19),
    ],
)
def test_strings_that_cannot_be_are_refused(tmp_path: Path, edit: Any) -> None:
    write(tmp_path / "a.h5", np.arange(3))
    forge(tmp_path / "a.h5", edit)
    with pytest.raises(FileFormatError, match=r"a\.h5 is damaged: /group/names.*Make it again"):
        list(opened(tmp_path / "a.h5").strings("group/names"))
    with pytest.raises(FileFormatError, match=r"a\.h5 is damaged"):
        opened(tmp_path / "a.h5").strings("group/names")[1]


@pytest.mark.parametrize("value", [None, 3, -1, 2**62, "3", 3.0, ["3"], [3]])
def test_attributes_of_another_type_or_out_of_range_are_refused(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "a.h5", np.arange(3))

    def edit(parts: Parts) -> None:
        parts.attributes.pop("rows")
        parts.attributes |= {} if value is None else {"rows": value}

    forge(tmp_path / "a.h5", edit)
    file = opened(tmp_path / "a.h5")
    for read, fits in (
        (lambda: file.integer("rows", least=0, most=9), value == 3 and type(value) is int),
        (lambda: file.text("rows"), type(value) is str),
        (lambda: file.texts("rows"), value == ["3"]),
        (lambda: file.integers("rows", least=0, most=9), value == [3]),
    ):
        if fits:
            read()
        else:
            with pytest.raises(FileFormatError, match=r"its attribute rows is"):
                read()


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced by a shorter one", "longer"])
def test_a_mapped_file_may_be_replaced_but_not_cut_short(tmp_path: Path, change: str) -> None:
    path, values = tmp_path / "a.h5", np.arange(100_000)
    write(path, values)
    mapped = opened(path)
    array = numbers(mapped)
    held = os.open(path, os.O_RDWR)
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
    os.truncate(held, 100)  # under whatever name it has now, or none
    os.close(held)
    with pytest.raises(FileFormatError, match=r"a\.h5 was truncated while it was in use, from \d{6,} to 100 bytes\."):
        mapped.check()


CUT_SHORT = """
import os, pathlib, sys
from nemo_dali.errors import FileFormatError
from nemo_dali.io.h5 import MappedFile
path = pathlib.Path(sys.argv[1])
mapped = MappedFile(path, format="nemo-dali/test", version=3, remedy="")
values = mapped.array("values", "<i8", (None,))
os.truncate(path, 5000)
try:
    mapped.check()
except FileFormatError as error:
    print(error, flush=True)
print(values[-1])
"""


def test_without_the_check_a_file_cut_short_ends_the_process(tmp_path: Path) -> None:
    """What docs/distributed.md says; and that ``check`` is told before."""
    write(tmp_path / "a.h5", np.arange(100_000))
    process = fork_server.start(CUT_SHORT, tmp_path / "a.h5")
    out, _ = process.communicate()
    assert re.fullmatch(r".*a\.h5 was truncated while it was in use, from \d+ to 5000 bytes\. .*\n", out)
    assert process.returncode == -signal.SIGBUS


def test_a_mapped_file_keeps_one_descriptor_and_gives_it_back(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", np.arange(3))
    before = set(os.listdir("/proc/self/fd"))
    mapped = opened(tmp_path / "a.h5")
    (kept,) = set(os.listdir("/proc/self/fd")) - before
    assert not os.get_inheritable(int(kept))  # no program started from here has it
    del mapped
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_that_another_program_has_open_for_writing_opens_too(tmp_path: Path) -> None:
    write(tmp_path / "a.h5", np.arange(3))
    with h5py.File(tmp_path / "a.h5", "r+"):
        numbers(opened(tmp_path / "a.h5"))


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
