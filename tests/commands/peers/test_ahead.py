"""How many batches a row makes ahead, by the photos and masks that are opened for them."""

import ctypes
import os
import struct
from contextlib import closing

import pytest

from nemo_dali.commands.peers.measure import settle
from nemo_dali.commands.peers.rows import ROWS, missing
from nemo_dali.commands.peers.work import make_work

OPENED = 0x20  # IN_OPEN
PHOTOS_ARE_READ = [row for row in ROWS if row.name != "host" and missing(row) is None]


class Opened:
    """Counts the files of some folders that any process opens."""

    def __init__(self, *folders):
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK)
        for folder in folders:
            assert libc.inotify_add_watch(self._fd, os.fsencode(folder), OPENED) > 0

    def count(self):
        """Since the last call."""
        found = 0
        while True:
            try:
                events = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return found
            while events:
                _, mask, _, length = struct.unpack_from("iIII", events)
                found += bool(mask & OPENED)
                events = events[16 + length :]

    def close(self):
        os.close(self._fd)


@pytest.fixture(scope="module")
def work(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    data = {"dataset": files.dataset, "negatives": files.negatives}
    return make_work(data, folder / "none.h5", folder, batch_size=4, size=64, dtype="float32", cores=2)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("row", PHOTOS_ARE_READ, ids=lambda row: row.name)
def test_a_row_makes_no_more_batches_ahead_than_it_says(work, row, number):
    settings = row.settings(work)
    if number >= len(settings):
        pytest.skip("it has one setting")
    ahead = row.ahead(settings[number])
    folders = {os.path.dirname(path) for path in work.photos} | {work.folder}
    batches = row.start(work, settings[number])
    with closing(Opened(*folders)) as opened, closing(batches):
        next(batches)
        settle()
        before = opened.count()
        for _ in range(work.steps):  # each file as often as a whole pass wants it
            next(batches)
        settle()
        assert 0 < before <= (1 + ahead + 0.5) * opened.count() / work.steps
