"""LoaderOptions: every option, and every two that do not go together, in one place."""

import inspect
import re
from dataclasses import fields

import pytest

from nemo_dali.loader.format import BatchFormat
from nemo_dali.loader.loader import Loader
from nemo_dali.loader.options import LoaderOptions, OwnRank
from nemo_dali.plan.policy import MosaicPolicy

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Loader).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD and parameter.default is not parameter.empty
}


def options(**given):
    return LoaderOptions.of(**{**DEFAULTS, "dataset": "a.ris.h5", "batch_size": 4, **given})


def test_a_loader_takes_every_option_of_a_format_and_leaves_its_default_to_it():
    names = {field.name for field in fields(BatchFormat)}
    assert names <= DEFAULTS.keys() and all(DEFAULTS[name] is None for name in names)
    assert options().format == BatchFormat()


def test_a_loader_hands_on_every_argument():
    named = inspect.signature(LoaderOptions.of).parameters.keys() - {"look"}
    assert named | {field.name for field in fields(BatchFormat)} == {*DEFAULTS, "dataset", "batch_size"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"split_mode": "eval", "policy": MosaicPolicy()}, r"policy \(.*\) must be left out with split_mode='eval'"),
        ({"split_mode": "eval", "on_error": "substitute"}, r"on_error \('substitute'\) must be left out with split"),
        ({"split_mode": "eval", "infinite": True}, r"infinite \(True\) must be False with split_mode='eval'"),
        ({"split_mode": "eval", "erase": 0.5}, r"erase \(0.5\) must be left out with split_mode='eval'"),
        ({"tiles": "t.tiles.h5", "fit": "letterbox"}, r"fit \('letterbox'\) must be 'stretch' with tiles"),
        ({"tiles": "t.tiles.h5", "erase": 0.5}, r"erase \(0.5\) must be 0 with tiles"),
        ({"tiles": "t.tiles.h5", "policy": MosaicPolicy(jitter=0.1)}, r"jitter \(0.1\) must be 0 with tiles, whose si"),
        ({"tiles": "t.tiles.h5", "placement": "pinned"}, r"placement \('pinned'\) must be 'host' for device='cpu'"),
        ({"placement": "device"}, r"placement \('device'\) must be left out without tiles"),
        ({"device_budget": 7}, r"device_budget \(7\) must be left out unless placement is 'device'"),
        ({"style": "dmmi"}, r"masked_words \(None\) must be given for style 'dmmi'"),
        ({"masked_words": "tokens"}, r"masked_words \('tokens'\) must be used with a tokenizer 'bert:...'"),
        ({"rank": 1}, r"rank \(1\) and world_size \(None\) must be given together"),
    ],
)
def test_two_options_that_do_not_go_together(given, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        options(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"tiles": "t.tiles.h5", "policy": MosaicPolicy(jitter=0.1, grids={3: 1.0})},
        {"tiles": "t.tiles.h5", "policy": MosaicPolicy(jitter=0.1, p_mined=0)},
        {"split_mode": "eval", "preset": "dmmi"},
        {"tiles": "t.tiles.h5"},
    ],
)
def test_two_options_that_do(given):
    options(**given)


def test_what_ranks_compare_tells_any_two_loaders_apart_that_would_show_or_hold_others():
    facts = options().facts()
    for other in (
        {"seed": 1},
        {"batch_size": 5},
        {"policy": MosaicPolicy(p_mined=0.25)},
        {"split_mode": "eval"},
        {"size": 64},
        {"samples": "first"},
        {"style": "lavt"},
        {"on_error": "substitute"},
        {"drop_last": False},
        {"tiles": "t.tiles.h5"},
    ):
        differing = {name for name, value in options(**other).facts().items() if value != facts[name]}
        assert differing & {*other, "samples"}, other
    machine = {"num_threads": 1, "prefetch": 5, "hw_decoder_load": 0.5}
    assert options(**machine).facts() == facts


@pytest.mark.parametrize(
    ("ranks", "together", "alone"),
    [(OwnRank(0, 1, False), False, True), (OwnRank(1, 2, False), True, False), (OwnRank(1, 2, True), False, False)],
)
def test_who_makes_loaders(ranks, together, alone):
    assert (ranks.together, ranks.alone) == (together, alone)


def test_the_docstring_explains_every_argument():
    lines = re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*): ", inspect.getdoc(Loader), re.MULTILINE)
    explained = {name for line in lines for name in line.split(", ")}
    assert explained >= {*DEFAULTS, "dataset", "batch_size"}
