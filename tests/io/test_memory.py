import os

import pytest

from nemo_dali.io import memory
from nemo_dali.io.threads import most_threads, thread_count

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("content", "expected"), [("max\n", MACHINE), ("1048576\n", 2**20), (f"{2**63 - 4096}\n", MACHINE), (None, MACHINE)]
)
def test_memory_is_what_the_control_group_leaves_of_the_machines(tmp_path, monkeypatch, content, expected):
    if content is not None:
        (tmp_path / "memory.max").write_text(content)
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "memory.max",))
    assert memory.memory_bytes() == expected


def test_more_threads_may_be_asked_for_than_there_are_cores():
    assert most_threads() >= max(64, 4 * thread_count())
