"""Which epoch a pass shows: after a complete one, one that was given up, and one that was taken step by step."""

import json
import logging
from itertools import islice

import pytest

from nemo_dali.loader.loader import Loader
from nemo_dali.plan.policy import MosaicPolicy

STEPS = 12


def make(files, **options):
    defaults = {"batch_size": 4, "policy": MosaicPolicy(max_similarity=0.4), "num_threads": 1}
    if options.get("split_mode") == "eval":
        defaults["policy"] = None
    return Loader(files.dataset, files.negatives, size=16, context_length=16, **{**defaults, **options})


def exactly(loader, steps=STEPS):
    """The plans of so many batches; the pass is not asked for one more."""
    return [batch.plan.tobytes() for _, batch in zip(range(steps), loader, strict=False)]


@pytest.fixture(scope="module")
def epochs(files):
    """The plans of three epochs."""
    loader = make(files)
    return [[batch.plan.tobytes() for batch in loader] for _ in range(3)]


@pytest.mark.parametrize("infinite", [False, True])
def test_a_pass_is_complete_with_its_last_batch(files, epochs, infinite, caplog):
    loader = make(files, infinite=infinite)
    assert [exactly(loader) for _ in range(3)] == epochs
    assert "restarted" not in caplog.text


@pytest.mark.parametrize("infinite", [False, True])
def test_set_epoch_before_each_counted_pass_changes_nothing(files, epochs, infinite):
    loader = make(files, infinite=infinite)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert loader.epoch == epoch
        assert exactly(loader) == epochs[epoch]


def test_one_iterator_without_end_goes_on_when_set_epoch_names_the_next(files, epochs):
    loader = make(files, infinite=True)
    batches = iter(loader)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert [next(batches).plan.tobytes() for _ in range(STEPS)] == epochs[epoch]


def test_the_epoch_just_completed_is_shown_again_if_it_is_chosen(files, epochs):
    loader = make(files)
    passing = iter(loader)
    for _ in range(STEPS):
        next(passing)
    loader.set_epoch(0)
    assert next(passing, None) is None  # the end of that pass does not count
    assert exactly(loader) == epochs[0]
    loader.set_epoch(0)
    assert (loader.epoch, loader.state_dict()["samples_seen"]) == (0, 0)
    assert exactly(loader) == epochs[0]
    loader.set_epoch(1)
    loader.set_epoch(0)
    assert exactly(loader) == epochs[0]
    assert exactly(loader) == epochs[1]


def test_an_epoch_chosen_within_a_pass_is_not_shown_again(files, epochs):
    loader = make(files)
    for step, _ in zip(range(STEPS), loader, strict=False):
        if step == 3:
            loader.set_epoch(0)
    assert exactly(loader) == epochs[1]


@pytest.mark.parametrize("begun", [False, True])
def test_a_state_taken_after_the_last_batch_goes_on_with_the_next_epoch(files, epochs, begun):
    loader = make(files)
    exactly(loader)
    kept = iter(loader) if begun else None  # the next pass, without a batch yet
    state = json.loads(json.dumps(loader.state_dict()))
    assert exactly(loader) == epochs[1]
    for again in (make(files), loader):
        again.load_state_dict(state)
        assert exactly(again) == epochs[1]
    again.load_state_dict(make(files).state_dict() | {"samples_seen": 4 * (STEPS - 2)})
    assert exactly(again, 2) == epochs[0][-2:]  # what is left of a resumed epoch is a complete pass too
    assert exactly(again) == epochs[1]
    del kept


def test_an_epoch_begun_anew_twice_is_told_once(files, epochs, caplog):
    loader = make(files)
    assert exactly(loader, 5) == exactly(loader, 5) == epochs[0][:5]
    assert not caplog.records
    assert [exactly(loader, 5) for _ in range(4)] == [epochs[0][:5]] * 4
    (told,) = (record.getMessage() for record in caplog.records)
    assert "Epoch 0 is restarted" in told and "set_epoch" in told
    loader.set_epoch(1)
    assert [exactly(loader, 5) for _ in range(4)] == [epochs[1][:5]] * 4
    assert len(caplog.records) == 1


@pytest.mark.parametrize("meanwhile", ["set_epoch", "load_state_dict", "a whole pass"])
def test_nothing_is_told_where_the_epoch_was_chosen(files, caplog, meanwhile):
    loader = make(files)
    for _ in range(4):
        exactly(loader, 2)
        if meanwhile == "set_epoch":
            loader.set_epoch(loader.epoch)
        elif meanwhile == "load_state_dict":
            loader.load_state_dict(loader.state_dict())
        else:
            exactly(loader)
    assert "restarted" not in caplog.text


def test_an_evaluation_may_be_begun_anew_without_a_word(files, caplog):
    loader = make(files, split_mode="eval")
    first = [next(iter(loader)).plan.tobytes() for _ in range(5)]
    assert len(set(first)) == 1 and not caplog.records
    whole = exactly(loader, len(loader))
    assert [batch.plan.tobytes() for batch in loader] == whole


def test_ranks_stay_together_when_one_of_them_looks_first(files, epochs):
    one, two = (make(files, batch_size=2, rank=rank, world_size=2) for rank in range(2))
    next(iter(one))
    for epoch in epochs:
        shown = [first + second for first, second in zip(exactly(one), exactly(two), strict=True)]
        assert shown == epoch


def test_what_a_pass_met_is_told_with_its_last_batch(files, caplog):
    loader = make(files, policy=MosaicPolicy(max_similarity=-0.99, top_k=3))
    with caplog.at_level(logging.WARNING):
        exactly(loader, STEPS - 1)
        assert not caplog.records
        list(islice(loader, STEPS))
    assert "had fewer candidates than cells" in caplog.text


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own
@pytest.mark.parametrize("steps", [5, STEPS])
def test_lightnings_limit_of_train_batches(files, epochs, steps, caplog):
    import lightning
    import torch

    shown = []

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, _):
            shown.append(batch.plan.tobytes())
            return self.layer(batch.image.mean((2, 3))).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=3, limit_train_batches=steps, enable_checkpointing=False, **quiet
    )
    trainer.fit(Model(), make(files))
    assert shown == [plan for epoch in epochs for plan in epoch[:steps]]
    assert "restarted" not in caplog.text


@pytest.mark.parametrize("infinite", [False, True])
def test_a_pass_that_has_shown_nothing_yet_follows_a_loaded_state(files, epochs, infinite):
    """detectron2's trainer takes its iterator first and loads the checkpoint then."""
    saved = make(files, infinite=infinite)
    assert exactly(saved, 3) == epochs[0][:3]
    loader = make(files, infinite=infinite)
    early = iter(loader)
    loader.load_state_dict(saved.state_dict())
    assert [next(early).plan.tobytes() for _ in range(4)] == epochs[0][3:7]
    assert loader.state_dict()["samples_seen"] == 28
    late = iter(loader)  # the early one has steps behind it now
    loader.load_state_dict(saved.state_dict())
    newest = iter(loader)
    assert [next(newest).plan.tobytes() for _ in range(2)] == epochs[0][3:5]
    assert next(late).plan.tobytes() == epochs[0][0] and loader.state_dict()["samples_seen"] == 20


@pytest.mark.parametrize("between", ["set_epoch", "a step of an older pass"])
def test_a_waiting_pass_is_not_forgotten(files, epochs, between):
    saved = make(files)
    saved.set_epoch(1)
    assert exactly(saved, 2) == epochs[1][:2]
    loader = make(files)
    older = iter(loader)
    next(older)
    waiting = iter(loader)
    loader.set_epoch(2) if between == "set_epoch" else next(older)
    loader.load_state_dict(saved.state_dict())
    assert next(waiting).plan.tobytes() == epochs[1][2]
    assert (loader.epoch, loader.state_dict()["samples_seen"]) == (1, 12)


def test_a_pass_that_has_shown_something_does_not_follow_a_loaded_state(files, epochs):
    loader = make(files)
    passing = iter(loader)
    state = loader.state_dict()
    next(passing)
    loader.load_state_dict(state)
    assert next(passing).plan.tobytes() == epochs[0][1]
    assert exactly(loader) == epochs[0]
