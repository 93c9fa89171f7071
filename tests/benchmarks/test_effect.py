"""The study of docs/effect.md in small, and its page by the record."""

import importlib
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_dali.data.dataset import Dataset
from nemo_dali.mining.table import NegativeTable
from nemo_dali.synthetic.truth import Truth
from tests.helpers.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # where a script finds what it shares with others
effect, effect_cells, effect_data, effect_study, numbers, figures, report = (
    importlib.import_module(f"effect{part}")
    for part in ("", "_cells", "_data", "_study", "_numbers", "_figures", "_report")
)

SCENES = {"images": 40, "expressions": {"attribute": 3, "relation": 1}}
STUDY = effect_study.Study(
    training=effect_study.Scenes(seed=1, **SCENES),
    easy=effect_study.Scenes(seed=2, distractors=(0, 1), **SCENES),
    hard=effect_study.Scenes(seed=4, distractors=(2, 3), **SCENES),
    for_clip=effect_study.Scenes(seed=3, **SCENES),
    clip_steps=3,
    crops_margin=0.0,  # more would leave nothing: so little training tells no crops apart
    size=32,
    epochs=5,
    singles=1,
    seeds=(1, 2),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("effect")
    (effect_data.Files(folder, STUDY).scenes("training") / "images").mkdir(parents=True)  # by an interrupted call
    return effect_data.prepare(STUDY, folder)


@pytest.mark.slow
def test_no_photo_of_the_evaluation_is_a_negative_or_in_clips_training(files):
    datasets = {part: Dataset.open(files.dataset(part)) for part in effect_data.PARTS}
    files_seen = [digest.tobytes() for dataset in datasets.values() for digest in dataset.photo_files.digest]
    assert len(set(files_seen)) == len(files_seen) == sum(len(dataset.images.id) for dataset in datasets.values())
    for arm in STUDY.arms.values():  # every pool is of the training's photos
        assert NegativeTable.open(files.table(arm)).dataset_fingerprint == datasets["training"].fingerprint
    with pytest.raises(SystemExit, match="have photos in common"):
        effect_data.check_apart({"one": datasets["training"], "other": datasets["training"]})


def test_studies_in_one_folder_share_the_files_of_equal_scenes_alone(tmp_path):
    main, fewer, larger = (
        effect_data.Files(tmp_path, effect_study.STUDIES[name]) for name in ("main", "fewer", "larger")
    )
    assert main.dataset("hard") == fewer.dataset("hard") and main.tiles("hard") == fewer.tiles("hard")
    assert main.dataset("training") == larger.dataset("training") and main.policy == larger.policy
    assert main.tiles("hard") != larger.tiles("hard")
    assert main.dataset("training") != fewer.dataset("training") and main.policy != fewer.policy
    assert main.negatives("training", "clip") != fewer.negatives("training", "clip")
    assert len({of.checkpoint("single", 1) for of in (main, fewer, larger)}) == 3


@pytest.mark.slow
def test_tables_by_the_truth_keep_clips_order(files):
    dataset = Dataset.open(files.dataset("training"))
    truth = Truth.read(files.scenes("training")).of(dataset)
    whole = NegativeTable.open(files.negatives("training", "clip"))
    for kind, wanted in (("fitting", True), ("unfitting", False)):
        table = NegativeTable.open(files.negatives("training", kind))
        for row in range(0, len(table.neighbors), 7):
            photos = whole.neighbors[row]
            fits = truth.fits_words(np.full(len(photos), row), photos)
            kept = table.neighbors[row]
            assert kept[kept >= 0].tolist() == photos[fits == wanted].tolist()


@pytest.mark.slow
def test_every_arm_takes_the_same_steps_and_a_killed_run_goes_on(files, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    runs = {arm: effect.train(arm, 1, files, 1) for arm in STUDY.arms}
    assert len({(run["steps"], run["samples"]) for run in runs.values()}) == 1
    assert len({run["loss"] for run in runs.values()}) > 1
    refs = sum(len(Dataset.open(files.dataset(part)).refs.ref_id) for part in effect_data.EVALUATION)
    for run in runs.values():
        for where in ("single", "mosaic"):
            assert sum(row["samples"] for row in run[where]) == refs
    # Killed behind the second epoch's checkpoint.
    files.checkpoint("tuned", 1).unlink()
    saved = effect.save

    def die(path, content):
        saved(path, content)
        if content["training"]["step"] == 2 * runs["tuned"]["steps"] // STUDY.epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(effect, "save", die)
    with pytest.raises(KeyboardInterrupt):
        effect.train("tuned", 1, files, 1)
    monkeypatch.undo()
    again = effect.train("tuned", 1, files, 1)
    for name in ("steps", "loss", "single", "mosaic", "masks"):
        assert again[name] == runs["tuned"][name]
    # Looked at once more, in ways of which one is that of the run.
    looked = effect_cells.found(files, "single", 1)
    assert looked["whole"] == numbers.value(numbers.chosen(runs["single"], "single", hard=True), "P@0.5")
    assert looked.keys() == {"whole", "blurred", "small"}
    torch.set_num_threads(threads)


# --- what is made of a record ----------------------------------------------------------------------------------------


def row(*, kind="attribute", distractors, hits, samples=10, misses=0):
    return {
        "kind": kind, "distractors": distractors, "samples": samples, "hits": hits, "misses": misses, "iou": hits * 0.8,
        "intersection": 8 * hits, "union": 10 * samples,
    }  # fmt: skip


def record_of(hits):
    """Of runs by arm and seed, with hits among ten samples of 0 and 2 distractors, and of another kind with 2."""
    runs = [
        {
            "arm": arm, "seed": seed, "steps": 100, "seconds": 60, "revision": "abc", "loss": 0.5,
            "single": [
                row(distractors=0, hits=8),
                row(distractors=2, hits=value, misses=10 - value),
                row(distractors=2, hits=value, kind="relation"),
            ],
            "mosaic": [row(distractors=0, hits=5)],
        }
        for arm, values in hits.items()
        for seed, value in enumerate(values, 1)
    ]  # fmt: skip
    part = {"photos": 4, "refs": 5, "sentences": 6, "refs_by_distractors": [1, 1, 2, 1]}
    data = dict.fromkeys(effect_data.PARTS, part) | {
        "tuned": {"max_similarity": 0.5, "top_k": 20}, "scenes": {},
        "negatives": {"random": {"words": 0.1, "category": 0.2}, "tuned": {"words": 0.25, "category": 0.5}},
    }  # fmt: skip
    study = {"arms": {arm: {"share": 0.5} for arm in ("single", "random", "tuned")}, "seeds": [1, 2, 3], "size": 128}
    machine = {"cores": 2, "cpu": "a CPU"}
    return {"runs": runs, "data": data, "study": study, "machine": machine, "follow_ups": {}, "cells": {"runs": []}}


def test_differences_are_paired_by_seed_with_t_intervals():
    record = record_of({"single": [4, 5, 6], "tuned": [5, 7, 9]})
    one, other = (numbers.by_seed(record, arm, "single", "P@0.5", hard=True) for arm in ("tuned", "single"))
    assert other == {1: 40, 2: 50, 3: 60} and one == {1: 50, 2: 70, 3: 90}
    mean, half, pairs = numbers.difference(one, other)  # 10, 20, 30: their deviation is 10
    assert (mean, pairs) == (20, 3) and half == pytest.approx(4.303 * 10 / 3**0.5)
    assert numbers.difference(one, {2: 50.0})[0::2] == (20, 1)  # of the seeds that both have
    assert numbers.difference(one, {2: 50.0})[1] == float("inf")


def test_hard_samples_are_those_with_two_distractors_and_more():
    record = record_of({"single": [4]})
    assert numbers.by_seed(record, "single", "single", "P@0.5")[1] == pytest.approx(100 * 16 / 30)
    assert numbers.by_seed(record, "single", "single", "misses", hard=True)[1] == pytest.approx(100 * 6 / 20)
    assert numbers.by_seed(record, "single", "single", "oIoU", distractors=0)[1] == pytest.approx(64)
    assert numbers.by_seed(record, "single", "single", "P@0.5", kind="relation")[1] == 40
    assert numbers.levels(record) == [0, 2]


def test_tables_say_what_the_record_says():
    record = record_of({"single": [4, 5, 6], "random": [4, 5, 6], "tuned": [5, 7, 9]})
    outcome = report.outcome_table(record)
    assert "| tuned | 3 | 25% | 50% | 70.0 ± 49.7 |" in outcome and "| single | 3 |  |  | 50.0 ± 24.8 |" in outcome
    lines = report.difference_table(record).splitlines()
    assert lines[0] == "| P@0.5 less that of single | all | 0 distractors | 2 distractors | 2 and more |"
    assert lines[2].startswith("| random | +0.0 ± 0.0 |")
    assert lines[3] == "| tuned | +13.3 ± 16.6 | +0.0 ± 0.0 | +20.0 ± 24.8 | +20.0 ± 24.8 |"
    assert "| tuned | +20.0 ± 24.8 | +20.0 ± 24.8 |" in report.kinds_table(record)
    assert report.effort(record).startswith("9 runs, of 100 steps, 1 minutes each, 0.1 hours")
    del record["runs"][0]
    record["runs"][1]["cpu"] = "another"
    assert report.effort(record).startswith("8 of 9 runs so far, of 100 steps,")
    assert "on 2 cores (a CPU or another)" in report.effort(record)
    assert "| training | 4 | 5 | 6 | 1, 1, 2, 1 |" in report.data_table(record)


def test_questions_are_answered_by_the_rule():
    record = record_of(
        {"single": [4, 5, 6], "random": [9, 9, 9], "tuned": [5, 6, 7], "later": [5, 7, 6], "cropped": [4]}
    )
    lines = report.answers(record).splitlines()[2:]
    assert lines == [
        "| 1 | tuned less random | -30.0 ± 24.8 | worse |",
        "| 1 | tuned less single | +10.0 ± 0.0 | better |",
        "| 2 | tuned less single, less the same on the other samples | +10.0 ± 0.0 | larger |",
        "| 5 | later less tuned | +0.0 ± 24.8 | nothing is claimed |",
    ]


def test_follow_ups_are_compared_with_single_photos_of_the_same_seeds():
    record = record_of({"single": [4, 5, 6], "tuned": [5, 7, 9]})
    quarter, larger = record_of({"tuned": [5, 5]}), record_of({"single": [6, 8], "tuned": [5, 9]})
    quarter["study"] = {"arms": {"tuned": {"share": 0.25}}, "seeds": [1, 2], "size": 128}
    larger["study"]["size"] = 160
    lines = report.follow_ups(record | {"follow_ups": {"quarter": quarter, "larger": larger}}).splitlines()
    assert lines[2:5] == [
        "| main | 128 pixels | tuned | 50% | 3 | 50.0 ± 24.8 | +20.0 ± 24.8 | -10.0 ± 12.4 | 50.0 ± 0.0 |",
        "| quarter | 128 pixels | tuned | 25% | 2 | 45.0 ± 63.5 | +5.0 ± 63.5 | -2.5 ± 31.8 | 50.0 ± 0.0 |",
        "| larger | 160 pixels | tuned | 50% | 2 | 70.0 ± 127.1 | +0.0 ± 127.1 | +0.0 ± 63.5 | 50.0 ± 0.0 |",
    ]
    assert lines[6].startswith("*quarter*: 2 runs, of 100 steps")
    assert lines[8].startswith("*larger*: 4 of 9 runs so far")


def test_cells_are_shown_beside_the_mosaics_of_the_same_runs():
    larger = record_of({"single": [4, 5]})
    for run, value in zip(larger["runs"], (3, 5), strict=True):
        run["mosaic"] = [row(distractors=2, hits=value), row(distractors=0, hits=9)]
    cells = [{"arm": "single", "seed": seed, "whole": 40.0, "blurred": 30.0, "small": 10.0} for seed in (1, 2)]
    record = record_of({"single": [4]}) | {"follow_ups": {"larger": larger}, "cells": {"runs": cells}}
    assert report.cells_table(record).splitlines()[2:] == [
        "| single | 2 | 40.0 ± 0.0 | 30.0 ± 0.0 | 10.0 ± 0.0 | 40.0 ± 127.1 |"
    ]


@pytest.mark.parametrize(("position", "corner"), [(0, (0, 0)), (1, (0, 8)), (2, (8, 0)), (7, (8, 8))])
def test_a_small_photo_is_in_a_quarter_of_an_empty_frame(position, corner):
    image, mask = torch.rand(1, 3, 16, 16) + 1, torch.ones(1, 16, 16, dtype=torch.uint8)
    batch = SimpleNamespace(image=image, mask=mask, plan=np.array([(position,)], [("position", np.int64)]))
    shown, target = effect_cells.small(batch)
    y, x = corner
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[y : y + 8, x : x + 8] = True
    assert torch.equal(target[0] > 0, inside) and torch.equal((shown[0] != 0).all(0), inside)
    means = shown[0, :, y : y + 8, x : x + 8].mean((1, 2)), image[0].mean((1, 2))
    torch.testing.assert_close(*means, rtol=0.05, atol=0)
    assert torch.equal(effect_cells.blurred(batch)[1], mask)


def test_the_page_is_made_of_the_record_alone():
    record = record_of({"single": [4, 5, 6], "tuned": [5, 7, 9]})
    text = "".join(f"Before.\n{report.BEGIN.format(name)}old{report.END}" for name, _ in report.TABLES)
    made = report.rewritten(text, record)
    assert "old" not in made and made.count("Before.") == len(report.TABLES) and "+20.0 ± 24.8" in made
    assert report.rewritten(made, record) == made
    other = deepcopy(record)
    other["runs"][0]["single"][1]["hits"] += 1
    assert report.rewritten(made, other) != made


def test_figures_show_every_arm(tmp_path):
    record = record_of({"single": [4, 5, 6], "random": [4, 5, 6], "tuned": [5, 7, 9]})
    quarter, fewer = record_of({"quarter": [5, 5]}), record_of({"single": [5], "tuned": [5]})
    quarter["study"]["arms"] = {"quarter": {"share": 0.25}}
    figures.plot_summary(record | {"follow_ups": {"quarter": quarter, "fewer": fewer}}, tmp_path / "small.svg")
    shown = (tmp_path / "small.svg").read_text()
    assert all(f">{row}<" in shown for row in ("random", "tuned", "quarter", "tuned (fewer)"))
    assert ">single" not in shown
    figures.plot_distractors(record, tmp_path / "one.svg")
    figures.plot_false_negatives(record, tmp_path / "two.svg")
    for name in ("one.svg", "two.svg"):
        text = (tmp_path / name).read_text()
        assert all(f">{arm}<" in text for arm in ("random", "tuned"))
