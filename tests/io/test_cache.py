"""The cache: what was kept comes back, and what is damaged or another's is rebuilt, with a line that says why."""

import hashlib
import logging
import mmap
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali.io import cache
from tests.helpers import fork_server

ARRAY = np.arange(24, dtype=np.int32).reshape(4, 6)


def test_the_folder_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("NEMO_DALI_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "nemo-dali"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/nemo-dali")
    monkeypatch.setenv("NEMO_DALI_CACHE", "/y")
    assert cache.cache_folder() == Path("/y")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_DALI_CACHE", str(tmp_path / "cache"))
    for once in (cache._log_unwritable, cache._warn_distrusted):
        once.cache_clear()
    return tmp_path / "cache"


def test_a_name_tells_everything_that_an_array_depends_on():
    whole = hashlib.sha256(b"[2, 'clip', None, 'f']").hexdigest()
    assert cache.name_for("tokens", [2, "clip", None, "f"]) == f"tokens-{whole}"
    names = {cache.name_for(*of) for of in (("a", []), ("b", []), ("a", [1]), ("a", ["1"]), ("a", [1, 2]), ("a", [12]))}
    assert len(names) == 6 and all(Path(name).name == name for name in names)


class Made:
    """Asks the cache for an array, and counts how often it had to be made."""

    def __init__(self, array=ARRAY):
        self.times, self.array = 0, array

    def ask(self, shape=None, dtype=None):
        return cache.cached(
            "a", dtype or self.array.dtype.type, shape or self.array.shape, make=self._make, fits=lambda _: True
        )

    def _make(self):
        self.times += 1
        return self.array


@pytest.mark.parametrize(
    "array", [ARRAY, ARRAY[:0], np.zeros((3, 0, 2), np.int32), np.frombuffer(b"code", np.uint8)], ids=str
)
def test_what_was_kept_comes_back_mapped_and_read_only(folder, array):
    made = Made(array)
    made.ask()
    found = made.ask()
    assert made.times == 1 and found.dtype == array.dtype and found.shape == array.shape
    assert np.array_equal(found, array) and not found.flags.writeable and isinstance(found.base, mmap.mmap)
    assert np.array_equal(made.ask(tuple(None for _ in array.shape)), array) and made.times == 1
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "a.cache").stat().st_mode & 0o022 == 0


def test_the_layout_is_the_documented_one(folder):
    Made().ask()
    content = (folder / "a.cache").read_bytes()
    behind = struct.pack("<5q", 4, 6, -1, -1, -1) + ARRAY.astype("<i4").tobytes()
    assert content == b"nemo-dali cache\n" + xxhash.xxh3_64_digest(behind)[::-1] + behind


def test_nobody_else_may_write_what_is_made_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        Made().ask()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o022 == (folder / "a.cache").stat().st_mode & 0o022 == 0


def resum(content):
    """The content with the right checksum."""
    return content[:16] + xxhash.xxh3_64_digest(content[24:])[::-1] + content[24:]


def replaced(at, part):
    return lambda content: resum(content[:at] + part + content[at + len(part) :])


DAMAGED = {
    "empty": (lambda content: b"", "it is not a cache file"),
    "garbage": (lambda content: b"x" * 100, "it is not a cache file"),
    "an array of NumPy's": (lambda content: b"\x93NUMPY" + content, "it is not a cache file"),
    "cut short": (lambda content: resum(content[:-4]), "truncated"),
    "cut in the header": (lambda content: content[:40], "it is not a cache file"),
    "lengthened": (lambda content: resum(content + bytes(4)), "truncated or extended"),
    "2**60 rows": (replaced(24, (2**60).to_bytes(8, "little")), "a different shape"),
    "negative rows": (replaced(24, (-4).to_bytes(8, "little", signed=True)), "a different shape"),
    "other rows": (replaced(24, (3).to_bytes(8, "little")), "a different shape"),
    "one more dimension": (replaced(40, (1).to_bytes(8, "little")), "a different shape"),
    "checksum": (lambda content: content[:16] + bytes(8) + content[24:], "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_made_anew_with_one_line(folder, caplog, damage):
    edit, reason = DAMAGED[damage]
    made, path = Made(), folder / "a.cache"
    made.ask()
    content = path.read_bytes()
    path.write_bytes(edit(content))
    with caplog.at_level(logging.INFO, "nemo_dali"):
        assert np.array_equal(made.ask(), ARRAY) and made.times == 2
        made.ask()
    assert made.times == 2 and path.read_bytes() == content and list(folder.iterdir()) == [path]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"{path} is rebuilt: " in record.getMessage()
    assert reason in record.getMessage()


@settings(max_examples=100, deadline=None)
@given(st.integers(16, 159), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(where, change):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("NEMO_DALI_CACHE", folder)
        made, path = Made(), Path(folder) / "a.cache"
        made.ask()
        content = bytearray(path.read_bytes())
        content[where] ^= change
        path.write_bytes(content)
        assert np.array_equal(made.ask(), ARRAY) and made.times == 2


HUGE = """
import os, resource, struct, sys
import numpy as np
import xxhash
from nemo_dali.io import cache
rows = int(sys.argv[1])
behind = struct.pack("<5q", rows, 2, -1, -1, -1)
open(os.environ["NEMO_DALI_CACHE"] + "/a.cache", "wb").write(cache.MAGIC + xxhash.xxh3_64_digest(behind)[::-1] + behind)
mapped = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**26, mapped + 2**26))
made = np.zeros((3, 2), np.int32)
found = cache.cached("a", np.int32, (None, 2), make=lambda: made, fits=lambda _: True)
print(found is made)
"""


@pytest.mark.parametrize("rows", [2**60, 2**61 - 1, 2**63 - 1, 2**31])
def test_a_header_of_many_rows_takes_no_memory(folder, rows):
    folder.mkdir(mode=0o700)
    done = fork_server.run(HUGE, rows)
    assert done.stdout == "True\n" and "truncated" in done.stderr, done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["link", "link to itself", "pipe", "folder", "writable by the group", "by all"])
def test_what_somebody_else_may_have_put_there_is_not_read(folder, tmp_path, caplog, kind):
    made, path = Made(), folder / "a.cache"
    made.ask()
    content = path.read_bytes()
    if "link" in kind:
        path.unlink()
        (tmp_path / "other").write_bytes(content)
        path.symlink_to(tmp_path / "other" if kind == "link" else path)
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.chmod(0o664 if "group" in kind else 0o646)
    assert np.array_equal(made.ask(), ARRAY) and made.times == 2
    assert "is rebuilt" in caplog.records[0].getMessage()
    made.ask()
    assert made.times == (3 if kind == "folder" else 2)
    if kind == "link":
        assert (tmp_path / "other").read_bytes() == content and not path.is_symlink()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_left_alone(folder, caplog, mode):
    made = Made()
    made.ask()
    folder.chmod(mode)
    before = (folder / "a.cache").stat().st_mtime_ns
    for _ in range(3):
        assert np.array_equal(made.ask(), ARRAY)
    assert made.times == 4 and (folder / "a.cache").stat().st_mtime_ns == before
    (record,) = caplog.records  # once a process
    assert "chmod go-w" in record.getMessage() and "NEMO_DALI_CACHE" in record.getMessage()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_read(folder, caplog, what):
    made = Made()
    made.ask()
    os.chown(folder / "a.cache" if what == "file" else folder, 12345, 12345)
    assert np.array_equal(made.ask(), ARRAY) and made.times == 2
    assert "it belongs to another user (12345)" in caplog.records[0].getMessage()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_what_belongs_to_root_is_read(folder, monkeypatch):
    made = Made()
    made.ask()
    monkeypatch.setattr(cache.os, "geteuid", lambda: 12345)
    made.ask()
    assert made.times == 1


def test_the_folder_may_be_a_link(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    made = Made()
    made.ask()
    made.ask()
    assert made.times == 1 and (tmp_path / "elsewhere" / "a.cache").is_file()


def test_a_replaced_file_leaves_what_was_mapped_alone(folder):
    made = Made()
    made.ask()
    found = made.ask()
    (folder / "a.cache").unlink()
    made.array = ARRAY + 1
    assert np.array_equal(made.ask(), ARRAY + 1) and np.array_equal(found, ARRAY)
