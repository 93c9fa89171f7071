"""Mining on several ranks, and after any death: the bytes of one undisturbed process.

Ranks are forked from a process that has imported everything: they start in a moment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_dali.data.dataset import Dataset
from nemo_dali.mining.table import NegativeTable, read_table
from nemo_dali.mining.table_writer import write_table
from tests.helpers import fork_server
from tests.helpers.files import make_noise
from tests.helpers.paths import ROOT
from tests.helpers.rankings import check_ranking, unit

pytestmark = pytest.mark.process

DRIVER = r'''
import json, os, random, signal, socket, sys, time
from pathlib import Path
import nvidia.dali, torch.distributed
import open_clip
from nemo_dali.mining import embedding
from nemo_dali.mining import job as mining_job
from nemo_dali.mining import ranking
from nemo_dali.mining import _task as task, table
from nemo_dali.errors import NemoError
from nemo_dali.mining.exclusions import Exclusions
from nemo_dali.commands.cli import main

embedding.ROUND_S, mining_job.SYNC_INTERVAL_S, ranking.BLOCK_BYTES = 0.0, 0.0, 1024  # the shortest rounds
options = json.loads(sys.argv[1])


def tell(fact):
    with open(os.environ["TOLD"], "a") as file:  # gloo writes to stdout as it likes
        file.write(json.dumps(fact) + "\n")


def start(ranks, output, dying=None, **changes):
    """Processes that mine; ``dying``: (rank, owner, method, number) of one that kills itself at a call, from 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
        if dying and dying[0] == rank:
            owner, method, left = getattr(mining_job, dying[1]), dying[2], [None] * dying[3]
            call = getattr(owner, method)

            def die(*arguments, **options):
                left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            setattr(owner, method, die)
        code = 1
        try:
            given = options | changes
            exclusions = Exclusions(**given.pop("exclusions", {}))
            mining_job.mine(output=output, exclusions=exclusions, **given)
            code = 0
        except NemoError as error:
            tell([rank, type(error).__name__, str(error)])
        finally:
            os._exit(code)
    return children


def finish(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

'''


def drive(code, options, folder, *arguments):
    """What a driver tells."""
    told = folder / "told"
    told.touch()
    environment = os.environ | {"TOLD": str(told)}
    run = fork_server.run(DRIVER + code, json.dumps(options), *arguments, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in told.read_text().splitlines()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_noise(tmp_path_factory.mktemp("ranks"), photos=23)


@pytest.fixture(scope="module")
def options(dataset, clip):
    return {
        "dataset_path": str(dataset),
        "model": [str(clip[0] / "tiny.json"), str(clip[0] / "tiny.json")],
        "pretrained": [str(clip[0] / "tiny.pt"), str(clip[0] / "other.pt")],
        "device": "cpu",
        "batch_size": 2,
        "depth": 9,
        "exclusions": {"siblings": 0.2, "similar_photos": 0.99},
    }


@pytest.fixture(scope="module", autouse=True)
def other_weights(clip):
    import torch

    torch.save({key: tensor.flip(0) for key, tensor in clip[1].state_dict().items()}, clip[0] / "other.pt")


STORY = """
folder, victim, whole = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "whole"
for ranks in (1, 2, 3) if whole else (1, 2):
    assert finish(start(ranks, folder / f"{ranks}.neg.h5")) == [0] * ranks

random.seed(0)
output = folder / "killed.neg.h5"
partial = Path(f"{output}.partial")
points = [(0, "Unfinished", "sync", 0), (0, "Unfinished", "record", 2), (0, "Unfinished", "sync", 1)]
points += [(0, "Unfinished", "record", random.randrange(1, 12)) for _ in range(3)]
points += [(random.randrange(2), "Ranks", "gather", random.randrange(1, 4)) for _ in range(3)]
points += [(0, "Unfinished", "record", 6), (1, "Ranks", "to_first", 3), (0, "Unfinished", "finish", 0)]
for point in points if whole else points[-2:-1]:
    ranks = random.choice([1, 2, 3]) if point[1] == "Unfinished" else random.choice([2, 3])
    codes = finish(start(ranks, output, point))
    assert codes[point[0]] == -9 and all(codes) and not output.exists(), (point, ranks, codes)
    tell([-1, "progress", table.read_table(partial).progress.tolist()])
assert finish(start(2, output)) == [0, 0] and not partial.exists()

tell([-1, "next", "one rank lacks the weights"])
output = folder / "failed.neg.h5"
load = task.load_clip
def broken(*arguments, **options):
    if os.environ["RANK"] == "1":
        raise NemoError("The weights are not on this node.")
    return load(*arguments, **options)
task.load_clip = broken
assert finish(start(3, output)) == [1, 1, 1]
task.load_clip = load

if not whole:
    sys.exit()

tell([-1, "next", "one rank is asked for another depth"])
attributes = task.Task.attributes
def changed(self, depth, batch_size, method):
    return attributes(self, depth + (os.environ["RANK"] == "2"), batch_size, method)
task.Task.attributes = changed
assert finish(start(3, output)) == [1, 1, 1]
task.Task.attributes = attributes

tell([-1, "next", "a photo is missing"])
victim.rename(f"{victim}.gone")
assert finish(start(2, output)) == [1, 1]
Path(f"{victim}.gone").rename(victim)
"""


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.slow)])
def story(request, options, dataset, tmp_path_factory):
    """A folder of tables, and what was told, by chapter. The short one has one kill, one failure and two ranks."""
    folder = tmp_path_factory.mktemp("story")
    chapters = [[]]
    for fact in drive(STORY, options, folder, folder, Dataset.open(dataset).photo_path(7), request.param):
        if fact[1] == "next":
            chapters.append([])
        else:
            chapters[-1].append(fact)
    return folder, chapters


def test_any_number_of_ranks_gives_the_same_bytes(story):
    folder, _ = story
    whole = (folder / "1.neg.h5").read_bytes()
    others = [path for path in folder.glob("[23].neg.h5") if path.read_bytes() == whole]
    assert len(others) == len(list(folder.glob("[23].neg.h5"))) >= 1
    table = NegativeTable.open(folder / "1.neg.h5")
    assert (table.neighbors == -1).any() and len(np.unique(table.neighbors)) > 10
    assert table.model.count(" + ") == 1 and table.image_embedding.shape[1] == 64
    np.testing.assert_allclose(np.linalg.norm(table.text_embedding, axis=1), 1, atol=1e-5)


def test_runs_killed_anywhere_go_on_to_the_same_bytes_on_other_ranks(story):
    folder, (told, *_) = story
    assert (folder / "killed.neg.h5").read_bytes() == (folder / "1.neg.h5").read_bytes()
    progress = [fact for _, kind, fact in told if kind == "progress"]
    assert sorted(progress) == progress  # nothing that was recorded is lost
    if len(progress) > 1:
        assert len(progress) == 12 and len({tuple(stages) for stages in progress}) > 6 and progress[-1][-1] == 69
    errors = [text for _, kind, text in told if kind != "progress"]
    assert errors and all("ranks stopped" in text for text in errors)


def test_what_fails_on_one_rank_ends_all_and_is_told_once(story, dataset):
    _, (_, first, *others) = story
    assert sorted(kind for _, kind, _ in first) == ["NemoError", "ToldElsewhere", "ToldElsewhere"]
    assert next(text for rank, _, text in first if rank == 1) == "The weights are not on this node."
    if not others:
        return
    second, third = others
    assert all(
        "Rank 2 of 3 began mining with a different depth: 10 on rank 2, 9 on rank 0" in text for *_, text in second
    )
    assert sorted(kind for _, kind, _ in third) == ["PhotoError", "ToldElsewhere"]
    assert all(Path(Dataset.open(dataset).photo_path(7)).name in text for *_, text in third)


def test_crops_are_shared_by_ranks_to_the_same_bytes(options, tmp_path):
    """And a run that was killed amid them goes on."""
    dataset = make_noise(tmp_path, photos=5)
    given = options | {"dataset_path": str(dataset), "batch_size": 6, "exclusions": {"crops": -0.05}}
    code = """
for ranks in (1, 2):
    assert finish(start(ranks, Path(sys.argv[2]) / f"{ranks}.neg.h5")) == [0] * ranks
output = Path(sys.argv[2]) / "killed.neg.h5"
codes = finish(start(2, output, (0, "Unfinished", "record", 9)))
tell(table.read_table(Path(f"{output}.partial")).progress.tolist())
assert codes[0] == -9 and codes[1] and finish(start(1, output)) == [0]
"""
    (progress,) = [fact for fact in drive(code, given, tmp_path, tmp_path) if isinstance(fact[1], int)]
    whole = (tmp_path / "1.neg.h5").read_bytes()
    assert [(tmp_path / f"{name}.neg.h5").read_bytes() == whole for name in ("2", "killed")] == [True, True]
    assert len(progress) == 7 and progress[4] > 0 and progress[5] < 65
    table = NegativeTable.open(tmp_path / "1.neg.h5")
    assert table.crop_embedding.shape == (65, 64) and (table.neighbors == -1).any() and (table.neighbors >= 0).any()


@pytest.mark.slow
def test_given_embeddings_are_ranked_as_by_brute_force_on_any_number_of_ranks(tmp_path):
    dataset = Dataset.open(make_noise(tmp_path, photos=2000, each=1))
    rng = np.random.default_rng(0)
    common = unit(rng, 1, 512) * 2  # as CLIP's embeddings have a direction in common
    text, image = (unit(rng, 2000, 512) + common for _ in range(2))
    text, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
    image[1500:1600] = image[300:400]
    write_table(
        tmp_path / "given.neg.h5",
        blocks=[(np.zeros((2000, 1), np.int32), np.zeros((2000, 1), np.float32))],
        text_embedding=text,
        image_embedding=image,
        depth=1,
        dataset_fingerprint=dataset.fingerprint,
        dataset_name=dataset.name,
        model="random",
        pretrained="none",
        weights_hash="0" * 64,
        exclusions=[],
    )
    outputs = [tmp_path / f"{ranks}.neg.h5" for ranks in (1, 2, 3)]
    code = """
ranking.BLOCK_BYTES = 1 << 20
for ranks, output in enumerate(sys.argv[2:], 1):
    assert finish(start(ranks, output)) == [0] * ranks
"""
    given = {"dataset_path": str(dataset.path), "embeddings": str(tmp_path / "given.neg.h5"), "depth": 300}
    assert drive(code, given, tmp_path, *outputs) == []
    whole = outputs[0].read_bytes()
    assert outputs[1].read_bytes() == whole and outputs[2].read_bytes() == whole
    table = NegativeTable.open(outputs[0])
    own = np.asarray(dataset.refs.image)[dataset.sentences.ref]
    check_ranking(text, image, own, 300, table.neighbors, table.similarity)
    assert (table.model, table.weights_hash, table.depth) == ("random", "0" * 64, 300)
    np.testing.assert_array_equal(table.text_embedding, text)


@pytest.mark.slow
def test_torchrun_starts_the_ranks(options, story, tmp_path):
    words = ["--model", *options["model"], "--pretrained", *options["pretrained"], "--batch-size", "2", "--depth", "9"]
    rules = ["--exclude-siblings", "0.2", "--exclude-similar-photos", "0.99", "--device", "cpu"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "nemo_dali.mining", options["dataset_path"], *words, *rules, "-o", "a.neg.h5"]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("negatives for each of") == 1 and "2 ranks" in run.stdout
    assert (tmp_path / "a.neg.h5").read_bytes() == (story[0] / "1.neg.h5").read_bytes()
    assert read_table(tmp_path / "a.neg.h5").progress[-1] == 23 * 3
