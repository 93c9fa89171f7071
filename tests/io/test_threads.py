"""How many threads are used where nobody says."""

import os

import pytest

from nemo_dali.io import threads
from nemo_dali.io.threads import core_quota, thread_count


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000\n", None), ("250000 100000\n", 2.5), ("0 0\n", None), ("text\n", None), ("", None)],
)
def test_a_quota_of_cores_is_read(tmp_path, content, cores):
    (tmp_path / "cpu.max").write_text(content)
    assert core_quota(tmp_path / "cpu.max") == cores
    assert core_quota(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("quota", "ranks", "expected"),
    [("max", 1, 16), ("max", 4, 4), ("max", 3, 5), ("max", 32, 1), ("450000", 1, 4), ("450000", 2, 2), ("50000", 1, 1)],
)
def test_threads_are_the_cores_or_the_quota_shared_by_the_ranks(tmp_path, monkeypatch, quota, ranks, expected):
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(threads, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert thread_count() == expected
