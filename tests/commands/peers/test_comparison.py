"""The comparison in small: of all peers that are installed here, as the command runs it."""

import json
import re

import numpy as np
import pytest

from nemo_dali.commands.cli import main
from nemo_dali.commands.peers.comparison import is_result
from nemo_dali.commands.peers.rows import PEERS, ROWS, missing

# Not SPDL: FFmpeg scales luma and chroma apart, which these photos, that change from pixel to pixel, do not survive.
ASKED = [name for name in PEERS if name != "spdl"]
INSTALLED = [row.name for row in ROWS if row.name in ASKED and missing(row) is None]
SHORT = ["--pairs", "1", "--steps", "1", "--batch-size", "8", "--size", "96", "--num-threads", "1"]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_every_installed_peer_makes_the_loaders_samples_and_all_is_reported(files, tmp_path, capsys, dtype):
    assert {"opencv", "dali", "torchvision-tensors", "torchvision-pil"} <= set(INSTALLED)
    output = tmp_path / "peers.json"
    command = [
        "bench",
        "peers",
        str(files.dataset),
        str(files.negatives),
        "--json",
        str(output),
        *SHORT,
        "--peers",
        *ASKED,
    ]
    assert main([*command, "--peers", *ASKED, "--dtype", dtype]) == 0
    assert is_result(output.read_bytes()[:4096])  # so it may be replaced
    result = json.loads(output.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["host", "stream", "stream-antialiased", *INSTALLED]
    assert set(result["skipped"]) == set(ASKED) - set(INSTALLED)
    for row in rows.values():
        for name in ("samples_per_s", "cpu_ms_a_sample"):
            assert 0 <= row[name]["p25"] <= row[name]["median"] <= row[name]["p75"]
        assert row["samples_per_s"]["p25"] > 0 and row["start_up_s"] > 0 and row["memory_mib"] > row["own_mib"] > 30
        for check in (row["check"], row["checked_again"]):
            assert check["iou"] >= 0.99 and check["difference"] <= check["allowed"] + 1e-3
            assert check["difference"] <= check["worst"] <= check["worst_allowed"] + 1e-3
        assert row["checked_again"]["batch"] >= 8
        assert [one["setting"] for one in row["tried"]].count(row["setting"]) == 1
        assert len(row["tried"]) == 1 + row["is_peer"] and bool(row["cannot"]) == row["is_peer"]
        if row["is_peer"]:
            for name, ours in (("ratio_host", "host"), ("ratio_stream", row["stream"])):
                ratio = rows[ours]["samples_per_s"]["median"] / row["samples_per_s"]["median"]
                assert row[name]["median"] == pytest.approx(ratio, rel=1e-2)
    assert result["config"] | {"dtype": dtype, "cores": 1, "pairs": 1, "steps": 1} == result["config"]
    assert result["config"]["tiles"]["seconds"] > 0 and result["config"]["tiles"]["bytes"] > 1000
    assert {"machine", "versions", "others"} <= result.keys() and "torchvision" in result["versions"]
    out = capsys.readouterr().out
    assert all(row["label"] in out for row in rows.values()) and all(told in out for told in result["skipped"].values())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("--size 95", r"size \(95\) must be even"),
        ("--peers ffcv", r"peers \(ffcv\) must be among opencv, torchvision-"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_work(files, capsys, wrong, told):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "peers", str(files.dataset), str(files.negatives), *wrong.split()])
    assert re.search(told, capsys.readouterr().err)


def test_only_a_result_is_replaced(files, tmp_path, capsys):
    path = tmp_path / "peers.json"
    path.write_text('{"mode": "stream"}')
    assert main(["bench", "peers", str(files.dataset), str(files.negatives), "--json", str(path)]) == 1
    assert "it exists and is not a result of 'nemo-dali bench peers'" in capsys.readouterr().err
    assert path.read_text() == '{"mode": "stream"}'


def test_rows_are_named_once_and_say_what_peers_cannot_do():
    assert len({row.name for row in ROWS}) == len({row.label for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.is_peer == bool(row.cannot)
        assert (
            np.isfinite(row.tolerance) and row.tolerance <= 1.5 and row.tolerance <= row.worst <= 2.5
        )  # levels of 255
