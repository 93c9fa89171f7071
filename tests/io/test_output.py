"""Output files: what they replace, what they never touch, and what a run leaves that was ended in the middle."""

import fcntl
import os
import resource

import pytest

from nemo_dali.errors import FileFormatError
from nemo_dali.io import output
from nemo_dali.io.output import check_inputs, check_place, open_partial, partial_name, write_bytes
from tests.helpers import fork_server

KIND = "a file of the test's"


def is_ours(head):
    return head.startswith(b"ours")


def write(path, content=b"ours, new"):
    write_bytes(path, content, is_ours=is_ours, kind=KIND)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("earlier", [None, b"", b"ours, old"])
def test_a_new_file_or_one_of_its_kind_is_written_whole(tmp_path, earlier):
    path = tmp_path / "f"
    if earlier is not None:
        path.write_bytes(earlier)
    write(path)
    assert path.read_bytes() == b"ours, new" and names(tmp_path) == ["f"]
    assert path.stat().st_mode & 0o777 == 0o644 & ~os.umask(os.umask(0o022))


def foreign(path, kind, tmp_path):
    """Something of another kind under that name, and what tells whether it was touched."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "file":
        path.write_bytes(b"not yours")
        return path.read_bytes
    if kind == "link":
        path.symlink_to(victim)
    if kind == "dangling link":
        victim.unlink()
        path.symlink_to(victim)
        return victim.exists
    if kind == "hard link":
        victim.write_bytes(b"ours, but with another name")
        path.hardlink_to(victim)
    if kind == "folder":
        path.mkdir()
        return path.is_dir
    if kind == "pipe":
        os.mkfifo(path)
        return path.is_fifo
    return lambda: (victim.read_bytes(), path.is_symlink())


@pytest.mark.timeout(60)  # a pipe without a reader must not be waited for
@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "hard link", "folder", "pipe"])
@pytest.mark.parametrize("call", [write, lambda path: check_place(path, is_ours=is_ours, kind=KIND)])
def test_what_has_the_partial_name_and_is_foreign_is_neither_followed_nor_touched(tmp_path, kind, call):
    path = tmp_path / "f"
    look = foreign(partial_name(path), kind, tmp_path)
    before = look(), names(tmp_path)
    with pytest.raises(FileFormatError, match=r"f\.partial is .*Remove it, or choose another place with -o") as error:
        call(path)
    assert str(error.value).count("Cannot write") == 1
    assert (look(), names(tmp_path)) == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["file", "link", "folder", "pipe"])
@pytest.mark.parametrize("call", [write, lambda path: check_place(path, is_ours=is_ours, kind=KIND)])
def test_what_has_the_name_and_is_foreign_is_refused(tmp_path, kind, call):
    path = tmp_path / "f"
    look = foreign(path, kind, tmp_path)
    before = look(), names(tmp_path)
    with pytest.raises(FileFormatError, match="it is a folder" if kind == "folder" else f"it exists and is not {KIND}"):
        call(path)
    assert (look(), names(tmp_path)) == before


def test_a_link_to_a_file_of_the_kind_is_replaced_and_the_file_stays(tmp_path):
    (tmp_path / "old").write_bytes(b"ours, old")
    (tmp_path / "f").symlink_to(tmp_path / "old")
    write(tmp_path / "f")
    assert not (tmp_path / "f").is_symlink() and (tmp_path / "f").read_bytes() == b"ours, new"
    assert (tmp_path / "old").read_bytes() == b"ours, old"


def test_what_a_killed_run_left_is_taken_over(tmp_path):
    path = tmp_path / "f"
    partial_name(path).write_bytes(b"ours, and longer than what comes")
    check_place(path, is_ours=is_ours, kind=KIND)
    assert names(tmp_path) == ["f.partial"]
    write(path)
    assert path.read_bytes() == b"ours, new" and names(tmp_path) == ["f"]


def test_looking_leaves_nothing(tmp_path):
    check_place(tmp_path / "f", is_ours=is_ours, kind=KIND)
    assert names(tmp_path) == []
    with pytest.raises(FileFormatError, match="its folder does not exist"):
        check_place(tmp_path / "nowhere" / "f", is_ours=is_ours, kind=KIND)


def test_a_file_that_another_run_writes_is_left_to_it(tmp_path):
    path = tmp_path / "f"
    descriptor = open_partial(path, is_ours)
    with pytest.raises(FileFormatError, match="another run is writing it"):
        write(path)
    os.close(descriptor)
    write(path)
    assert names(tmp_path) == ["f"]


def test_a_partial_that_was_renamed_while_its_lock_was_taken_is_another_runs(tmp_path, monkeypatch):
    path = tmp_path / "f"
    lock = fcntl.flock

    def late(descriptor, flags):
        lock(descriptor, flags)
        partial_name(path).rename(path)

    monkeypatch.setattr(output.fcntl, "flock", late)
    with pytest.raises(FileFormatError, match="another run is writing it"):
        open_partial(path, is_ours)


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(descriptor, flags):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(output.fcntl, "flock", refuse)
    write(tmp_path / "f")
    assert names(tmp_path) == ["f"]


FULL_DISK = f"""
import resource, sys
from pathlib import Path
from nemo_dali.errors import FileFormatError
from nemo_dali.io.output import write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    write_bytes(Path(sys.argv[1]), bytes(5000), is_ours=lambda head: True, kind={KIND!r})
except FileFormatError as error:
    print(error)
"""


def test_on_a_full_disk_the_earlier_file_stays(tmp_path):
    """EFBIG stands in for ENOSPC: both are a write that fails half way."""
    assert resource.RLIM_INFINITY == resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    path = tmp_path / "f"
    path.write_bytes(b"ours, old")
    done = fork_server.run(FULL_DISK, path)
    assert done.stdout.startswith(f"Cannot write {path}: File too large.") and not done.stderr
    assert path.read_bytes() == b"ours, old" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("by", ["name", "relative name", "link", "hard link", "partial name"])
def test_an_output_that_is_an_input_is_refused(tmp_path, monkeypatch, by):
    monkeypatch.chdir(tmp_path)
    given = path = tmp_path / "f"
    path.write_bytes(b"ours")
    if by == "relative name":
        given = "./f"
    elif "link" in by:
        given = tmp_path / "other"
        given.symlink_to(path) if by == "link" else given.hardlink_to(path)
    elif by == "partial name":
        given = path.rename(tmp_path / "f.partial")
    with pytest.raises(FileFormatError, match=f"Cannot write .*: it is the input {given}"):
        check_inputs(path, [tmp_path / "missing", given])
    check_inputs(path, [tmp_path / "missing", "ViT-B-32", "a\0b"])
