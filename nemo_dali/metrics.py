"""Metrics of referring image segmentation, as the repositories that report them compute them.

    protocol              source                        pixel     IoU of a sample   P@X  a sample without a target
    lavt                  LAVT test.py                  p > 0.5   I / U, 0 if U=0   >=   as any other
    cris, etris, detris   CRIS, ... engine/engine.py    p > 0.35  I / (U + 1e-6)    >    as any other
    cgformer              CGFormer engine/engine.py     p > 0.5   I / (U + 1e-6)    >    as any other
    caris, maskris        CARIS, MaskRIS eval.py        p > 0.5   I / U, NaN if U=0 >=   as any other
    rela                  ReLA refer_evaluation.py      p > 0.5   I / U, 0 if U=0   >=   IoU 1 if found empty, else 0
    dmmi                  DMMI test.py                  p > 0.5   I / U, 0 if U=0   >=   only in N-acc

An argmax over two channels is p > 0.5. Masks are compared at the size they are given in: LAVT itself compares at
480 x 480, CRIS at the photo's size. Metrics logged during training (CRIS's ``trainMetricGPU``) are not covered.

    metric = Segmentation("lavt")
    for ...:
        metric.update(logits.argmax(1), masks)
    print(metric.compute()["oIoU"])

Groups show what a mean hides, for example by the number of similar objects in the photo, or by kind of expression.

        metric.update(logits.argmax(1), masks, groups={"distractors": batch.distractors})
    for distractors, found in metric.compute_groups()["distractors"].items():
        print(distractors, found["samples"], found["mIoU"])
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from nemo_dali._checks import short_repr
from nemo_dali.distributed.ranks import Ranks
from nemo_dali.errors import NemoError

if TYPE_CHECKING:
    import torch

__all__ = ["PROTOCOLS", "Protocol", "Segmentation"]

Group = tuple[str, int | str]  # name and key
Totals = dict[str, int]  # the sums whose quotients are the metrics; those of several ranks can be added up
NoTarget = Literal["ordinary", "rewarded", "apart"]
SAMPLE = np.dtype([("intersection", "<i8"), ("union", "<i8"), ("iou", "<f8")])
UNIT = 2**200  # IoUs are added up as integers, in units of 1 / UNIT: exact for every double from 2**-147 to 1


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a repository measures. The defaults are LAVT's; ``dataclasses.replace`` makes variants.

    Attributes:
        thresholds: the X of P@X, in (0, 1].
        inclusive: P@X counts IoU >= X; else IoU > X.
        epsilon: added to the union of each sample, in [0, 1]; never to the sum of the unions.
        empty_union: IoU where neither prediction nor target has a pixel: 0, 1 or NaN, which makes the mean NaN.
        probability: a pixel is predicted where its probability is larger than this, in [0, 1).
        overshoot: how far probabilities may exceed 0 and 1, as they do after cubic interpolation.
        no_target: samples without a target are "ordinary" ones, whose IoU is 0 (``empty_union`` if nothing is
            predicted); "rewarded" with IoU 1 if found empty, the metrics being gIoU and cIoU; or kept "apart".

    Raises:
        ValueError: an attribute is outside its range.
    """

    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    inclusive: bool = True
    epsilon: float = 0.0
    empty_union: float = 0.0
    probability: float = 0.5
    overshoot: float = 0.0
    no_target: NoTarget = "ordinary"

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("thresholds", all(0 < threshold <= 1 for threshold in self.thresholds), "above 0 and at most 1"),
            ("epsilon", 0 <= self.epsilon <= 1, "between 0 and 1"),
            ("empty_union", self.empty_union in (0, 1) or math.isnan(self.empty_union), "0, 1 or NaN"),
            ("probability", 0 <= self.probability < 1, "at least 0 and below 1"),
            ("overshoot", 0 <= self.overshoot < math.inf, "at least 0 and finite"),
            ("no_target", self.no_target in get_args(NoTarget), f"one of {get_args(NoTarget)}"),
        ):
            if not fine:
                raise ValueError(f"{name} ({getattr(self, name)}) must be {rule}")


# CRIS takes its thresholds from a float32 arange, whose 0.7 and 0.9 are a little less and 0.6 and 0.8 a little more: an
# IoU of exactly 0.7 counts in spite of > where the union has about 60 pixels or more. Its probability maps go through
# two cubic interpolations, those of CGFormer through one; each multiplies distances from 0.5 by up to 1.375**2, the sum
# of its weights' magnitudes. 0.499 instead of 0.5 leaves room for rounding.
_FLOAT32 = tuple(float(np.float32(threshold)) for threshold in Protocol.thresholds)
_CGFORMER = Protocol(thresholds=_FLOAT32, inclusive=False, epsilon=1e-6, overshoot=0.5 * 1.375**2 - 0.499)
_CRIS = replace(_CGFORMER, probability=0.35, overshoot=0.5 * 1.375**4 - 0.499)
_CARIS = Protocol(thresholds=(0.5, 0.7, 0.9), empty_union=math.nan)
PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {"lavt": Protocol(), "cgformer": _CGFORMER}
    | dict.fromkeys(("cris", "etris", "detris"), _CRIS)
    | dict.fromkeys(("caris", "maskris"), _CARIS)
    | {"rela": Protocol(thresholds=(0.7, 0.8, 0.9), no_target="rewarded"), "dmmi": Protocol(no_target="apart")}
)


class Segmentation:
    """The metrics of one evaluation, over all batches and all ranks.

    A sample counts as often as it is given: shards must not be padded (CRIS's validation, and CARIS's during training,
    count padded samples too). Sums are exact, so neither the order nor the number of ranks matters; CARIS and MaskRIS
    round IoUs and sums to float32, which changes P@X for no mask below 1.8 million pixels.

    Args:
        protocol: a key of ``PROTOCOLS``, or a ``Protocol``.

    Raises:
        ValueError: an unknown protocol.
    """

    def __init__(self, protocol: str | Protocol = "lavt") -> None:
        if not isinstance(protocol, Protocol) and protocol not in PROTOCOLS:
            raise ValueError(f"protocol ({protocol!r}) must be a Protocol or one of {tuple(PROTOCOLS)}")
        self.protocol = protocol if isinstance(protocol, Protocol) else PROTOCOLS[protocol]
        self.reset()

    def reset(self) -> None:
        """Forget this rank's samples."""
        self._rows: list[torch.Tensor] = []  # of batches, as ``_count`` and ``_flags`` make them
        self._samples = 0
        self._groups: dict[str, dict[int | str, list[int]]] = {}  # by name and key: which samples

    def update(
        self,
        prediction: Any,
        target: Any,
        empty: Any = None,
        *,
        predicted_empty: Any = None,
        groups: Mapping[str, Any] | None = None,
    ) -> None:
        """Count samples. Where all arguments are on a GPU, this does not wait for it.

        Args:
            prediction: torch tensor or NumPy array [B, H, W], or a list of [H, W], possibly of several sizes: bool or
                integer in {0, 1}, or floating-point probabilities in [0, 1].
            target: likewise, of the same sizes, in {0, 1}; it is moved to the prediction's device.
            empty: bool [B], whether the annotation has no target; None: where the mask has no pixel. Not for protocols
                that treat such samples like any other.
            predicted_empty: bool [B], whether the model predicts no target (ReLA's ``nt_label``), whatever mask it
                gives; None: where the mask has no pixel. Only for protocols that reward it.
            groups: for ``compute_groups``: the key of each sample, B integers or strings in host memory, by the name
                of the grouping.

        Raises:
            ValueError: shapes or types that do not fit, a value outside its range, NaN, a target with pixels that is
                marked empty, too few keys. Values on a GPU are only checked in ``compute``.
        """
        import torch

        if empty is not None and self.protocol.no_target == "ordinary":
            raise ValueError("empty (given) must be None for a protocol that treats no-target samples like any other")
        if predicted_empty is not None and self.protocol.no_target != "rewarded":
            raise ValueError("predicted_empty (given) must be None for a protocol that uses masks only")
        predictions, targets = _batches("prediction", prediction), _batches("target", target)
        shapes, others = ([list(batch.shape) for batch in batches] for batches in (predictions, targets))
        if shapes != others:
            numbers = f"{len(shapes)} masks", f"{len(others)} masks"
            one, other = next((pair for pair in zip(shapes, others, strict=False) if pair[0] != pair[1]), numbers)
            raise ValueError(f"target ({other}) must have the shape of prediction ({one})")
        count = sum(len(batch) for batch in predictions)
        keys = {name: _keys(name, given, count) for name, given in (groups or {}).items()}
        if not predictions:
            return
        counts = torch.cat([_count(*pair, self.protocol) for pair in zip(predictions, targets, strict=True)])
        flags = _flags("empty", empty, counts), _flags("predicted_empty", predicted_empty, counts)
        rows = torch.cat([counts, *flags], dim=1)
        if rows.device.type == "cpu":
            _check(rows.numpy(), self._samples)
        for name, its in keys.items():
            members = self._groups.setdefault(name, {})
            for sample, key in enumerate(its, self._samples):
                members.setdefault(key, []).append(sample)
        self._rows.append(rows)
        self._samples += len(rows)

    def compute(self) -> dict[str, float]:
        """The metrics, from 0 to 1, of all samples so far; of all ranks if torch.distributed is initialised.

        All ranks must call it (with NCCL, each on its ``torch.cuda.device``), and each gets the result.

        Returns:
            "oIoU", "mIoU" and "P@0.5" etc.; for DMMI also "N-acc", the share of samples without a target whose mask is
            empty. For ReLA "cIoU", "gIoU", "P@0.7" etc. of the samples with a target, "N-acc", and "T-acc", the share
            of samples with a target that are not found empty; both accuracies are 0 where every sample has a target
            (ReLA's first release had other formulas for them). CRIS and ETRIS themselves print no oIoU. NaN where there
            is nothing to divide by.

        Raises:
            ValueError: see ``update``; ``reset`` forgets such samples.
            NemoError: no rank has a sample; ranks have different protocols; another rank failed.
        """
        total = self._of_all_ranks()[None]
        if not total["samples"]:
            raise NemoError("There is nothing to measure: no rank has a sample. Call update() before compute().")
        metrics = _metrics(total, self.protocol)
        if "T-acc" in metrics and not total["no_target"]:
            metrics |= {"N-acc": 0.0, "T-acc": 0.0}
        return metrics

    def compute_groups(self) -> dict[str, dict[int | str, dict[str, float]]]:
        """For each group, what ``compute`` gives and "samples", their number: by the name of the grouping, then by key.

        All ranks must call it, and each gets the groups of all of them, integers in order before strings. Empty if no
        update had ``groups``; else it raises what ``compute`` does. ReLA's zeros apply only to all samples together.
        """
        total, found = self._of_all_ranks(), dict[str, dict[int | str, dict[str, float]]]()
        groups = [group for group in total if group is not None]
        for name, key in sorted(groups, key=lambda group: (group[0], isinstance(group[1], str), group[1])):
            its = total[name, key]
            found.setdefault(name, {})[key] = {"samples": its["samples"]} | _metrics(its, self.protocol)
        return found

    def per_sample(self) -> npt.NDArray[np.void]:
        """What was counted for each of this rank's samples, in the order in which they were given.

        A structured array [samples]: ``intersection`` and ``union`` int64, in pixels, and ``iou`` float64, as the
        protocol counts them; NaN for a sample that is kept apart, or whose IoU has no value. Raises as ``update`` does.
        """
        counted = _counted(self._all_rows(), self.protocol)
        samples = np.empty(len(counted.iou), SAMPLE)
        samples["intersection"], samples["union"] = counted.intersection, counted.union
        samples["iou"] = np.where(counted.measured, counted.iou, math.nan)
        return samples

    def _of_all_ranks(self) -> dict[Group | None, Totals]:
        """The totals of every group, and of all samples under the key None."""
        import torch.distributed as distributed

        joined = distributed.is_available() and distributed.is_initialized()
        ranks = Ranks(distributed.group.WORLD if joined else None)
        mine = ranks.attempt(self._totals)
        ranks.agree({"protocol": self.protocol}, "computed metrics")
        added = dict[Group | None, Totals]()
        for group, total in (item for one in ranks.share(mine) for item in one.items()):
            added[group] = {name: added.get(group, {}).get(name, 0) + number for name, number in total.items()}
        return added

    def _totals(self) -> dict[Group | None, Totals]:
        rows = self._all_rows()
        its: dict[Group | None, Any] = {
            (name, key): i for name, keys in self._groups.items() for key, i in keys.items()
        }
        return {group: _totals(rows[samples], self.protocol) for group, samples in {None: slice(None), **its}.items()}

    def _all_rows(self) -> npt.NDArray[np.float64]:
        import torch

        rows = torch.cat([each.to(self._rows[0].device) for each in self._rows] or [torch.empty(0, 7)]).cpu().numpy()
        _check(rows, 0)
        return rows


def _batches(name: str, masks: Any) -> "list[torch.Tensor]":
    """Tensors [B, H, W]; for a list of [H, W], one [1, H, W] each."""
    import torch

    listed = isinstance(masks, list | tuple)
    batches = []
    for mask in masks if listed else [masks]:
        if not isinstance(mask, torch.Tensor):
            if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biuf":
                kind = getattr(mask, "dtype", type(mask).__name__)
                raise ValueError(f"{name} ({kind}) must be torch tensors or NumPy arrays, bool, integer or floating")
            mask = torch.from_numpy(np.require(mask, requirements=["C", "W"]))  # torch takes no negative strides
        if mask.ndim != 3 - listed or 0 in mask.shape[-2:]:
            expected = "a list of [H, W]" if listed else "[B, H, W]"
            raise ValueError(f"{name} ({list(mask.shape)}) must be {expected}, neither H nor W 0")
        batches.append(mask.detach()[None] if listed else mask.detach())
    return batches


def _count(prediction: "torch.Tensor", target: "torch.Tensor", protocol: Protocol) -> "torch.Tensor":
    """Pixels in both, in the prediction, in the target; a value of each that is not allowed, or 0: float64 [B, 5]."""
    import torch

    predicted, stray = _pixels(prediction, protocol)
    wanted, stray_target = _pixels(target.to(prediction.device), None)
    counts = [mask.flatten(1).count_nonzero(1) for mask in (predicted & wanted, predicted, wanted)]  # exact below 2**53
    return torch.stack([column.double() for column in (*counts, stray, stray_target)], dim=1)


def _pixels(mask: "torch.Tensor", protocol: Protocol | None) -> "tuple[torch.Tensor, torch.Tensor]":
    """The mask as bool [B, H, W]; for each sample a value that is not allowed, or 0: float64 [B]."""
    import torch

    if mask.dtype == torch.bool:
        return mask, mask.new_zeros(len(mask), dtype=torch.float64)
    if mask.dtype != torch.float64:
        mask = mask.float() if mask.is_floating_point() else mask.long()  # float16 would round the protocol's numbers
    inside, least, most = mask == 1, 0.0, 1.0
    if protocol is not None and mask.is_floating_point():
        inside, least, most = mask > protocol.probability, -protocol.overshoot, 1 + protocol.overshoot
    elif mask.is_floating_point():
        mask, most = mask.masked_fill(inside, 0), 0.0
    low, high = mask.flatten(1).amin(1).double(), mask.flatten(1).amax(1).double()  # NaN if one pixel is
    return inside, torch.where(high > most, high, torch.where(low >= least, 0, low))


def _flags(name: str, given: Any, counts: "torch.Tensor") -> "torch.Tensor":
    """Float64 [B, 1]: 0 or 1, or -1 if nothing is given."""
    import torch

    if given is None:
        return counts.new_full((len(counts), 1), -1)
    flags = torch.as_tensor(given)
    if flags.dtype != torch.bool or flags.shape != (len(counts),):
        raise ValueError(f"{name} ({flags.dtype}, {list(flags.shape)}) must be bool [{len(counts)}]")
    return flags.to(counts.device, counts.dtype)[:, None]


def _keys(name: str, given: Any, count: int) -> list[int | str]:
    keys = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(keys, list | tuple) and len(keys) == count:
        keys = [key.item() if isinstance(key, np.generic) else key for key in keys]
        if all(type(key) in (int, str) for key in keys):
            return keys
    raise ValueError(f"groups[{name!r}] ({short_repr(keys)}) must be an integer or string for each of {count} samples")


def _check(rows: npt.NDArray[np.float64], first: int) -> None:
    """Raise a ValueError for the first value that is not allowed; rows are samples from number ``first`` on."""
    for name, column, rule in (
        ("prediction", 3, "0 or 1, or probabilities: logits take a sigmoid first"),
        ("target", 4, "0 or 1"),
    ):
        for row in np.flatnonzero(rows[:, column]):  # NaN is not 0
            raise ValueError(f"{name} ({rows[row, column]:g} in sample {first + row}) must be {rule}")
    for row in np.flatnonzero((rows[:, 5] == 1) & (rows[:, 2] > 0)):
        raise ValueError(f"empty (True for sample {first + row}) must be False where the target has pixels")


class Counted(NamedTuple):  # arrays [samples], as a protocol sees them
    intersection: npt.NDArray[np.int64]
    union: npt.NDArray[np.int64]
    iou: npt.NDArray[np.float64]
    measured: npt.NDArray[np.bool_]  # whether the IoU counts
    no_target: npt.NDArray[np.bool_]
    found_empty: npt.NDArray[np.bool_]


def _counted(rows: npt.NDArray[np.float64], protocol: Protocol) -> Counted:
    intersection, predicted, target = rows[:, :3].astype(np.int64).T
    union = predicted + target - intersection
    rewarded = protocol.no_target == "rewarded"
    no_target = np.where(rows[:, 5] < 0, target == 0, rows[:, 5] == 1) & (protocol.no_target != "ordinary")
    found_empty = np.where(rows[:, 6] < 0, predicted == 0, rows[:, 6] == 1)
    right = no_target & found_empty
    if rewarded:  # a mask that comes with the verdict "no target" cannot hit, but its pixels still count as misses
        intersection, union = np.where(found_empty, 0, intersection), np.where(right, 0, union)
    with np.errstate(invalid="ignore"):
        iou = intersection / (union + protocol.epsilon)
    iou = np.where(union > 0, iou, np.where(right, 1.0, protocol.empty_union))
    return Counted(intersection, union, iou, ~no_target | rewarded, no_target, found_empty)


def _totals(rows: npt.NDArray[np.float64], protocol: Protocol) -> Totals:
    intersection, union, iou, measured, no_target, found_empty = _counted(rows, protocol)
    defined = measured & ~np.isnan(iou)
    hits = {x: iou >= x if protocol.inclusive else iou > x for x in protocol.thresholds}
    return {
        "samples": len(rows),
        "intersection": int(intersection[measured].sum()),
        "union": int(union[measured].sum()),
        "iou": sum(int(each * float(UNIT)) for each in iou[defined].tolist()),
        "undefined": int((measured & ~defined).sum()),
        "measured": int(measured.sum()),
        "targeted": int((~no_target).sum()),
        "found": int((~no_target & ~found_empty).sum()),
        "no_target": int(no_target.sum()),
        "found_empty": int((no_target & found_empty).sum()),
    } | {f"P@{x}": int((hit & ~no_target).sum()) for x, hit in hits.items()}


def _metrics(total: Totals, protocol: Protocol) -> dict[str, float]:
    """The metrics that ``Segmentation.compute`` describes."""
    rewarded = protocol.no_target == "rewarded"
    overall, mean = ("cIoU", "gIoU") if rewarded else ("oIoU", "mIoU")
    metrics = {
        overall: _ratio(total["intersection"], total["union"]),
        mean: math.nan if total["undefined"] else _ratio(total["iou"], total["measured"] * UNIT),  # rounded once
    }
    metrics |= {f"P@{x:g}": _ratio(total[f"P@{x}"], total["targeted"]) for x in protocol.thresholds}
    if protocol.no_target != "ordinary":
        metrics["N-acc"] = _ratio(total["found_empty"], total["no_target"])
    return metrics | ({"T-acc": _ratio(total["found"], total["targeted"])} if rewarded else {})


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
