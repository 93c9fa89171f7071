from pathlib import Path

from nemo_dali.io import cache


def test_the_folder_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("NEMO_DALI_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "nemo-dali"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/nemo-dali")
    monkeypatch.setenv("NEMO_DALI_CACHE", "/y")
    assert cache.cache_folder() == Path("/y")
