"""Metrics on masks whose intersections and unions can be counted by eye, on ranks, and against a slow computation."""

import json
import math
import struct
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_dali import metrics
from nemo_dali.errors import NemoError
from nemo_dali.metrics import PROTOCOLS, Protocol, Segmentation
from tests.helpers import fork_server
from tests.helpers.counts import examples

CRIS_LIKE = ("cris", "etris", "detris", "cgformer")


def masks(*texts):
    """Bool [B, 1, W]: a mask of one row each."""
    return np.array([[[pixel == "#" for pixel in text]] for text in texts])


# I, U:         5, 5         5, 10        7, 10        0, 8
PREDICTION = masks("#####.....", "#####.....", "#######...", "####......")
TARGET = masks("#####.....", "##########", "##########", "......####")


def measure(protocol, *arguments, **options):
    metric = Segmentation(protocol)
    metric.update(*arguments, **options)
    return metric.compute()


def of_counts(intersection, union):
    """Two masks [1, 1, union] with so many pixels in both and in either."""
    return np.arange(union)[None, None] < intersection, np.ones((1, 1, union), bool)


@pytest.mark.parametrize("protocol", ["lavt", "dmmi", "caris", "maskris"])
def test_at_least_x_counts_for_lavt_and_its_kin(protocol):
    found = measure(protocol, PREDICTION, TARGET)
    assert found.pop("oIoU") == 17 / 33
    assert found.pop("mIoU") == (1 + 0.5 + 0.7 + 0) / 4
    if protocol == "dmmi":
        assert math.isnan(found.pop("N-acc"))  # all have a target
    expected = {"P@0.5": 3 / 4, "P@0.6": 2 / 4, "P@0.7": 2 / 4, "P@0.8": 1 / 4, "P@0.9": 1 / 4}
    thresholds = 3 if protocol in ("caris", "maskris") else 5
    assert len(found) == thresholds and found.items() <= expected.items()


@pytest.mark.parametrize("protocol", CRIS_LIKE)
def test_only_more_than_x_counts_for_cris_and_its_kin(protocol):
    found = measure(protocol, PREDICTION, TARGET)
    assert found.pop("oIoU") == 17 / 33  # without the epsilon, as DETRIS and CGFormer have it
    assert found.pop("mIoU") == pytest.approx((5 / 5.000001 + 5 / 10.000001 + 7 / 10.000001) / 4, rel=1e-15)
    assert found == {"P@0.5": 2 / 4, "P@0.6": 2 / 4, "P@0.7": 1 / 4, "P@0.8": 1 / 4, "P@0.9": 1 / 4}


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
@pytest.mark.parametrize("union", [10, 50, 60, 1000])
def test_cris_compares_with_float32_thresholds_as_torch_does(tenths, union):
    intersection = union * tenths // 10
    found = measure("cris", *of_counts(intersection, union))
    ious = torch.tensor([intersection / (union + 1e-6)], dtype=torch.float64)
    ours = [found[f"P@0.{tenth}"] for tenth in range(5, 10)]
    assert ours == [float((ious > threshold).float().mean()) for threshold in torch.arange(0.5, 1.0, 0.1)]
    assert found[f"P@0.{tenths}"] == ((tenths in (7, 9) and union >= 60) or (tenths, union) == (9, 50))


def test_nothing_predicted_where_nothing_is():
    """I = U = 0: 0 for LAVT and CRIS, NaN for CARIS, whose P@X count it as a miss."""
    prediction, target = masks("......", "###..."), masks("......", "###...")  # the other one: I = U = 3
    for protocol in ("lavt", *CRIS_LIKE):
        found = measure(protocol, prediction, target)
        assert found["mIoU"] == pytest.approx(0.5, rel=1e-6) and found["oIoU"] == 1 and found["P@0.5"] == 0.5
    for protocol in ("caris", "maskris"):
        found = measure(protocol, prediction, target)
        assert math.isnan(found["mIoU"]) and found["oIoU"] == 1 and found["P@0.5"] == 0.5
    for protocol in ("lavt", "cris", "caris"):
        assert math.isnan(measure(protocol, prediction[:1], target[:1])["oIoU"])


# I, U:     7, 10         5, 10         0, 3          0, 3          5, 5
GREF = (
    masks("#######...", "#####.....", "###.......", "###.......", "#####....."),
    masks("##########", "##########", "..........", "..........", "#####....."),
)


def test_rela_rewards_empty_and_believes_the_verdict_more_than_the_mask():
    """The second one is called empty, but has a target: I = 0, and U stays; the third is empty and called so: U = 0."""
    found = measure("rela", *GREF, predicted_empty=[False, True, True, False, False])
    assert found == {
        "cIoU": (7 + 0 + 0 + 0 + 5) / (10 + 10 + 0 + 3 + 5),
        "gIoU": pytest.approx((0.7 + 0 + 1 + 0 + 1) / 5, rel=1e-15),
        "P@0.7": 2 / 3,
        "P@0.8": 1 / 3,
        "P@0.9": 1 / 3,
        "N-acc": 1 / 2,
        "T-acc": 2 / 3,
    }


def test_rela_without_a_verdict_asks_the_mask():
    found = measure("rela", *GREF)
    assert found["cIoU"] == 17 / 31 and found["gIoU"] == pytest.approx((0.7 + 0.5 + 0 + 0 + 1) / 5, rel=1e-15)
    assert found["N-acc"] == 0 and found["T-acc"] == 1
    prediction = GREF[0].copy()
    prediction[2] = False
    assert measure("rela", prediction, GREF[1])["N-acc"] == 1 / 2


def test_rela_a_verdict_of_a_target_stands_against_an_empty_mask():
    nothing = masks("......")
    assert measure("rela", nothing, nothing, predicted_empty=[False])["gIoU"] == 0
    assert measure("rela", nothing, nothing, predicted_empty=[True])["gIoU"] == 1
    found = measure("rela", masks("......", "......"), masks("###...", "......"), predicted_empty=[False, True])
    assert (found["T-acc"], found["N-acc"], found["gIoU"]) == (1, 1, 1 / 2)


def test_rela_where_one_kind_of_sample_is_missing():
    found = measure("rela", GREF[0][[0, 4]], GREF[1][[0, 4]])
    assert (found["N-acc"], found["T-acc"], found["P@0.7"]) == (0, 0, 1)
    found = measure("rela", GREF[1][2:4], GREF[1][2:4])
    assert (found["gIoU"], found["N-acc"]) == (1, 1)
    assert all(math.isnan(found[name]) for name in ("cIoU", "T-acc", "P@0.7", "P@0.8", "P@0.9"))


def test_an_annotated_target_may_have_lost_its_pixels():
    """Resized to nothing, it still is a target: to find it empty is wrong."""
    nothing = masks("......")
    found = measure("rela", nothing, nothing, [False])
    assert (found["gIoU"], found["P@0.7"], found["N-acc"]) == (0, 0, 0)
    found = measure("dmmi", nothing, nothing, empty=torch.tensor([False]))
    assert found["mIoU"] == 0 and math.isnan(found["N-acc"])


def test_dmmi_keeps_samples_without_a_target_apart_and_lavt_does_not():
    # I, U:             7, 10         0, 0          0, 3
    prediction, target = masks("#######...", "..........", "###......."), masks("##########", "." * 10, "." * 10)
    found = measure("dmmi", prediction, target)
    assert (found["oIoU"], found["mIoU"], found["P@0.7"], found["N-acc"]) == (7 / 10, 0.7, 1, 1 / 2)
    found = measure("lavt", prediction, target)
    assert (found["oIoU"], found["P@0.7"]) == (7 / 13, 1 / 3) and found["mIoU"] == pytest.approx(0.7 / 3)
    assert "N-acc" not in found


def test_masks_of_several_sizes():
    shapes = [(1, 10), (3, 5), (7, 2)]
    random = np.random.default_rng(0)
    predictions, targets = ([random.random(shape) < 0.6 for shape in shapes] for _ in range(2))
    pixels = [
        (set(np.flatnonzero(one)), set(np.flatnonzero(other))) for one, other in zip(predictions, targets, strict=True)
    ]
    found = measure("lavt", predictions, [torch.from_numpy(target) for target in targets])
    assert found["oIoU"] == sum(len(one & other) for one, other in pixels) / sum(len(a | b) for a, b in pixels)
    assert found["mIoU"] == pytest.approx(sum(len(one & other) / len(one | other) for one, other in pixels) / 3)
    assert measure("lavt", list(PREDICTION), list(TARGET)) == measure("lavt", PREDICTION, TARGET)


@pytest.mark.parametrize(
    "given",
    [
        lambda mask: torch.from_numpy(mask),
        lambda mask: mask.astype(np.uint8),
        lambda mask: mask.astype(np.uint16),
        lambda mask: mask.astype(np.float64),
        lambda mask: np.broadcast_to(mask[:, ::-1, ::-1].copy(), mask.shape)[:, ::-1, ::-1],  # negative strides
        lambda mask: np.lib.stride_tricks.as_strided(mask, writeable=False),
        lambda mask: torch.from_numpy(mask).long(),
        lambda mask: torch.from_numpy(mask).to(torch.bfloat16),
        lambda mask: torch.from_numpy(mask).float().requires_grad_(),
    ],
)
def test_any_type_of_array(given):
    expected = measure("lavt", PREDICTION, TARGET)
    assert measure("lavt", given(PREDICTION), TARGET) == expected == measure("lavt", PREDICTION, given(TARGET))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_pixel_needs_more_than_the_threshold(protocol, dtype):
    """0.35 itself is background for CRIS; as float16 it is 0.3501 and so is not."""
    bound = 0.35 if protocol in ("cris", "etris", "detris") else 0.5
    rounded = torch.tensor(bound, dtype=dtype)
    above = torch.nextafter(rounded, torch.tensor(1, dtype=dtype))
    probability = torch.stack([rounded, above])[None, None]
    found = measure(protocol, probability, torch.ones(1, 1, 2))["cIoU" if protocol == "rela" else "oIoU"]
    exact = torch.tensor(bound, dtype=torch.promote_types(dtype, torch.float32))
    assert found == (2 if rounded > exact else 1) / 2


def test_cubic_interpolation_overshoots_and_is_no_logit():
    """The worst maps for the centre of one interpolation, and for two: taps alternate in sign."""
    one = torch.tensor([0.0, 1, 1, 0])
    worst = torch.where(one[:, None] == one, 1.0, 0.0)[None, None]
    once = torch.nn.functional.interpolate(worst, size=(7, 7), mode="bicubic", align_corners=True)[0]
    assert 0.44 < once.max() - 1 < PROTOCOLS["cgformer"].overshoot
    measure("cgformer", once, once > 0.5)
    measure("cgformer", 1 - once, once > 0.5)
    with pytest.raises(ValueError, match=r"prediction \(1.445.. in sample 0\) must be 0 or 1, or probabilities"):
        measure("lavt", once, once > 0.5)

    # Each of the 16 taps of the second is the centre of a worst map, or of a best one.
    signs = (one[:, None] == one).repeat_interleave(4, 0).repeat_interleave(4, 1)
    twice = (worst[0, 0].repeat(4, 4) == signs).float()
    centres = torch.nn.functional.interpolate(
        twice.reshape(4, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 1, 4, 4),
        size=(7, 7),
        mode="bicubic",
        align_corners=True,
    )[:, 0, 3, 3].reshape(4, 4)
    to_middle = np.array([[1, 0, 1.5], [0, 1, 1.5]])  # with WARP_INVERSE_MAP: from the output's to the input's
    restored = cv2.warpAffine(centres.numpy(), to_middle, (1, 1), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)[None]
    assert 1.25 < restored.max() - 1 < PROTOCOLS["cris"].overshoot
    measure("cris", restored, restored > 0.35)
    with pytest.raises(ValueError, match="logits take a sigmoid first"):
        measure("cris", torch.tensor([[[-4.0, 0.5, 3.0]]]), masks("##."))


ONES = np.ones((2, 3, 4), bool)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ONES[0], ONES), {}, r"prediction \(\[3, 4\]\) must be \[B, H, W\]"),
        ((ONES[:, None], ONES), {}, r"prediction \(\[2, 1, 3, 4\]\) must be \[B, H, W\]"),
        ((ONES, [ONES]), {}, r"target \(\[2, 3, 4\]\) must be a list of \[H, W\]"),
        ((ONES[:, :0], ONES[:, :0]), {}, r"prediction \(\[2, 0, 4\]\) must be .*neither H nor W 0"),
        ((ONES, ONES[:1]), {}, r"target \(\[1, 3, 4\]\) must have the shape of prediction \(\[2, 3, 4\]\)"),
        ((list(ONES), list(ONES[:1])), {}, r"target \(1 masks\) must have the shape of prediction \(2 masks\)"),
        (
            ([ONES[0], ONES[0]], [ONES[0], ONES[0].T]),
            {},
            r"target \(\[1, 4, 3\]\) must have the shape .* \(\[1, 3, 4\]\)",
        ),
        ((None, ONES), {}, r"prediction \(NoneType\) must be torch tensors or NumPy arrays"),
        ((ONES, ONES.astype(complex)), {}, r"target \(complex128\) must be torch tensors or NumPy arrays, bool"),
        ((ONES * np.array([1, math.nan])[:, None, None], ONES), {}, r"prediction \(nan in sample 5\) must be 0 or 1"),
        (
            (np.where(np.eye(3, 4), -0.25, ONES * 0.5), ONES),
            {},
            r"prediction \(-0.25 in sample 4\) must be 0 or 1, or probabilities",
        ),
        ((ONES * math.inf, ONES), {}, r"prediction \(inf in sample 4\)"),
        ((ONES * np.uint8(255), ONES), {}, r"prediction \(255 in sample 4\)"),
        ((ONES, ONES * np.array([1, 2])[:, None, None]), {}, r"target \(2 in sample 5\) must be 0 or 1$"),
        ((ONES, ONES * 0.5), {}, r"target \(0.5 in sample 4\) must be 0 or 1$"),
        ((ONES, ONES * math.nan), {}, r"target \(nan in sample 4\) must be 0 or 1$"),
        ((ONES, ONES, [True]), {}, r"empty \(torch.bool, \[1\]\) must be bool \[2\]"),
        ((ONES, ONES, [0, 1]), {}, r"empty \(torch.int64, \[2\]\) must be bool \[2\]"),
        ((ONES, ONES), {"predicted_empty": True}, r"predicted_empty \(torch.bool, \[\]\) must be bool \[2\]"),
        ((ONES, ONES, [False, True]), {}, r"empty \(True for sample 5\) must be False where the target has pixels"),
    ],
)
def test_an_update_that_cannot_be_counted_is_told_and_leaves_no_trace(arguments, options, message):
    metric = Segmentation("rela")
    metric.update(PREDICTION, TARGET)
    before = metric.compute()
    with pytest.raises(ValueError, match=message):
        metric.update(*arguments, **options)
    assert metric.compute() == before


def test_protocols_that_know_no_such_samples_refuse_what_is_said_about_them():
    with pytest.raises(ValueError, match=r"empty \(given\) must be None"):
        measure("cris", ONES, ONES, [False, False])
    for protocol in ("cris", "dmmi"):
        with pytest.raises(ValueError, match=r"predicted_empty \(given\) must be None"):
            measure(protocol, ONES, ONES, predicted_empty=[False, False])
    with pytest.raises(ValueError, match=r"protocol \('LAVT'\) must be a Protocol or one of \('lavt', "):
        Segmentation("LAVT")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("thresholds", (0.5, 0.0)),
        ("thresholds", (1.5,)),
        ("epsilon", -1e-6),
        ("epsilon", math.nan),
        ("empty_union", 0.5),
        ("probability", 1.0),
        ("overshoot", -0.1),
        ("overshoot", math.inf),
        ("no_target", "ignored"),
    ],
)
def test_a_protocol_is_checked_when_made(name, value):
    with pytest.raises(ValueError, match=rf"^{name} \(.*\) must be "):
        Protocol(**{name: value})


def test_a_protocol_of_ones_own():
    own = Protocol(thresholds=(0.25, 0.5), inclusive=False, empty_union=1.0, probability=0.9)
    found = measure(own, np.stack([masks("....")[0] * 1.0, [[0.9, 0.95, 1, 0]]]), masks("....", "####"))  # 0, 0; 2, 4
    assert found == {"oIoU": 2 / 4, "mIoU": 0.75, "P@0.25": 1, "P@0.5": 0.5}


def test_samples_add_up_until_reset():
    metric = Segmentation()
    with pytest.raises(NemoError, match="no rank has a sample"):
        metric.compute()
    metric.update([], [])
    metric.update(PREDICTION[:0], TARGET[:0])
    with pytest.raises(NemoError, match="no rank has a sample"):
        metric.compute()
    metric.update(PREDICTION[:1], TARGET[:1])
    assert metric.compute() == metric.compute() == measure("lavt", PREDICTION[:1], TARGET[:1])
    metric.update(PREDICTION[1:], TARGET[1:])
    assert metric.compute() == measure("lavt", PREDICTION, TARGET)
    metric.reset()
    metric.update(PREDICTION[:2], TARGET[:2])
    assert metric.compute() == measure("lavt", PREDICTION[:2], TARGET[:2])


def test_each_sample_has_its_counts_in_the_order_given():
    metric = Segmentation()
    metric.update(list(PREDICTION[:1]), list(TARGET[:1]))
    metric.update(PREDICTION[1:], TARGET[1:])
    found = metric.per_sample()
    assert found["intersection"].tolist() == [5, 5, 7, 0] and found["union"].tolist() == [5, 10, 10, 8]
    assert found["iou"].tolist() == [1, 0.5, 0.7, 0]
    assert len(Segmentation().per_sample()) == 0
    metric.reset()
    assert len(metric.per_sample()) == 0


@pytest.mark.parametrize(
    ("protocol", "iou"), [("lavt", 0), ("cris", 0), ("caris", math.nan), ("rela", 1), ("dmmi", math.nan)]
)
def test_a_sample_with_neither_prediction_nor_target_is_the_protocols(protocol, iou):
    metric = Segmentation(protocol)
    metric.update(*[masks("......", "##....")] * 2)
    found = metric.per_sample()
    assert (found["intersection"].tolist(), found["union"].tolist()) == ([0, 2], [0, 2])
    assert found["iou"][0] == pytest.approx(iou, nan_ok=True) and found["iou"][1] == pytest.approx(1, rel=1e-6)


def test_groups_are_measured_as_if_each_were_alone():
    metric = Segmentation("rela")
    assert metric.compute_groups() == {}
    order = [(0, 3), (3, 5)]
    distractors, kind = np.array([2, 0, 2, 0, 10]), ["place", "attribute", "place", "rank", "rank"]
    for begin, end in order:
        part = slice(begin, end)
        groups = {"distractors": distractors[part], "kind": kind[part]}
        metric.update(GREF[0][part], GREF[1][part], groups=groups)
    found = metric.compute_groups()
    assert {name: list(keys) for name, keys in found.items()} == {
        "distractors": [0, 2, 10],
        "kind": ["attribute", "place", "rank"],
    }
    for name, keys in (("distractors", distractors), ("kind", np.array(kind))):
        for key, measured in found[name].items():
            alone = measure("rela", *(array[keys == key] for array in GREF))
            if math.isnan(measured["N-acc"]):  # no sample of the group is without a target
                assert alone["N-acc"] == alone["T-acc"] == 0
                alone |= {"N-acc": math.nan, "T-acc": measured["T-acc"]}
            assert repr(measured) == repr({"samples": (keys == key).sum().item(), **alone})
    assert {its["T-acc"] for its in found["kind"].values()} == {1.0}
    assert metric.compute() == measure("rela", *GREF)  # all samples, as ever
    metric.reset()
    assert metric.compute_groups() == {}


def test_groups_may_be_named_anew_and_be_of_both_types():
    metric = Segmentation()
    metric.update(PREDICTION[:1], TARGET[:1])
    metric.update(PREDICTION[1:3], TARGET[1:3], groups={"of": torch.tensor([7, -1])})
    metric.update(PREDICTION[3:], TARGET[3:], groups={"of": ("7",), "more": [3]})
    found = metric.compute_groups()
    assert list(found) == ["more", "of"] and list(found["of"]) == [-1, 7, "7"]
    assert (
        [found["of"][key]["mIoU"] for key in (-1, 7, "7")]
        == [0.7, 0.5, 0]
        == [*(found["of"][key]["oIoU"] for key in (-1, 7, "7"))]
    )
    assert {measured["samples"] for measured in found["of"].values()} == {1}


@pytest.mark.parametrize(
    ("keys", "shown"), [([1], r"\[1\]"), ([1, 2.0], r"\[1, 2.0\]"), ([True, False], "True"), ("ab", "'ab'"), (3, "3")]
)
def test_keys_that_are_not_one_per_sample_are_told_and_leave_no_trace(keys, shown):
    metric = Segmentation()
    metric.update(PREDICTION, TARGET, groups={"kind": ["a", "b", "a", "b"]})
    before = metric.compute_groups()
    with pytest.raises(ValueError, match=rf"groups\['kind'\] \(.*{shown}.*\) must be .* for each of 2 samples"):
        metric.update(ONES, ONES, groups={"kind": keys})
    with pytest.raises(ValueError, match="0 or 1"):
        metric.update(ONES * 2, ONES, groups={"kind": ["a", "b"]})
    assert metric.compute_groups() == before and len(metric.per_sample()) == 4


def test_the_module_imports_without_torch():
    code = "import sys, nemo_dali.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_before_compute():
    inputs = [torch.from_numpy(array).cuda() for array in (PREDICTION * 0.75, TARGET)]
    metric = Segmentation("rela")
    metric.update(*inputs)  # kernels are loaded
    metric.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype, and sets it
            torch.cuda.set_sync_debug_mode("error")
        metric.update(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    metric.update(inputs[0], TARGET, np.zeros(4, bool), predicted_empty=torch.zeros(4, dtype=torch.bool))
    assert metric.compute() == measure("rela", PREDICTION, TARGET)
    metric.update(inputs[0] * 8, inputs[1])
    with pytest.raises(ValueError, match=r"prediction \(6 in sample 8\)"):
        metric.compute()


RANDOM = np.random.default_rng(3)
SAMPLES = RANDOM.random((7, 9, 11)) < RANDOM.random((7, 1, 1)), RANDOM.random((7, 9, 11)) < RANDOM.random((7, 1, 1))
for _array in SAMPLES:
    _array[3:5] = False  # without a target; the fourth is found empty
SAMPLES[0][4, 0, 0] = True
KEYS = [1, 2, 1, 0, 2, 3, 0]
BOUNDS = {2: (0, 5, 7), 3: (0, 4, 4, 7)}  # the second of three ranks has no sample


def said(metric):
    try:
        return repr(metric.compute())
    except (NemoError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def act(rank, world, folder):
    """One rank's part."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    mine = slice(*BOUNDS[world][rank : rank + 2])
    found = {}
    for protocol in PROTOCOLS:
        metric = Segmentation(protocol)
        if mine.start < mine.stop:
            metric.update(SAMPLES[0][mine], SAMPLES[1][mine])
        found[protocol] = said(metric)
    groups = {"photo": KEYS[mine], f"of rank {rank}": KEYS[mine]}
    metric = Segmentation()
    if mine.start < mine.stop:
        metric.update(SAMPLES[0][mine], SAMPLES[1][mine], groups=groups)
    found["groups"] = repr(metric.compute_groups())
    found["own samples"] = len(metric.per_sample())
    found["nothing"] = said(Segmentation())
    found["mixed"] = said(Segmentation("cris" if rank == 1 else "lavt"))
    metric = Segmentation()
    check, metrics._check = metrics._check, lambda *_: None  # as on a GPU, whose values are looked at later
    metric.update(ONES * (1 + (rank == 1)), ONES)
    metrics._check = check
    found["late"] = said(metric)
    (folder / f"{world} {rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def fork(folder):
    """Become the ranks of each world."""
    import torch.distributed

    for world in BOUNDS:
        torch.multiprocessing.start_processes(act, (world, folder), nprocs=world, start_method="fork")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        fork_server.call(fork, folder)
    return {
        world: [json.loads((folder / f"{world} {rank}.json").read_text()) for rank in range(world)] for world in BOUNDS
    }


@pytest.mark.process
@pytest.mark.parametrize("world", BOUNDS)
def test_any_number_of_ranks_measures_what_one_does(ranks, world):
    order = np.random.default_rng(0).permutation(7)
    for protocol in PROTOCOLS:
        alone = repr(measure(protocol, *SAMPLES))
        assert [found[protocol] for found in ranks[world]] == [alone] * world
        assert repr(measure(protocol, SAMPLES[0][order], SAMPLES[1][order])) == alone


@pytest.mark.process
@pytest.mark.parametrize("world", BOUNDS)
def test_groups_that_only_some_ranks_have_met_are_measured_on_all(ranks, world):
    bounds = list(zip(BOUNDS[world], BOUNDS[world][1:], strict=False))
    metric = Segmentation()
    for rank, (begin, end) in enumerate(bounds):
        part = slice(begin, end)
        metric.update(SAMPLES[0][part], SAMPLES[1][part], groups={"photo": KEYS[part], f"of rank {rank}": KEYS[part]})
    assert {found["groups"] for found in ranks[world]} == {repr(metric.compute_groups())}
    assert list(metric.compute_groups()["photo"]) == [0, 1, 2, 3]
    assert [found["own samples"] for found in ranks[world]] == [end - begin for begin, end in bounds]


@pytest.mark.parametrize("world", BOUNDS)
def test_what_goes_wrong_on_a_rank_is_told_on_all(ranks, world):
    assert {found["nothing"] for found in ranks[world]} == {
        "NemoError: There is nothing to measure: no rank has a sample. Call update() before compute()."
    }
    for found in ranks[world]:
        assert found["mixed"].startswith(f"NemoError: Rank 1 of {world} computed metrics with a different protocol: ")
    text = "prediction (2 in sample 0) must be 0 or 1, or probabilities: logits take a sigmoid first"
    told = [f"ToldElsewhere: Rank 1 failed: {text}"] * world
    told[1] = f"ValueError: {text}"
    assert [found["late"] for found in ranks[world]] == told


def slowly(protocol, predictions, targets, empty, verdicts):
    """The metrics by sets of pixels, one sample at a time, in the order the repositories take."""
    strict, bound = protocol in CRIS_LIKE, 0.35 if protocol in ("cris", "etris", "detris") else 0.5
    tenths = {"caris": (5, 7, 9), "maskris": (5, 7, 9), "rela": (7, 8, 9)}.get(protocol, (5, 6, 7, 8, 9))
    cum_i = cum_u = 0
    ious, hits, accurate, targeted = [], dict.fromkeys(tenths, 0), [], []
    for prediction, target, none, verdict in zip(predictions, targets, empty, verdicts, strict=True):
        one = {i for i, probability in enumerate(prediction) if probability > bound}
        other = {i for i, inside in enumerate(target) if inside}
        i, u = len(one & other), len(one | other)
        if protocol == "rela" and none:
            accurate.append(verdict)
            ious.append(1.0 if verdict else 0.0)
            cum_u += 0 if verdict else u
            continue
        if protocol == "dmmi" and none:
            accurate.append(not one)
            continue
        if protocol == "rela":
            targeted.append(not verdict)
            i = 0 if verdict else i
        cum_i, cum_u = cum_i + i, cum_u + u
        if u == 0:
            ious.append(math.nan if protocol in ("caris", "maskris") else 0.0)
        else:
            ious.append(i / (u + 1e-6) if strict else i / u)
        for tenth in tenths:
            if strict:
                hits[tenth] += ious[-1] > struct.unpack("f", struct.pack("f", tenth / 10))[0]
            else:
                hits[tenth] += u > 0 and 10 * i >= tenth * u
    divide = lambda part, whole: part / whole if whole else math.nan  # noqa: E731
    measured = len(ious) - len(accurate) * (protocol == "rela")
    found = {"cIoU" if protocol == "rela" else "oIoU": divide(cum_i, cum_u)}
    found["gIoU" if protocol == "rela" else "mIoU"] = divide(math.fsum(ious), len(ious))
    found |= {f"P@0.{tenth}": divide(number, measured) for tenth, number in hits.items()}
    if protocol in ("rela", "dmmi"):
        found["N-acc"] = divide(sum(accurate), len(accurate))
    if protocol == "rela":
        found["T-acc"] = divide(sum(targeted), len(targeted))
        if not accurate:
            found["N-acc"] = found["T-acc"] = 0.0
    return found


@st.composite
def evaluations(draw):
    pixels = draw(st.integers(1, 12))
    probability = st.sampled_from([0.0, 0.1, 0.35, 0.36, 0.5, 0.51, 1.0])
    sample = st.tuples(
        st.one_of(st.just([0.0] * pixels), st.lists(probability, min_size=pixels, max_size=pixels)),
        st.one_of(st.just([False] * pixels), st.lists(st.booleans(), min_size=pixels, max_size=pixels)),
        st.booleans(),
        st.booleans(),
    )
    samples = draw(st.lists(sample, min_size=1, max_size=6))
    return draw(st.sampled_from(list(PROTOCOLS))), samples, draw(st.integers(0, len(samples)))


@pytest.mark.fuzz
@settings(max_examples=examples(100), deadline=None)
@given(evaluations())
def test_every_protocol_equals_a_slow_computation(evaluation):
    protocol, samples, cut = evaluation
    predictions, targets, lost, verdicts = (list(column) for column in zip(*samples, strict=True))
    empty = [not any(target) and not gone for target, gone in zip(targets, lost, strict=True)]
    metric = Segmentation(protocol)
    for part in (slice(None, cut), slice(cut, None)):
        options = {"empty": empty[part]} if protocol in ("rela", "dmmi") else {}
        options |= {"predicted_empty": verdicts[part]} if protocol == "rela" else {}
        if targets[part]:
            prediction, target = np.array(predictions[part], np.float32), np.array(targets[part])
            metric.update(torch.from_numpy(prediction)[:, None], target[:, None], **options)
    rounded = [[struct.unpack("f", struct.pack("f", value))[0] for value in each] for each in predictions]
    if protocol in ("cris", "etris", "detris"):  # in float32 the bound is 0.35 rounded, too
        rounded = [[0.35 if value == 0.35 else value for value in each] for each in predictions]
    expected = slowly(protocol, rounded, targets, empty, verdicts)
    found = metric.compute()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-15, abs=0, nan_ok=True), name
