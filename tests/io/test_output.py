"""Output files: what they replace, what they never touch, and what a run leaves that was ended in the middle."""

import fcntl
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from nemo_dali.errors import FileFormatError
from nemo_dali.io import output
from nemo_dali.io.cache import cached
from nemo_dali.io.output import (
    check_inputs,
    check_place,
    open_partial,
    output_file,
    partial_name,
    write_bytes,
    write_own,
)
from nemo_dali.io.writer import Content, write_h5
from nemo_dali.plan.policy import MosaicPolicy, write_policy
from nemo_dali.synthetic import synthesize
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


def write_table(path):
    with write_h5(path, format="nemo-dali/test", version=1) as content:
        content(Content({"values": np.arange(3)}, {}, "a" * 64))


WRITERS = {
    "bytes": (write, ["f"]),
    "own": (lambda path: write_own(path, b"one", b"", b"two"), ["f"]),
    "cache": (
        lambda path: cached("f", np.int32, (2,), make=lambda: np.ones(2, np.int32), fits=lambda _: True),
        ["f.cache"],
    ),
    "h5": (write_table, ["f"]),
    "policy": (
        lambda path: write_policy(path.with_name("f.json"), MosaicPolicy(), tuned_for="a" * 64, why=[]),
        ["f.json"],
    ),
    "data set": (
        lambda path: synthesize(path, images=1),
        ["COCO_train2014_000000000001.jpg", "instances.json", "truth.json", "refs(unc).p"],
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name_and_so_is_the_name(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path))
    fsync, replace = os.fsync, os.replace
    happened, named = [], []

    def spied_fsync(descriptor):
        happened.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def spied_replace(source, target, *, src_dir_fd=None, dst_dir_fd=None):
        file = os.stat(source, dir_fd=src_dir_fd).st_ino
        assert happened[-1] == file, "the file was not synced"
        replace(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        folder = Path(target).parent.stat() if dst_dir_fd is None else os.fstat(dst_dir_fd)
        named.append((os.path.basename(target), len(happened), folder.st_ino))

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    call, files = WRITERS[kind]
    call(tmp_path / "f")
    assert [name for name, _, _ in named] == files
    assert [happened[then] for _, then, _ in named] == [folder for _, _, folder in named]
    made = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert made == sorted(files)


@pytest.mark.parametrize("at", ["fsync", "replace"])
@pytest.mark.parametrize("keep", [None, True, False])
def test_what_is_left_where_the_end_fails(tmp_path, monkeypatch, at, keep):
    def refuse(*_, **__):
        raise OSError(5, "Input/output error")

    path = tmp_path / "f"
    path.write_bytes(b"ours, old")
    kept = None if keep is None else lambda: keep
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(os, at, refuse)
        with output_file(path, is_ours=is_ours, kind=KIND, keep=kept) as descriptor:
            os.write(descriptor, b"ours, half")
    assert path.read_bytes() == b"ours, old" and names(tmp_path) == (["f", "f.partial"] if keep else ["f"])
    with output_file(path, is_ours=is_ours, kind=KIND, keep=kept) as descriptor:
        assert os.pread(descriptor, 100, 0) == (b"ours, half" if keep else b"")
        os.pwrite(descriptor, b"ours, whole", 0)
    assert path.read_bytes() == b"ours, whole" and names(tmp_path) == ["f"]


def test_a_file_of_our_own_replaces_whatever_has_its_name(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "f").symlink_to(tmp_path / "victim")
    write_own(tmp_path / "f", b"ours")
    assert not (tmp_path / "f").is_symlink() and (tmp_path / "victim").read_bytes() == b"precious"
    with pytest.raises(FileNotFoundError):
        write_own(tmp_path / "nowhere" / "f", b"ours")


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
