"""Which mining rule keeps false negatives out, on generated photos whose truth is known.

    python benchmarks/mining_rules.py FOLDER               a few minutes of training first, which FOLDER keeps
    python benchmarks/mining_rules.py FOLDER --images 600 --steps 400

A negative is *false* if it shows a thing that the sentence's own words fit: kind, colour and size, wherever it is. The
pool of a sentence is the first K photos that a rule leaves, by falling similarity, and each of them is drawn equally
often. A rule's bound is moved from where it leaves everything to where it leaves a fifth, which gives a curve of two
shares of what is drawn: photos with a thing of the target's kind (how hard the pool is) and false negatives. Rules are
compared where their curves have the same hardness, and the difference from tau is given with a 95 % interval by
resampling the photos of the sentences. Sets of sentences are added to mining_rules.json.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import RESULTS, revision
from mining_rules_data import CLIPS, SETS, Data, Embedded, prepare

from nemo_dali.commands.bench import machine, versions
from nemo_dali.mining.said import Said
from nemo_dali.mining.tune import PASSING

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

POINTS = 32  # of a curve
LARGEST_SHARE = 0.8  # of the photos that a bound leaves out, at most
RESAMPLED = 100
HARDNESS = (0.3, 0.5, 0.7)
MARGINS = (0.0, 0.1)
KEPT = ("tau", "crops, below own", "things, below own photo's best")  # rules whose curves are written
COMPARED = ("whole", "windows")  # the CLIPs whose tables are compared


class Trial:
    """Some sentences and all photos: int [n] rows, and bool [n, M] what holds for each pair."""

    def __init__(self, data: Data, sentences: int) -> None:
        dataset = data.dataset
        every = len(dataset.sentences.ref)
        self.data = data
        self.rows = np.unique(np.linspace(0, every - 1, min(sentences, every)).astype(np.int64))
        self.ref = dataset.sentences.ref[self.rows]
        self.own = dataset.refs.image[self.ref]
        self.category = dataset.refs.category[self.ref]
        self.photos = len(dataset.images.id)
        self.weight = 1.0 / dataset.refs.sentence_count[self.ref]
        photos = np.arange(self.photos)
        self.fits = np.stack([data.truth.fits_words(np.full(self.photos, row), photos) for row in self.rows])
        self.shown = dataset.shown_categories()[:, self.category].T

    def of_own(self, similarity: F32) -> F32:
        """[n, 1]: the similarity of each sentence's own photo."""
        return similarity[np.arange(len(self.rows)), self.own, None]

    def beyond_own(self, similarity: F32) -> F32:
        """How much more similar each photo is than the sentence's own."""
        return similarity - self.of_own(similarity)


Rule = tuple[str, F32, F32]  # its name, similarities that photos are ranked by, and what is bounded, [n, M] each


def every_rule(trial: Trial, name: str) -> Iterator[Rule]:
    """All rules for a table of one CLIP; tau first."""
    clip = trial.data.clips[name]
    similarity = clip.text[trial.rows] @ clip.photo.T
    yield "tau", similarity, similarity
    yield "below own", similarity, trial.beyond_own(similarity)
    yield from siblings(trial, clip, similarity)
    yield "sentences alike", similarity, alike(trial, clip)
    if name == "whole":
        yield from two_models(trial, similarity)
    yield from of_crops(trial, clip, similarity)
    yield "the truth", similarity, trial.fits.astype(np.float32)


def two_models(trial: Trial, similarity: F32) -> Iterator[Rule]:
    """The veto of a second model of the same kind, and the average of both."""
    second = trial.data.clips["second"]
    other = second.text[trial.rows] @ second.photo.T
    spread = float(similarity.std()), float(other.std())
    yield "veto of a second model, absolute", similarity, np.maximum(similarity / spread[0], other / spread[1])
    margins = trial.beyond_own(similarity) / spread[0], trial.beyond_own(other) / spread[1]
    yield "veto of a second model, below own", similarity, np.maximum(*margins)
    mean = (similarity + other) / 2
    yield "average of two models, tau", mean, mean
    yield "average of two models, below own", mean, trial.beyond_own(mean)


def siblings(trial: Trial, clip: Embedded, similarity: F32) -> Iterator[Rule]:
    """Bounds on what the sentences of a ref find: the others, and all including the sentence itself."""
    refs = trial.data.dataset.refs
    others, others_beyond = (np.full_like(similarity, -9) for _ in range(2))
    every, every_beyond = similarity.copy(), trial.beyond_own(similarity)
    for place, (row, ref) in enumerate(zip(trial.rows, trial.ref, strict=True)):
        begin = int(refs.sentence_begin[ref])
        for sibling in range(begin, begin + int(refs.sentence_count[ref])):
            if sibling != row:
                found = clip.photo @ clip.text[sibling]
                np.maximum(others[place], found, out=others[place])
                np.maximum(others_beyond[place], found - found[trial.own[place]], out=others_beyond[place])
        np.maximum(every[place], others[place], out=every[place])
        np.maximum(every_beyond[place], others_beyond[place], out=every_beyond[place])
    yield "siblings, absolute", similarity, others
    yield "siblings, below own", similarity, others_beyond
    yield "tau for all sentences of the ref", similarity, every
    yield "below own for all sentences of the ref", similarity, every_beyond


def of_crops(trial: Trial, clip: Embedded, similarity: F32) -> Iterator[Rule]:
    """Bounds on the best of a photo's crops: those of its things, and those of a grid."""
    text = clip.text[trial.rows]
    things = text @ clip.thing.T
    begins = np.searchsorted(trial.data.thing_photo, np.arange(trial.photos))
    target = things[np.arange(len(things)), trial.data.target[trial.ref], None]
    best = np.maximum.reduceat(things, begins, axis=1)
    yield "things, absolute", similarity, best
    yield "things, below target", similarity, best - target
    yield "things, below own photo's best", similarity, trial.beyond_own(best)
    things[trial.data.thing_category != trial.category[:, None]] = -9
    yield "things of the category, below target", similarity, np.maximum.reduceat(things, begins, axis=1) - target
    del things
    crops = (text @ clip.crop.reshape(-1, clip.crop.shape[-1]).T).reshape(len(text), trial.photos, -1)
    for what, best in (
        ("2x2 crops", crops[:, :, :4].max(axis=2)),
        ("3x3 crops", crops[:, :, 4:].max(axis=2)),
        ("crops", crops.max(axis=2)),
        ("crops and the whole", np.maximum(crops.max(axis=2), similarity)),
    ):
        yield f"{what}, absolute", similarity, best
        yield f"{what}, below own", similarity, trial.beyond_own(best)
    beyond = trial.beyond_own(crops.max(axis=2))
    for margin in MARGINS:
        yield (
            f"tau behind --exclude-crops {margin:g}",
            similarity,
            np.where(beyond > -margin, np.float32(9), similarity),
        )


def alike(trial: Trial, clip: Embedded) -> F32:
    """[n, M]: how similar a sentence is to the most similar one of each photo."""
    dataset = trial.data.dataset
    begins = np.searchsorted(dataset.refs.image[dataset.sentences.ref], np.arange(trial.photos))
    most: F32 = np.maximum.reduceat(clip.text[trial.rows] @ clip.text.T, begins, axis=1)
    return most


def curve(trial: Trial, ranked: F32, bounded: F32, k: int) -> tuple[F64, F64, F64, F64]:
    """Bounds [T], and per bound and sentence [T, n] the pool's size, and the shares of it that are hard and false."""
    ranked = ranked.copy()
    ranked[np.arange(len(ranked)), trial.own] = -np.inf
    order = np.argsort(-ranked, axis=1)[:, :-1]
    values, shown, fits = (np.take_along_axis(array, order, axis=1) for array in (bounded, trial.shown, trial.fits))
    flat = np.sort(values, axis=None)
    out = np.geomspace(1, LARGEST_SHARE * trial.photos, POINTS - 1) * len(values)
    bounds = np.array([np.inf, *flat[(len(flat) - 1 - out).astype(np.int64)]])
    found = np.zeros((3, len(bounds), len(values)))
    for place, bound in enumerate(bounds):
        left = values <= bound
        pool = left & (np.cumsum(left, axis=1, dtype=np.int16) <= k)
        size = pool.sum(axis=1)
        found[:, place] = size, (pool & shown).sum(axis=1), (pool & fits).sum(axis=1)
    found[1:] /= np.maximum(found[0], 1)
    return bounds, found[0], found[1], found[2]


def shares(size: F64, share: F64, weights: F64) -> F64:
    """[B, T]: means over the sentences that have a pool, weighted by ``weights`` [B, n]."""
    some = (size > 0).astype(float)
    mean: F64 = weights @ (share * some).T / np.maximum(weights @ some.T, 1e-9)
    return mean


def at(hardness: F64, rate: F64, wanted: float) -> F64:
    """[B]: the rates where a curve, from its open end on, first comes down to a hardness; NaN if it never does."""
    found = np.full(len(hardness), np.nan)
    for row, (hard, false) in enumerate(zip(hardness, rate, strict=True)):
        below = np.flatnonzero(hard <= wanted)
        if below.size and below[0] > 0:
            end = below[0]
            part = (hard[end - 1] - wanted) / (hard[end - 1] - hard[end])
            found[row] = false[end - 1] + part * (false[end] - false[end - 1])
    return found


def compare(trial: Trial, name: str, ks: list[int]) -> dict[str, Any]:
    """For each K, rule and hardness the rate of false negatives in one CLIP's table, and the difference from tau's."""
    random = np.random.default_rng(0)
    _, group = np.unique(trial.own, return_inverse=True)
    groups = int(group.max()) + 1
    drawn = random.multinomial(groups, np.full(groups, 1 / groups), RESAMPLED)[:, group]
    weights = np.concatenate([np.ones((1, len(group))), drawn]) * trial.weight
    found: dict[str, Any] = {str(k): {} for k in ks}
    by_tau: dict[int, list[F64]] = {}
    tuned: dict[int, float] = {}  # the hardness at the tau that a quarter of the own photos do not exceed
    for rule, ranked, bounded in every_rule(trial, name):
        for k in ks:
            bounds, size, shown, false = curve(trial, ranked, bounded, k)
            hardness, rate = shares(size, shown, weights), shares(size, false, weights)
            if k not in by_tau:
                tuned[k] = at(bounds[None], hardness[:1], float(np.quantile(trial.of_own(ranked), PASSING)))[0]
            wanted = {**{str(value): value for value in HARDNESS}, "tuned": float(tuned[k])}
            rates = [at(hardness, rate, value) for value in wanted.values()]
            reference = by_tau.setdefault(k, rates)
            found[str(k)][rule] = {
                "without_bound": _rounded(hardness[0, 0], rate[0, 0]),
                "at": {name: _point(*pair) for name, *pair in zip(wanted, rates, reference, strict=True)},
                "tuned": _rounded(tuned[k])[0],
            }
            if rule in KEPT:
                points = zip(bounds[1:], hardness[0, 1:], rate[0, 1:], strict=True)
                found[str(k)][rule]["curve"] = [_rounded(*point) for point in points]
            print(k, rule, found[str(k)][rule]["at"], flush=True)
    return found


def known(trial: Trial, name: str, ks: list[int]) -> list[dict[str, float]]:
    """What ``tune`` says about false negatives and the truth, at taus that let a share of the own photos pass."""
    clip, said = trial.data.clips[name], Said(trial.data.dataset)
    similarity = clip.text[trial.rows] @ clip.photo.T
    told = np.zeros(trial.fits.shape, bool)
    sayable, every = np.zeros(len(told), bool), np.ones(len(told), bool)
    for place, row in enumerate(trial.rows.tolist()):
        if (photos := said.photos(row)) is not None:
            told[place, photos], sayable[place] = True, True
    own = trial.of_own(similarity)[:, 0]
    order = np.argsort(-np.where(np.arange(trial.photos) == trial.own[:, None], -9, similarity), axis=1)[:, :-1]
    values = np.take_along_axis(similarity, order, axis=1)
    found = []
    for passing in (1.0, 0.5, 0.25, 0.1, 0.05):
        left = values <= (np.quantile(own, passing) if passing < 1 else np.inf)
        for k in ks:
            pool = left & (np.cumsum(left, axis=1) <= k)
            shares_of = [
                (pool & np.take_along_axis(array, order, axis=1))[some].sum() / pool[some].sum()
                for array, some in ((told, sayable), (trial.fits, every), (trial.shown, every))
            ]
            names = ("passing", "top_k", "told", "false", "shown")
            found.append(dict(zip(names, (passing, k, *(round(float(share), 4) for share in shares_of)), strict=True)))
    return found


def _rounded(*values: float) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def _point(rate: F64, reference: F64) -> dict[str, Any] | None:
    if np.isnan(rate[0]):
        return None
    difference = rate - reference
    return {
        "rate": round(float(rate[0]), 4),
        "difference": _rounded(difference[0])[0],
        "interval": _rounded(*np.nanquantile(difference[1:], (0.025, 0.975))),
    }


def described(trial: Trial) -> dict[str, Any]:
    """What the sentences and the models are like."""

    def mean(share: npt.NDArray[np.bool_]) -> float:
        return round(float(np.average(share.mean(axis=1), weights=trial.weight)), 4)

    both = trial.fits.sum(axis=1) / np.maximum(trial.shown.sum(axis=1), 1)
    found: dict[str, Any] = {
        "photos": trial.photos,
        "sentences": len(trial.rows),
        "shown_by_chance": mean(trial.shown),
        "false_by_chance": mean(trial.fits),
        "false_of_the_shown": round(float(np.average(both, weights=trial.weight)), 4),
    }
    for name in CLIPS:
        clip = trial.data.clips[name]
        similarity = clip.text[trial.rows] @ clip.photo.T
        rank = (similarity > trial.of_own(similarity)).sum(axis=1) + 1
        found[name] = {"median_rank": float(np.median(rank)), "recall_at_10": round(float((rank <= 10).mean()), 4)}
    return found


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for photos, models and embeddings, which are kept")
    parser.add_argument("--training-images", type=int, default=2000, help="generated for the models' training")
    parser.add_argument("--images", type=int, default=1400, help="generated to try the rules on")
    parser.add_argument("--steps", type=int, default=1200, help="of each model's training")
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS], help="kinds of expressions")
    parser.add_argument("--sentences", type=int, default=2000, help="that the rules are tried on")
    parser.add_argument("--top-k", type=int, nargs="+", default=[100, 20])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    measured = revision()  # before the results change the tree
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "mining_rules.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    config = {name: value for name, value in vars(options).items() if name not in ("output", "folder", "sets")}
    for kinds in options.sets:
        sizes = {"training_images": options.training_images, "images": options.images}
        trial = Trial(prepare(options.folder, kinds, steps=options.steps, **sizes), options.sentences)
        found: dict[str, Any] = {"data": described(trial), "rules": {}, "known": {}}
        print(kinds, json.dumps(found["data"]), flush=True)
        for name in COMPARED:
            found["rules"][name] = compare(trial, name, options.top_k)
            found["known"][name] = known(trial, name, options.top_k)
        result[kinds] = found | {
            "config": config,
            "machine": machine(),
            "versions": versions(),
            "revision": measured,
        }
        lists = re.compile(r"\[[^][{}]*\]")  # of numbers, a line each
        path.write_text(lists.sub(lambda found: re.sub(r"\s+", "", found[0]), json.dumps(result, indent=1)) + "\n")


if __name__ == "__main__":
    main()
