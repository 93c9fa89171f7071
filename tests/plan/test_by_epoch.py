"""ByEpoch: its value in every epoch, exact; what it refuses; and that it is a value itself."""

import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemo_dali
from nemo_dali.plan.by_epoch import LAST_EPOCH, MOST_VALUES, ByEpoch
from tests.helpers.counts import examples


@pytest.mark.parametrize(
    ("by_epoch", "expected"),
    [
        (ByEpoch({0: 0.5}), [0.5] * 9),
        (ByEpoch({0: 0.5}, "linear"), [0.5] * 9),
        (ByEpoch({0: 0.0, 5: 0.5, 7: 0.25}), [0.0] * 5 + [0.5] * 2 + [0.25] * 2),
        (ByEpoch({0: None, 2: 0.3, 3: None}), [None, None, 0.3, None, None]),
        (ByEpoch({0: 0, 4: 1, 5: 0}, "linear"), [0, 0.25, 0.5, 0.75, 1, 0, 0]),
        (ByEpoch({0: 0.3, 1: 0.1, 3: 0.2}, "linear"), [0.3, 0.1, (0.1 + 0.2) / 2, 0.2, 0.2]),
        (ByEpoch({0: -1.0, 3: 1.0}, "linear"), [-1.0, -1 / 3, 1 / 3, 1.0, 1.0]),
    ],
)
def test_the_value_in_every_epoch(by_epoch, expected):
    assert [by_epoch.at(epoch) for epoch in range(len(expected))] == expected
    assert by_epoch.at(LAST_EPOCH) == by_epoch.at(2**63) == expected[-1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({0: 3, 2: 4}, [3, 4, 4]),  # 3.5
        ({0: 4, 2: 3}, [4, 4, 3]),
        ({0: 400, 30: 100}, [400 - 10 * epoch for epoch in range(31)]),
        ({0: 10, 3: 11}, [10, 10, 11, 11]),
        ({0: 2**31 - 1, 4: 3}, [2147483647, 1610612736, 1073741825, 536870914, 3]),
    ],
)
def test_whole_numbers_are_the_nearest_and_of_two_the_larger(values, expected):
    found = [ByEpoch(values, "linear").at(epoch, whole=True) for epoch in range(len(expected))]
    assert found == expected and all(type(value) is int for value in found)


EPOCHS = st.sets(st.integers(1, 50) | st.integers(1, LAST_EPOCH), max_size=4).map(lambda later: sorted({0, *later}))
NUMBERS = st.floats(-1, 1) | st.integers(3, 2**31 - 1)


@settings(max_examples=examples(400), deadline=None)
@given(EPOCHS.flatmap(lambda epochs: st.fixed_dictionaries({epoch: NUMBERS for epoch in epochs})), st.data())
def test_a_line_is_exact_and_rounded_once(values, data):
    epoch = data.draw(st.integers(0, min(2 * max(values) + 2, LAST_EPOCH)))
    first = max(known for known in values if known <= epoch)
    then = min((known for known in values if known > epoch), default=None)
    exact = Fraction(values[first])
    if then is not None:
        exact += (Fraction(values[then]) - exact) * Fraction(epoch - first, then - first)
    by_epoch = ByEpoch(values, "linear")
    assert by_epoch.at(epoch) == by_epoch.at(np.int64(epoch)) == float(exact)
    if epoch not in values and then is not None:
        assert by_epoch.at(epoch, whole=True) == math.floor(exact + Fraction(1, 2))
    assert ByEpoch(values).at(epoch) == values[first]


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {0: value}
    return value


@pytest.mark.parametrize(
    ("values", "interpolation", "words"),
    [
        ({1: 0.5}, "steps", r"values \({1: 0.5}\) must have epochs as keys, whole numbers from 0 on, and 0 among them"),
        ({0: 0.5, -1: 0.5}, "steps", "must have epochs as keys"),
        ({0: 0.5, 0.5: 0.5}, "steps", "must have epochs as keys"),
        ({0.0: 0.5}, "steps", "must have epochs as keys"),
        ({"0": 0.5}, "steps", "must have epochs as keys"),
        ({None: 0.5}, "steps", "must have epochs as keys"),
        ({0: 0.5, LAST_EPOCH + 1: 0.5}, "steps", "must have epochs as keys"),
        ({0: 0.5, 10**5000: 0.5}, "steps", "must have epochs as keys"),
        ({}, "steps", r"values \({}\) must be 1 to 1,000 values by epoch"),
        (0.5, "steps", "must be 1 to 1,000 values by epoch"),
        ([0.5], "steps", "must be 1 to 1,000 values by epoch"),
        (dict.fromkeys(range(MOST_VALUES + 1), 0.5), "steps", r"values \(a dict of 1001 values\) must be 1 to 1,000"),
        (dict.fromkeys(range(10**6), 0.5), "steps", r"values \(a dict of 1000000 values\) must be 1 to 1,000"),
        ({0: 0.5, 3: float("nan")}, "steps", r"values \(nan in epoch 3\) must be numbers or None"),
        ({0: float("inf")}, "linear", r"values \(inf in epoch 0\) must be numbers$"),
        ({0: 0.5, 2: None}, "linear", r"values \(None in epoch 2\) must be numbers$"),
        ({0: "0.5"}, "steps", r"values \('0.5' in epoch 0\) must be numbers or None"),
        ({0: 10**5000}, "steps", r"values \(a number of 16610 bits in epoch 0\)"),
        ({0: {0: 0.5}}, "steps", r"values \({0: 0.5} in epoch 0\)"),
        ({0: nested(10**5)}, "steps", r"values \(a dict in epoch 0\)"),
        ({0: 0.5}, "cosine", r"interpolation \('cosine'\) must be one of \('steps', 'linear'\)"),
        ({0: 0.5}, ["steps"], r"interpolation \(\['steps'\]\) must be one of"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(values, interpolation, words):
    with pytest.raises(ValueError, match=words) as caught:
        ByEpoch(values, interpolation)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("epoch", [-1, 0.5, None, "0"])
def test_an_epoch_that_cannot_be(epoch):
    with pytest.raises(ValueError, match="epoch"):
        ByEpoch({0: 0.5}).at(epoch)


def test_it_is_a_value():
    given_as = {5: 0.5, 0: 0}
    made = ByEpoch(given_as, "linear")
    given_as[7] = 1.0
    assert list(made.values.items()) == [(0, 0), (5, 0.5)]
    same = ByEpoch({np.int64(0): 0.0, np.int64(5): np.float64(0.5)}, interpolation="linear")
    assert made == same and hash(made) == hash(same) and made.as_mapping() == {"linear": {0: 0, 5: 0.5}}
    assert all(type(epoch) is int for epoch in same.values)
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), dataclasses.replace(made)):
        assert twin == made and hash(twin) == hash(made) and twin.at(3) == 0.3
    assert made != ByEpoch({0: 0, 5: 0.5}) != ByEpoch({0: 0, 6: 0.5}) and made != {0: 0, 5: 0.5}
    assert dataclasses.replace(made, interpolation="steps").at(3) == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.interpolation = "steps"
    assert nemo_dali.ByEpoch is nemo_dali.plan.ByEpoch is ByEpoch
