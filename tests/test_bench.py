import json

import numpy as np
import pytest

from nemo_dali.bench import Spread, bench_loader
from nemo_dali.cli import main
from nemo_dali.loader import Loader


def test_spread():
    assert Spread.of(np.arange(101)) == Spread(50, 25, 75)


def test_the_command_writes_what_is_documented(files, tmp_path, capsys):
    output = tmp_path / "bench.json"
    code = main(
        f"bench loader {files.dataset} {files.negatives} --json {output} "
        "--pairs 2 --steps 3 --batch-size 4 --size 64".split()
    )
    assert code == 0
    result = json.loads(output.read_text())
    assert set(result) >= {"mode", "samples_per_s", "decode_only", "ratio_decode_only", "config", "machine", "versions"}
    assert result["mode"] == "stream" and result["config"]["steps"] == 3
    for name in ("samples_per_s", "decode_only", "ratio_decode_only"):
        assert 0 < result[name]["p25"] <= result[name]["median"] <= result[name]["p75"]
    assert "samples/s" in capsys.readouterr().out


def test_a_timing_may_be_longer_than_an_epoch(files):
    loader = Loader(files.dataset, files.negatives, batch_size=48, size=64)
    assert len(loader) == 1
    assert bench_loader(loader, pairs=1, steps=3)["samples_per_s"]["median"] > 0


def test_nothing_to_time_is_refused(files):
    loader = Loader(files.dataset, files.negatives, batch_size=48)
    for wrong in ({"pairs": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            bench_loader(loader, **wrong)
