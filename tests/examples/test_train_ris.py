"""examples/train_ris.py: killed in the middle of an epoch, gone on with, also by fewer ranks, and none the worse."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_dali.data.annotations import read_refer
from nemo_dali.data.dataset import Dataset
from nemo_dali.data.indexing import index_dataset
from nemo_dali.loader.loader import Loader
from nemo_dali.mining.table import NegativeTable
from nemo_dali.plan.policy import MosaicPolicy, write_policy
from nemo_dali.synthetic import synthesize
from nemo_dali.synthetic.truth import Truth
from nemo_dali.tiles.build import make_tiles
from tests.helpers.files import index_refer, make_files
from tests.helpers.paths import ROOT

pytestmark = [pytest.mark.process, pytest.mark.slow]

SCRIPT = ROOT / "examples/train_ris.py"
REFS, GLOBAL_BATCH, EPOCHS = 404, 8, 2
STEPS = REFS // GLOBAL_BATCH  # of an epoch; 4 refs are left out
OPTIONS = {"epochs": EPOCHS, "global-batch": GLOBAL_BATCH, "size": 32, "save-every": 7, "warm-up": 10, "workers": 1}
OPTIONS["learning-rate"] = 1e-4  # the larger it is, the more do steps make of a last bit
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def arguments(files, out):
    options = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    names = files.dataset, files.negatives, "--val", files.dataset.with_name("val.ris.h5"), "--out", out
    return [*map(str, names), *options]


def start(files, out, *launcher):
    """The example in processes of its own."""
    command = [*launcher, str(SCRIPT), *arguments(files, out)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def load_example():
    spec = importlib.util.spec_from_file_location("train_ris", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def run_here(files, out, *more):
    """The example by this process alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that it is compared with
    try:
        load_example().main([*arguments(files, out), *more])
    finally:
        torch.set_num_threads(threads)


def seen(out, begin, ranks):
    """Epoch, positions and refs of the global step by step number, of the run that began behind ``begin``."""
    lines = [(out / f"seen-from-{begin}-rank-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    found = {}
    for parts in zip(*lines, strict=False):  # a killed rank may be a line short
        parts = [json.loads(part) for part in parts]
        assert len({(part["step"], part["epoch"]) for part in parts}) == 1
        joined = [[one for part in parts for one in part[name]] for name in ("positions", "refs")]
        found[parts[0]["step"]] = (parts[0]["epoch"], *joined)
    return found


def wait_for_steps(job, log):
    """Until it is in the middle of an epoch, and some steps behind a checkpoint."""
    while job.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2 * OPTIONS["save-every"] + 3):
        time.sleep(0.01)


def check_first_part(out, ranks, steps):
    """What a killed run left: its checkpoint, of the middle of an epoch, and what it showed until then."""
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    begin, first = saved["training"]["step"], seen(out, 0, ranks)
    assert begin >= 14 and begin % STEPS and max(first) < EPOCHS * STEPS  # in the middle of an epoch, and of the run
    assert saved["loader"]["samples_seen"] == begin % STEPS * GLOBAL_BATCH
    assert all(first[step] == steps[step] for step in first)  # those that were lost too
    return saved, {step: first[step] for step in range(1, begin + 1)}


def check_second_part(out, saved, first, steps):
    begin = saved["training"]["step"]
    second = seen(out, begin, 1)
    assert min(second) == begin + 1 and first | second == steps


def weights(checkpoint):
    return torch.cat([weight.flatten() for weight in checkpoint["training"]["segmenter"].values()])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    def tell_distractors(refs, _):
        for number, ref in enumerate(refs):
            if number % 5:
                ref["distractors"] = number % 3

    made = make_files(tmp_path_factory.mktemp("train"), photos=101, refs_per_photo=4)
    index_refer(made.dataset.parent / "val", split="val", photos=20, edit=tell_distractors).rename(
        made.dataset.with_name("val.ris.h5")
    )
    return made


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    """What one process saw, its last checkpoint, and its folder."""
    out = tmp_path_factory.mktemp("undisturbed")
    run_here(files, out)
    return seen(out, 0, 1), torch.load(out / "checkpoint.pt", weights_only=True), out


def test_an_undisturbed_run_shows_every_epoch_in_order(undisturbed):
    steps, last, _ = undisturbed
    assert list(steps) == list(range(1, EPOCHS * STEPS + 1))
    for epoch in range(EPOCHS):
        shown = [position for number, positions, _ in steps.values() if number == epoch for position in positions]
        assert shown == list(range(STEPS * GLOBAL_BATCH))
    assert (last["loader"]["epoch"], last["training"]["step"]) == (EPOCHS - 1, EPOCHS * STEPS)


def test_killed_and_resumed_it_has_the_undisturbed_runs_weights_to_the_bit(files, undisturbed, tmp_path):
    job = start(files, tmp_path, sys.executable)
    try:
        wait_for_steps(job, tmp_path / "seen-from-0-rank-0.jsonl")
        job.send_signal(signal.SIGKILL)
        said = job.communicate(timeout=60)[0]
    finally:
        job.kill()
    assert job.returncode == -signal.SIGKILL, said
    steps, last, out = undisturbed
    saved, first = check_first_part(tmp_path, 1, steps)
    assert not torch.equal(weights(saved), weights(last))  # it has learned since

    run_here(files, tmp_path, "--resume")
    check_second_part(tmp_path, saved, first, steps)
    ended = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(weights(ended), weights(last)) and ended["loader"] == last["loader"]
    for one, other in zip(*(e["training"]["optimizer"]["state"].values() for e in (ended, last)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert (tmp_path / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


def test_a_rank_of_two_killed_and_the_job_resumed_by_one(files, undisturbed, tmp_path):
    job = start(files, tmp_path, *TORCHRUN, "2")
    try:
        wait_for_steps(job, tmp_path / "seen-from-0-rank-1.jsonl")
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        assert len(workers) == 2, job.communicate()[0]
        os.kill(int(workers[1]), signal.SIGKILL)
        said = job.communicate(timeout=120)[0]
    finally:
        job.kill()
    assert job.returncode == 1 and "Signal 9" in said, said  # torchrun ends the other rank too
    steps, last, _ = undisturbed
    saved, first = check_first_part(tmp_path, 2, steps)

    run_here(files, tmp_path, "--resume")
    check_second_part(tmp_path, saved, first, steps)
    ended = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert ended["loader"] == last["loader"] and ended["training"]["step"] == last["training"]["step"]
    torch.manual_seed(0)
    begun = torch.cat([weight.flatten() for weight in load_example().Segmenter().state_dict().values()])
    way = (weights(last) - begun).norm()
    assert (weights(saved) - weights(last)).norm() > 0.3 * way  # it has learned since
    assert (weights(ended) - weights(last)).norm() < 0.05 * way  # of sums in another order the last bits differ


def test_evaluation_by_distractors_is_what_the_samples_say(files, undisturbed, tmp_path, capsys):
    _, last, out = undisturbed
    example, path = load_example(), files.dataset.with_name("val.ris.h5")
    training = example.Training(torch.device("cpu"), learning_rate=1e-3, steps=1, warm_up=0)
    training.load_state_dict(last["training"])
    loader = Loader(path, split_mode="eval", batch_size=8, size=32, context_length=example.WORDS)
    found = example.evaluate(training, loader)
    assert training.model.training  # as it was
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [STEPS, 2 * STEPS]
    assert logged[-1] == json.loads(json.dumps({"step": 2 * STEPS, **found}))

    model = training.segmenter.eval()
    with torch.no_grad():
        first = next(iter(loader))
        model.head.bias -= training.predict(first).median()  # so short a training finds nothing yet
    found = example.evaluate(training, loader)
    model.eval()
    with torch.no_grad():
        pairs = [
            (model(batch.image, batch.tokens, batch.attention_mask).numpy() > 0, batch.mask.numpy() == 1)
            for batch in loader
        ]
    predicted, wanted = (np.concatenate(masks) for masks in zip(*pairs, strict=True))
    both, either = (predicted & wanted).sum((1, 2)), (predicted | wanted).sum((1, 2))
    dataset = Dataset.open(path)
    key = dataset.refs.distractors[dataset.sentences.ref]
    assert set(key.tolist()) == {-1, 0, 1, 2} == set(found["distractors"])
    for number, measured in found["distractors"].items():
        its = key == number
        assert measured["samples"] == its.sum()
        assert 0 < measured["mIoU"] == pytest.approx((both[its] / np.maximum(either[its], 1)).mean(), rel=1e-12)
        assert measured["oIoU"] == both[its].sum() / either[its].sum()

    example.report(found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["all", *(f"distractors {key}" for key in (-1, 0, 1, 2))]
    for line, measured in zip(lines, [found["all"], *found["distractors"].values()], strict=True):
        assert f"mIoU {measured['mIoU']:.4f}, oIoU {measured['oIoU']:.4f}, P@0.5 {measured['P@0.5']:.4f}" in line


def test_generated_photos_are_evaluated_by_kind_of_expression_too(tmp_path, capsys):
    synthesize(tmp_path / "data", images=40)
    photos = tmp_path / "data" / "images" / "mscoco" / "images" / "train2014"
    for split in ("train", "val"):
        annotations = read_refer(tmp_path / "data", dataset="refcoco", split_by="unc", split=split)
        index_dataset(annotations, images=photos, output=tmp_path / f"{split}.ris.h5")
    options = ["--val", f"{tmp_path}/val.ris.h5", "--val-truth", f"{tmp_path}/data", "--out", str(tmp_path / "run")]
    load_example().main([f"{tmp_path}/train.ris.h5", *options, "--size", "32", "--steps", "1", "--workers", "1"])
    found = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    dataset = Dataset.open(tmp_path / "val.ris.h5")
    truth = Truth.read(tmp_path / "data").of(dataset)
    said = [truth.kind_names[kind] for kind in truth.kind]
    assert len(set(said)) > 1
    assert {kind: row["samples"] for kind, row in found["kind"].items()} == {
        kind: said.count(kind) for kind in set(said)
    }
    said_at_last = capsys.readouterr().out
    assert all(f"  kind {kind}: mIoU {row['mIoU']:.4f}" in said_at_last for kind, row in found["kind"].items())


def test_one_that_is_begun_with_a_policy_and_tiles_ends_after_its_steps(files, tmp_path):
    """In the middle of an epoch; resumed with more steps it goes on there."""
    table = NegativeTable.open(files.negatives).fingerprint
    write_policy(tmp_path / "policy.json", MosaicPolicy(p_mined=1.0, top_k=10), tuned_for=table, why=[])
    make_tiles(files.dataset, output=tmp_path / "tiles.tiles.h5", size=32, grids=(2,))
    more = ["--policy", str(tmp_path / "policy.json"), "--tiles", str(tmp_path / "tiles.tiles.h5"), "--steps"]
    run_here(files, tmp_path, *more, "3")
    assert list(seen(tmp_path, 0, 1)) == [1, 2, 3]
    run_here(files, tmp_path, *more, "5", "--resume")
    assert list(seen(tmp_path, 3, 1)) == [4, 5]
    assert seen(tmp_path, 3, 1)[4][1] == list(range(3 * GLOBAL_BATCH, 4 * GLOBAL_BATCH))
