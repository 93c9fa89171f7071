import json

import numpy as np
import pytest

from nemo_dali.commands.bench import Spread, bench_loader, is_result, timed_policy
from nemo_dali.commands.cli import main
from nemo_dali.loader.loader import Loader
from nemo_dali.plan.by_epoch import ByEpoch
from nemo_dali.plan.policy import MosaicPolicy, write_policy
from tests.helpers.cuda_host import needs_compiler


def test_spread():
    assert Spread.of(np.arange(101)) == Spread(50, 25, 75)


def test_the_command_writes_what_is_documented(files, tmp_path, capsys):
    output = tmp_path / "bench.json"
    code = main(
        f"bench loader {files.dataset} {files.negatives} --json {output} "
        "--pairs 2 --steps 3 --batch-size 4 --size 64".split()
    )
    assert code == 0
    assert is_result(output.read_bytes()[:4096])  # so it may be replaced
    result = json.loads(output.read_text())
    assert set(result) >= {"mode", "samples_per_s", "decode_only", "ratio_decode_only", "config", "machine", "versions"}
    assert result["baseline"] is result["ratio_baseline"] is result["waiting"] is None
    assert result["mode"] == "stream" and result["config"]["steps"] == 3
    for name in ("samples_per_s", "decode_only", "ratio_decode_only"):
        assert 0 < result[name]["p25"] <= result[name]["median"] <= result[name]["p75"]
    assert "samples/s" in capsys.readouterr().out


def test_only_a_result_is_replaced_and_that_is_told_before_the_work(files, tmp_path, capsys, monkeypatch):
    path = tmp_path / "bench.json"
    monkeypatch.setattr("nemo_dali.commands.bench.timed_start", None)
    command = f"bench loader {files.dataset} {files.negatives} --json {path}"
    policy = MosaicPolicy().to_json()
    for content in (policy, "{}", "[]", '{"mode": "stream"}'):
        path.write_text(content)
        assert main([*command.split(), *(["--policy", str(path)] if content == policy else [])]) == 1
        err = capsys.readouterr().err
        assert "it is the input" in err or "it exists and is not a result" in err
        assert "Choose another place with --json." in err
        assert path.read_text() == content


@pytest.mark.parametrize(
    ("policy", "epoch"),
    [
        (MosaicPolicy(p_mined=0.25, max_similarity=0.3), None),
        (MosaicPolicy(p_mined=ByEpoch({0: 0.0, 5: 0.5, 9: 0.0}), top_k=ByEpoch({0: 30, 5: 20})), 5),
        (MosaicPolicy(p_mined=ByEpoch({0: 0.0, 8: 0.5}, "linear")), 8),
        (MosaicPolicy(p_mined=0.5, mine_after_epoch=4), 4),
    ],
)
def test_a_policy_that_changes_is_timed_as_it_is_with_most_mosaics(files, tmp_path, policy, epoch, capsys, caplog):
    write_policy(tmp_path / "p.json", policy, tuned_for="0" * 64, why=[])
    timed = timed_policy(tmp_path / "p.json", files.negatives)
    assert timed == (policy if epoch is None else policy.at(epoch)) and timed.breakpoints == [0]
    assert (f"as it is in epoch {epoch}, which" in capsys.readouterr().out) == (epoch is not None)
    assert "was tuned for a different negative table" in caplog.text


@pytest.mark.slow
def test_all_that_the_command_can_measure(files, tmp_path, capsys):
    tiles, output = tmp_path / "f.tiles.h5", tmp_path / "bench.json"
    assert main(f"tiles {files.dataset} --size 64 --grids 2 -o {tiles}".split()) == 0
    command = f"bench loader {files.dataset} {files.negatives} --mode host --tiles {tiles} --baseline --starve 20"
    assert main(f"{command} --json {output} --pairs 1 --steps 3 --batch-size 4 --size 64 --num-threads 1".split()) == 0
    result = json.loads(output.read_text())
    assert result["mode"] == "host" and result["start_up_s"] > 0 and 0 <= result["waiting"] < 1
    assert result["ratio_memset"]["median"] > 0
    assert result["samples_per_s"]["median"] > 0
    ratio = result["samples_per_s"]["median"] / result["baseline"]["median"]
    assert result["ratio_baseline"]["median"] == pytest.approx(ratio, rel=1e-3)
    assert set(result["peak_memory_mib"]) == {"loader", "baseline_worker"}
    assert min(result["peak_memory_mib"].values()) > 50
    assert "waiting" in capsys.readouterr().out


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("mode", ["stream", "pinned", "device"])
def test_the_modes_of_a_gpu(files, tmp_path, mode):
    tiles, output = tmp_path / "f.tiles.h5", tmp_path / "bench.json"
    command = f"bench loader {files.dataset} {files.negatives} --mode {mode} --json {output} --pairs 1 --steps 3"
    command += " --batch-size 4 --size 64 --num-threads 1"
    if mode == "stream":
        command += " --device cuda"
    else:
        assert main(f"tiles {files.dataset} --device cuda --size 64 --grids 2 -o {tiles}".split()) == 0
        command += f" --tiles {tiles}"
    assert main(command.split()) == 0
    result = json.loads(output.read_text())
    assert (result["mode"], result["device"]) == (mode, "cuda:0")
    assert result["samples_per_s"]["median"] > 0 and result["decode_only"]["median"] > 0


@pytest.mark.parametrize("wrong", ["--mode host", "--tiles x.tiles.h5", "--starve 0", "--starve -1"])
def test_arguments_that_do_not_fit_are_refused(files, wrong):
    with pytest.raises(SystemExit) as exit:
        main(f"bench loader {files.dataset} {files.negatives} {wrong} --batch-size 4 --size 64".split())
    assert exit.value.code == 2


@pytest.mark.slow
def test_a_timing_may_be_longer_than_an_epoch(files):
    loader = Loader(files.dataset, files.negatives, batch_size=48, size=64)
    assert len(loader) == 1
    assert bench_loader(loader, pairs=1, steps=3)["samples_per_s"]["median"] > 0


def test_nothing_to_time_is_refused(files):
    loader = Loader(files.dataset, files.negatives, batch_size=48)
    for wrong in ({"pairs": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            bench_loader(loader, **wrong)
