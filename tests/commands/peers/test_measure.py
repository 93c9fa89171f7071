"""What is compared before anything is timed, and how processes are counted."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from nemo_dali.commands.peers.measure import check, save_expected, timed, tree, tree_cpu, tree_memory
from nemo_dali.commands.peers.rows import BY_NAME, missing
from nemo_dali.commands.peers.work import make_work
from nemo_dali.errors import NemoError

EXACT = {"difference": 0, "allowed": 0, "worst": 0, "worst_allowed": 0, "iou": 1}


@pytest.fixture(scope="module")
def work(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    data = {"dataset": files.dataset, "negatives": files.negatives}
    work = make_work(data, folder / "none.h5", folder, batch_size=4, size=64, dtype="uint8", cores=1)
    save_expected(work)
    return work


def expected(work, resample="cv2-linear", step=0):
    saved = np.load(work.expected(resample, step))
    return torch.from_numpy(saved["image"].astype(np.uint8)), torch.from_numpy(saved["mask"])


def test_the_work_is_the_loaders_plan(work):
    batch = next(iter(work.loader()))
    assert batch.plan.tobytes() == work.rows[:4].tobytes()
    image, mask = expected(work)
    assert torch.equal(batch.image, image) and torch.equal(batch.mask, mask) and (mask.sum((1, 2)) > 0).all()
    for index in range(4):
        assert work.target(index) == batch.plan["cell"][index]
        assert mask[index].sum() == mask[index][work.place(work.target(index))].sum()


def test_other_pixels_masks_and_types_are_found(work):
    row, (image, mask) = BY_NAME["opencv"], expected(work)
    assert check(row, work, image, mask) == EXACT
    with pytest.raises(
        NemoError, match=r"OpenCV makes different samples than the Loader in batch 0: images differ by 1\.00"
    ):
        check(row, work, image ^ 1, mask)
    assert check(dataclasses.replace(row, tolerance=1, worst=1), work, image ^ 1, mask)["difference"] == 1
    with pytest.raises(NemoError, match="the IoU of masks is 0"):
        check(row, work, image, mask.flip(0))
    for wrong in (image.float(), image[:, :, :-2], image.permute(0, 1, 3, 2)):
        with pytest.raises(NemoError, match="gives images of"):
            check(row, work, wrong, mask)


def test_one_wrong_cell_is_found_in_whatever_the_mean_allows(work):
    row, (image, mask) = dataclasses.replace(BY_NAME["opencv"], tolerance=4.0, worst=2.5), expected(work)
    image[1][:, *work.place(2)] ^= 4
    with pytest.raises(
        NemoError, match=r"differ by 0\.25 levels of 255, the worst cell by 4\.00, 4\.0 and 2\.5 allowed"
    ):
        check(row, work, image, mask)


def test_a_later_batch_is_compared_with_the_loaders_of_that_step(work):
    row, batches = BY_NAME["opencv"], list(work.loader())
    assert len(batches) == work.steps
    save_expected(work, [1, work.steps - 1])
    for step in (1, work.steps - 1):
        assert check(row, work, batches[step].image, batches[step].mask, step=step) == EXACT
        with pytest.raises(NemoError, match=f"in batch {step}: "):
            check(row, work, batches[step - 1].image, batches[step - 1].mask, step=step)


def test_batches_made_ahead_are_taken_first_and_rounds_of_workers_are_timed_whole(work):
    taken = []
    batches = (taken.append(1) for _ in iter(int, 1))
    started = time.monotonic()
    timing = timed(batches, work, 4, ahead=11, workers=3)
    assert time.monotonic() - started >= 1  # as long as a timing takes at least
    assert timing.taken == len(taken) and len(taken) > 11 + 4 and (len(taken) - 11) % 3 == 0


def test_cells_may_be_elsewhere_only_where_a_row_says_so(work):
    image, mask = expected(work)
    turned = image.roll((32, 32), (2, 3)), mask.roll((32, 32), (1, 2))
    assert check(BY_NAME["albumentations"], work, *turned) == EXACT
    with pytest.raises(NemoError, match="different samples"):
        check(BY_NAME["opencv"], work, *turned)
    with pytest.raises(NemoError, match="the IoU of masks is"):
        check(BY_NAME["albumentations"], work, turned[0], mask)


def test_a_row_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    told = "DataLoader, Kornia RandomMosaic needs the package 'kornia', which is not installed. Install it with: "
    assert missing(BY_NAME["kornia"]) == told + "pip install 'nemo-dali[peers]'"


@pytest.mark.parametrize("module", ["rows", "comparison"])
def test_importing_the_rows_or_what_starts_them_imports_no_peer(module):
    code = f"import sys, nemo_dali.commands.peers.{module}; print([m for m in sys.argv[1:] if m in sys.modules])"
    peers = ["albumentations", "kornia", "spdl", "torchvision", "cv2", "torch", "nvidia.dali", "numba"]
    run = subprocess.run([sys.executable, "-c", code, *peers], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.process
def test_processes_are_counted_with_those_that_they_started():
    nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    work = "import time; b = bytearray(64 << 20); t = time.time()\nwhile time.time() < t + 1: pass\ntime.sleep(60)"
    before, (total, own) = tree_cpu(), tree_memory()
    assert 0 < own < total
    others = set(tree())
    child = subprocess.Popen([sys.executable, "-c", nested, work])
    try:
        until = time.monotonic() + 30
        while tree_cpu() - before < 1 and time.monotonic() < until:
            time.sleep(0.05)
        assert tree_cpu() - before >= 1
        grown = [now - then for now, then in zip(tree_memory(), (total, own), strict=True)]
        assert all(64 < mib < 128 for mib in grown)
        assert child.pid in tree() and len(tree()) >= 3
    finally:
        for process in sorted(set(tree()) - others, reverse=True):
            os.kill(process, signal.SIGKILL)
        child.wait()
