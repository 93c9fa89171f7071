"""The benchmark of mining, once in small, so that it cannot rot."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def test_it_measures_every_stage(clip, tmp_path):
    small = [
        "--sentences",
        300,
        "--photos",
        400,
        "--width",
        64,
        "--depth",
        50,
        "--searched",
        20,
        "--search-photos",
        3000,
    ]
    model = ["--model", clip[0] / "tiny.json", "--images", 12, "--texts", 20, "--batch-size", 4]
    command = [sys.executable, ROOT / "benchmarks" / "mining.py", *small, *model, "--output", tmp_path]
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "mining.json").read_text())
    ranking, searching, embedding = (found[name] for name in ("ranking", "searching", "embedding"))
    assert ranking["gflops"] > 0 and 0 < ranking["share_of_matmul"]["median"] < 1.5
    assert ranking["blocks"] == 1 and ranking["peak_mib_beside_embeddings_and_result"] < 200
    assert searching["lists"] == 64 and [*searching["probes"]] == ["1", "4", "16"]
    recalls = [probes["recall"]["50"] for probes in searching["probes"].values()]
    assert recalls == sorted(recalls) and 0 < recalls[0] <= recalls[-1] <= 1
    assert embedding["photos"]["embedded_per_s"] > 0 and 0 <= embedding["photos"]["model_waited"] <= 1
    assert embedding["sentences"]["distinct"] <= 20 and embedding["sentences"]["with_all_tokens_per_s"] > 0
    assert found["config"]["photos"] == 400 and found["revision"] and found["machine"]["cores"] > 0


def test_its_embeddings_are_of_unit_length_and_clustered(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made = runpy.run_path(str(ROOT / "benchmarks" / "mining.py"), run_name="benchmark")["embeddings"]
    text, image = made(50, 300, 64, groups=10)
    assert text.dtype == image.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    similarity = text @ image.T
    assert similarity.mean() == pytest.approx(0.24, abs=0.1) and similarity.max() > 0.5
