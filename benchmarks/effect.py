"""Does it help? Trains the arms of the study in docs/effect.md, and measures what each learnt.

    python benchmarks/effect.py --work DIR --seconds 1500    start missing runs, one after another, until then; repeat
                                                             until all are done
    python benchmarks/effect.py --work DIR --arms single --seeds 1    only these
    python benchmarks/effect.py --work DIR --study larger    the runs of a follow-up, on the same photos and tables

An interrupted run continues from its last epoch. Each run is appended to benchmarks/results/effect.json with its
revision, seed and time; ``effect_report.py`` makes docs/effect.md's tables and figures from that. ``--jobs N`` runs N
at once, each with a share of the cores; a different number of threads gives different last bits, and training
amplifies the difference.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, revision
from effect_data import EVALUATION, Asked, Files, described, policy_of, prepare
from effect_numbers import chosen, recorded, value
from effect_study import STUDIES
from pycocotools import mask as coco_mask

from nemo_dali.commands.bench import machine, versions
from nemo_dali.loader.loader import Loader
from nemo_dali.metrics import Segmentation
from nemo_dali.plan.policy import MosaicPolicy, read_policy

sys.path.append(str(ROOT / "examples"))
from train_ris import WORDS, Training, save


def train(name: str, seed: int, files: Files, threads: int) -> dict[str, Any]:
    """Train one run, from its last checkpoint if there is one, and measure what it learnt."""
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_flash_sdp(False)  # on CPUs it takes a quarter of a step with so few positions
    started = time.monotonic()
    study = files.study
    arm = study.arms[name]
    common: dict[str, Any] = {
        "batch_size": study.batch_size,
        "size": study.size,
        "context_length": WORDS,
        "num_threads": threads,
    }
    loader = Loader(
        files.dataset("training"),
        files.table(arm),
        policy=policy_of(arm, files),
        seed=seed,
        tiles=files.tiles("training"),
        **common,
    )
    per_epoch = len(loader)
    steps = study.epochs * per_epoch
    training = Training(
        torch.device("cpu"), learning_rate=study.learning_rate, steps=steps, warm_up=study.warm_up, seed=seed
    )
    path = files.checkpoint(name, seed)
    path.parent.mkdir(exist_ok=True)
    before, losses = 0.0, []
    if path.exists():
        saved = torch.load(path, weights_only=True)
        training.load_state_dict(saved["training"])
        before = saved["seconds"]
    for epoch in range(training.step // per_epoch, study.epochs):
        loader.set_epoch(epoch)
        losses = [training.learn(batch) for batch in loader]
        save(path, {"training": training.state_dict(), "seconds": before + time.monotonic() - started})
    loader.close()
    return {
        "arm": name,
        "seed": seed,
        "steps": training.step,
        "samples": training.step * study.batch_size,
        "loss": float(torch.stack(losses).mean()) if losses else math.nan,
        **measure(training, files, common),
        "seconds": round(before + time.monotonic() - started),
        "threads": threads,
    }


@torch.inference_mode()
def measure(training: Training, files: Files, common: dict[str, Any]) -> dict[str, Any]:
    """What a trained model finds, on single photos and on mosaics whose negatives show nothing that fits."""
    training.segmenter.eval()
    mosaics = MosaicPolicy(p_mined=1.0, top_k=read_policy(files.policy)[0].difficulty(0).top_k)
    found: dict[str, Any] = {"single": [], "mosaic": [], "masks": {}}
    for part, (name, policy) in itertools.product(
        EVALUATION, (("single", MosaicPolicy(p_mined=0)), ("mosaic", mosaics))
    ):
        asked, metric, sentences = Asked.of(files, part), Segmentation("lavt"), []
        loader = Loader(
            files.dataset(part),
            files.negatives(part, "unfitting"),
            policy=policy,
            tiles=files.tiles(part),
            samples="first",
            drop_last=False,
            **common,
        )
        for batch in loader:
            new = batch.plan["position"] < asked.refs  # the last batch is filled up with the first samples
            predicted, target = (training.predict(batch) > 0)[new], batch.mask[new]
            metric.update(predicted, target)
            sentences.append(batch.plan["sentence"][new])
            if (part, name) == ("hard", "single"):
                rows = zip(sentences[-1].tolist(), predicted, target, strict=True)
                found["masks"] |= {str(row): kept(*masks) for row, *masks in rows if row in asked.shown}
        loader.close()
        found[name] += totals(metric.per_sample(), np.concatenate(sentences), asked)
    return found


def kept(predicted: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    """What the figure of scenes shows of a sample: both masks, as COCO's compressed run lengths, and their IoU."""
    both, either = (predicted & (target > 0)).sum(), (predicted | (target > 0)).sum()
    counts = [
        coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"].decode()
        for mask in (predicted, target)
    ]
    return {"found": counts[0], "target": counts[1], "iou": float(both / either)}


def totals(samples: Any, sentences: np.ndarray, asked: Asked) -> list[dict[str, Any]]:
    """Sums over the sentences of each kind with each number of distractors; all metrics are quotients of these."""
    kinds, distractors = asked.kind[sentences], asked.distractors[sentences]
    found = []
    for kind, name in enumerate(asked.kind_names):
        for number in np.unique(distractors).tolist():
            here = samples[(kinds == kind) & (distractors == number)]
            if len(here):
                found.append({
                    "kind": name,
                    "distractors": number,
                    "samples": len(here),
                    "hits": int((here["iou"] >= 0.5).sum()),
                    "misses": int((here["iou"] < 0.1).sum()),
                    "iou": float(here["iou"].sum()),
                    "intersection": int(here["intersection"].sum()),
                    "union": int(here["union"].sum()),
                })  # fmt: skip
    return found


# --- the runs of a study ----------------------------------------------------------------------------------------------


def begin(files: Files, path: Path) -> dict[str, Any]:
    """The record so far, or a new one."""
    study = files.study
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text())
        if record["design"] != study.digest():
            raise SystemExit(
                f"{path} holds runs of another design ({record['design']}). Move it away, or give --record."
            )
        return record
    return {
        "design": study.digest(),
        "study": asdict(study),
        "machine": machine(),
        "versions": versions(),
        "data": described(files),
        "runs": [],
    }


def keep(path: Path, record: dict[str, Any], run: dict[str, Any]) -> None:
    """Append a run to the record; the file is complete at all times."""
    record["runs"].append(run)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def run_all(files: Files, options: argparse.Namespace) -> None:
    """Start runs that the record lacks until the time is up; runs already started are finished."""
    record = begin(files, options.record)
    done = {(run["arm"], run["seed"]) for run in record["runs"]}
    missing = [(arm, seed) for seed in options.seeds for arm in options.arms if (arm, seed) not in done]
    threads = max(len(os.sched_getaffinity(0)) // options.jobs, 1)
    until, of = time.monotonic() + options.seconds, revision()
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: set[Future[dict[str, Any]]] = set()
        while missing or running:
            while missing and len(running) < options.jobs and time.monotonic() < until:
                running.add(pool.submit(train, *missing.pop(0), files, threads))
            if not running:
                print(f"{len(missing)} runs are left; the same command goes on with them.")
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for run in (future.result() for future in ended):
                keep(options.record, record, run | {"revision": of, "cpu": machine()["cpu"]})
                hard = value(chosen(run, "single", hard=True), "P@0.5")
                print(
                    f"{run['arm']}, seed {run['seed']}: P@0.5 on hard samples {hard:.1f}, {run['seconds']} s",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the files, some 500 MB, and of checkpoints")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further run after so long")
    parser.add_argument("--study", choices=STUDIES, default="main", help="or a follow-up of it, see effect_study.py")
    parser.add_argument("--arms", nargs="+", help="default: all of the study")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the study")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--record", type=Path, help="default: the study's, in benchmarks/results")
    options = parser.parse_args()
    study = STUDIES[options.study]
    options.arms, options.seeds = options.arms or list(study.arms), options.seeds or study.seeds
    options.record = options.record or recorded(options.study)
    if unknown := set(options.arms) - set(study.arms):
        parser.error(f"the study {options.study} has no arm {min(unknown)}; --arms takes {', '.join(study.arms)}")
    run_all(prepare(study, options.work), options)


if __name__ == "__main__":
    main()
