"""examples/first_batch.py runs as it stands, by itself."""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.process
def test_it_prints_what_a_batch_holds(tmp_path):
    run = subprocess.run(
        [sys.executable, "-P", ROOT / "examples/first_batch.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "torch.Size([4, 3, 480, 480]) torch.Size([4, 480, 480]) torch.Size([4, 77])" in run.stdout
    assert [path.name for path in tmp_path.rglob("train.ris.h5")] == ["train.ris.h5"]
