"""The command ``nemo-dali``. Exit codes: 0 done, 1 failed with a one-line reason, 2 wrong usage."""

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_dali._version import __version__
from nemo_dali.errors import NemoError, ToldElsewhere
from nemo_dali.plan.policy import MosaicPolicy, read_policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    run: Callable[[argparse.Namespace], None] = options.run
    try:
        run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: no complaint at exit either
    except ToldElsewhere:
        return 1
    except NemoError as error:
        print(f"nemo-dali: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        options.parser.error(str(error))
    except (OSError, MemoryError) as error:  # the system's own refusals
        print(f"nemo-dali: {error or 'out of memory'}. Free what is short, or ask for less.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nemo-dali: interrupted; files under their real names are complete", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-dali", description="NeMo mosaics inside a DALI pipeline.")
    parser.add_argument("--version", action="version", version=f"nemo-dali {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str, into: Any = commands) -> Any:
        sub = into.add_parser(name, help=text, description=text)
        sub.add_argument("--verbose", action="store_true", help="log what is done")
        sub.set_defaults(run=run, parser=sub)
        return sub

    demo = command("demo", _demo, "the whole way on generated data, ending in a picture")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")

    synth = command("synth", _synth, "generate a data set in the layout of a published one")
    synth.add_argument("folder", type=Path, metavar="DIR")
    synth.add_argument("--images", type=int, default=500)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument(
        "--layout", choices=["refcoco", "refclef", "grefcoco", "ref-zom"], default="refcoco", help="default: refcoco"
    )
    synth.add_argument(
        "--distractors", type=int, nargs=2, default=(0, 3), metavar=("LEAST", "MOST"), help="similar objects per photo"
    )

    index = command("index", _index, "annotations and photos to a data set file")
    index.add_argument(
        "source", type=Path, metavar="REFER_ROOT", help="the folder of data sets; or a .jsonl file, or a .lmdb of CRIS"
    )
    index.add_argument("--dataset", help="refcoco, refcoco+, refcocog, refclef, grefcoco or ref-zom; for a folder")
    index.add_argument("--split-by", help="unc, umd, google, berkeley or final; for a folder")
    index.add_argument("--split", help="train, val, test, testA, ...; for a folder or a .jsonl file")
    index.add_argument("--images", required=True, metavar="DIR", help="the folder of photos, or s3://bucket/prefix")
    index.add_argument("--leave-out", nargs="+", default=[], metavar="NAME", help="photos, by file name; for a folder")
    index.add_argument("--verify", action="store_true", help="decode every photo")
    index.add_argument("--skip-corrupt", action="store_true", help="leave corrupt photos out")
    index.add_argument("-o", "--output", type=Path, required=True, metavar="F.ris.h5")

    mine = command("mine", _mine, "rank all photos for every sentence by CLIP")
    mine.add_argument("dataset", type=Path, metavar="F.ris.h5")
    mine.add_argument("--model", nargs="+", help="open_clip's name, or a model config .json; several are averaged")
    mine.add_argument("--pretrained", nargs="+", metavar="TAG_OR_FILE", help="for each model")
    mine.add_argument("--embeddings", type=Path, metavar="F.neg.h5", help="take them from a table instead of a model")
    mine.add_argument("--depth", type=int, default=1000, help="candidates kept per sentence")
    mine.add_argument(
        "--exclude-similar-photos", type=float, metavar="S", help="photos more similar than S to the target's photo"
    )
    mine.add_argument("--exclude-category", action="store_true", help="photos that show the target's category")
    mine.add_argument(
        "--exclude-siblings", type=float, metavar="S", help="photos more similar than S to another sentence of the ref"
    )
    mine.add_argument(
        "--exclude-photos-of", type=Path, nargs="+", default=[], metavar="G.ris.h5", help="photos of other data sets"
    )
    mine.add_argument("--approximate", action="store_true", help="search by FAISS: for millions of photos")
    mine.add_argument("--probes", type=int, help="of FAISS's lists; default: a sixteenth of them")
    mine.add_argument("--batch-size", type=int, default=64)
    mine.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    mine.add_argument("--images", metavar="DIR", help="image root in place of the recorded one")
    mine.add_argument("-o", "--output", type=Path, required=True, metavar="F.neg.h5")

    tiles = command("tiles", _tiles, "decode and resample every photo once")
    tiles.add_argument("dataset", type=Path, metavar="F.ris.h5")
    tiles.add_argument("--size", type=int, required=True, help="of the frames, in pixels")
    tiles.add_argument("--grids", type=int, nargs="+", default=[1, 2], metavar="GRID", help="1 single, 2 2x2, 3 3x3")
    tiles.add_argument("--resample", default="cv2-linear", help="cv2-linear or pillow-bilinear")
    tiles.add_argument("--images", metavar="DIR", help="image root in place of the recorded one")
    tiles.add_argument("--num-threads", type=int)
    tiles.add_argument("--device", help="cpu or cuda; by default a GPU if there is one")
    tiles.add_argument("-o", "--output", type=Path, required=True, metavar="F.tiles.h5")

    inspect = command("inspect", _inspect, "what is in a file")
    inspect.add_argument("file", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true")
    inspect.add_argument("--max-similarity", type=float, nargs="+", metavar="TAU", help="pool sizes for these")
    inspect.add_argument("--top-k", type=int, nargs="+", metavar="K", help="and these")
    inspect.add_argument("--policy", type=Path, metavar="POLICY.json", help="pool sizes for a policy file's tau and K")

    preview = command("preview", _preview, "draw a contact sheet of samples")
    _data(preview)
    preview.add_argument("-o", "--output", type=Path, required=True, metavar="sheet.png")
    preview.add_argument("--count", type=int, default=12)
    preview.add_argument("--seed", type=int, default=0)
    preview.add_argument("--size", type=int, default=480, help="of a sample, in pixels")
    preview.add_argument("--policy", type=Path, metavar="POLICY.json", help="samples of this policy file")

    report = command("report", _report, "a page to choose tau and K by eye")
    _data(report)
    report.add_argument("-o", "--output", type=Path, required=True, metavar="report.html")
    report.add_argument("--examples", type=int, default=12, help="expressions with their candidates as pictures")
    report.add_argument("--seed", type=int, default=0, help="of the choice of examples")
    _rules(report)

    tune = command("tune", _tune, "propose tau and K")
    tune.add_argument("dataset", type=Path, metavar="F.ris.h5")
    tune.add_argument("negatives", type=Path, metavar="F.neg.h5")
    tune.add_argument("-o", "--output", type=Path, required=True, metavar="policy.json")
    _rules(tune)

    bench = commands.add_parser("bench", help="time things").add_subparsers(required=True, metavar="WHAT")
    loader = command("loader", _bench_loader, "the Loader beside decode-only DALI", bench)
    _data(loader)
    loader.add_argument("--mode", choices=["stream", "host", "pinned", "device"], default="stream")
    loader.add_argument("--tiles", type=Path, metavar="F.tiles.h5", help="for every mode but stream")
    loader.add_argument("--device", help="cpu or cuda; by default cuda for the modes pinned and device")
    loader.add_argument("--device-budget", type=int, metavar="BYTES", help="of GPU memory, for --mode device")
    loader.add_argument("--baseline", action="store_true", help="a PyTorch DataLoader beside it")
    loader.add_argument("--starve", type=float, metavar="MS", help="share of waiting with training steps this long")
    loader.add_argument("--batch-size", type=int, default=16)
    loader.add_argument("--size", type=int, default=480)
    loader.add_argument("--dtype", default="float32")
    loader.add_argument("--resample", default="cv2-linear")
    loader.add_argument("--num-threads", type=int)
    loader.add_argument("--p-mined", type=float, help="default 1; not with --policy")
    loader.add_argument("--policy", type=Path, metavar="POLICY.json", help="time samples of this policy file")
    loader.add_argument("--pairs", type=int, default=7)
    loader.add_argument("--steps", type=int, default=20)
    loader.add_argument("--json", type=Path, metavar="FILE")

    doctor = command("doctor", _doctor, "what is installed, whether it fits this machine, whether the pixels are right")
    doctor.add_argument("--json", action="store_true")
    return parser


def _data(parser: Any) -> None:
    parser.add_argument("dataset", type=Path, metavar="F.ris.h5")
    parser.add_argument("negatives", type=Path, metavar="F.neg.h5")
    parser.add_argument("--images", metavar="DIR", help="image root in place of the recorded one")


def _rules(parser: Any) -> None:
    parser.add_argument(
        "--passing", type=float, default=0.25, help="share of the own photos that tau may let pass (default 0.25)"
    )
    parser.add_argument("--grid", type=int, choices=[2, 3], default=2, help="mosaics to fill: 2 for 2x2, 3 for 3x3")


def _demo(options: argparse.Namespace) -> None:
    from nemo_dali.demo import run_demo

    run_demo(options.out)


def _synth(options: argparse.Namespace) -> None:
    from nemo_dali.synthetic import synthesize
    from nemo_dali.synthetic.layouts import LAYOUTS

    synthesize(
        options.folder,
        images=options.images,
        seed=options.seed,
        distractors=tuple(options.distractors),
        layout=options.layout,
    )
    layout = LAYOUTS[options.layout]
    split_by = layout.refs_file.partition("(")[2].partition(")")[0]
    photos = options.folder / layout.photos
    print(
        f"{options.folder}: {options.images} photos. Next:\n  nemo-dali index {options.folder} "
        f"--dataset {layout.folder} --split-by {split_by} --split train --images {photos} -o train.ris.h5"
    )


def _index(options: argparse.Namespace) -> None:
    from nemo_dali.data.annotations import read_annotations
    from nemo_dali.data.dataset import index_dataset

    annotations = read_annotations(
        options.source,
        images=options.images,
        dataset=options.dataset,
        split_by=options.split_by,
        split=options.split,
        leave_out=options.leave_out,
    )
    report = index_dataset(
        annotations,
        images=options.images,
        output=options.output,
        verify=options.verify,
        skip_corrupt=options.skip_corrupt,
    )
    print(f"{report.output}: {report.photos} photos, {report.refs} refs, {report.sentences} sentences")
    if report.left_out:
        print(f"left out: {len(report.left_out)} corrupt photos with {report.left_out_refs} refs:", *report.left_out)


def _mine(options: argparse.Namespace) -> None:
    from nemo_dali.mining.exclusions import Exclusions
    from nemo_dali.mining.job import mine

    report = mine(
        options.dataset,
        model=options.model,
        pretrained=options.pretrained,
        embeddings=options.embeddings,
        output=options.output,
        depth=options.depth,
        exclusions=Exclusions(
            similar_photos=options.exclude_similar_photos,
            category=options.exclude_category,
            siblings=options.exclude_siblings,
            photos_of=options.exclude_photos_of,
        ),
        batch_size=options.batch_size,
        device=options.device,
        images=options.images,
        approximate=options.approximate,
        probes=options.probes,
    )
    if os.environ.get("RANK", "0") == "0":
        print(report)


def _tiles(options: argparse.Namespace) -> None:
    from nemo_dali.pipeline.gpu import default_device
    from nemo_dali.tiles.build import make_tiles

    report = make_tiles(
        options.dataset,
        size=options.size,
        output=options.output,
        resample=options.resample,
        grids=options.grids,
        images=options.images,
        num_threads=options.num_threads,
        device=options.device or default_device(),
        announce=functools.partial(print, flush=True),
    )
    print(report)


def _inspect(options: argparse.Namespace) -> None:
    from nemo_dali.inspection import inspect_file

    taus, ks = options.max_similarity or [None], options.top_k or [MosaicPolicy().top_k]
    asked = options.max_similarity or options.top_k
    pools = [(tau, k) for tau in taus for k in ks] if asked else []
    if options.policy is not None:
        policy, _ = read_policy(options.policy)
        pools.append((policy.max_similarity, policy.top_k))
    found = inspect_file(options.file, pools=pools)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if name != "pools":
            print(f"{name + ':':22}{value}")
    for pool in found.get("pools", []):
        print("pool " + ", ".join(f"{name} {value}" for name, value in pool.items()))


def _preview(options: argparse.Namespace) -> None:
    from nemo_dali.preview import preview

    preview(
        options.dataset,
        options.negatives,
        output=options.output,
        count=options.count,
        seed=options.seed,
        images=options.images,
        size=options.size,
        policy=options.policy,
    )
    print(options.output)


def _report(options: argparse.Namespace) -> None:
    from nemo_dali.report import report

    proposal = report(
        options.dataset,
        options.negatives,
        output=options.output,
        examples=options.examples,
        seed=options.seed,
        images=options.images,
        passing=options.passing,
        grid=options.grid,
    )
    print(f"{options.output}: open it in a browser. It begins with tau and K as 'nemo-dali tune' proposes them:")
    print(*proposal.why, sep="\n")


def _tune(options: argparse.Namespace) -> None:
    from nemo_dali.data.dataset import Dataset
    from nemo_dali.mining.pool_curves import draw_curves
    from nemo_dali.mining.table import NegativeTable
    from nemo_dali.mining.tune import depth_advice, propose
    from nemo_dali.plan.policy import write_policy

    table = NegativeTable.open(options.negatives)
    curves = draw_curves(Dataset.open(options.dataset), table)
    proposal = propose(curves, passing=options.passing, grid=options.grid)
    why = [*proposal.why, depth_advice(curves, proposal)]
    write_policy(options.output, proposal.policy, tuned_for=table.fingerprint, why=why)
    print(*why, sep="\n")
    print(f"{options.output}: max_similarity {proposal.policy.max_similarity}, top_k {proposal.policy.top_k}")


def _bench_loader(options: argparse.Namespace) -> None:
    from nemo_dali.bench import bench_loader, timed_start
    from nemo_dali.io.h5 import write_bytes
    from nemo_dali.loader.loader import Loader

    if options.json is not None and (options.json.suffix != ".json" or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"--json ({options.json}) must end in .json and lie in a folder that exists")
    if (options.mode == "stream") != (options.tiles is None):
        raise ValueError(f"--tiles ({options.tiles}) must be given with --mode host, pinned or device, and only then")
    if options.policy is not None and options.p_mined is not None:
        raise ValueError(f"--p-mined ({options.p_mined}) must be left out with --policy")
    p_mined = 1.0 if options.p_mined is None else options.p_mined
    loader, seconds = timed_start(
        lambda: Loader(
            options.dataset,
            options.negatives,
            batch_size=options.batch_size,
            policy=options.policy or MosaicPolicy(p_mined=p_mined),
            size=options.size,
            dtype=options.dtype,
            resample=options.resample,
            num_threads=options.num_threads,
            images=options.images,
            tiles=options.tiles,
            placement="host" if options.mode == "stream" else options.mode,
            device=options.device or ("cuda" if options.mode in ("pinned", "device") else "cpu"),
            device_budget=options.device_budget,
        )
    )
    result = bench_loader(
        loader, pairs=options.pairs, steps=options.steps, baseline=options.baseline, starve=options.starve
    )
    result["start_up_s"] = round(seconds, 3)
    for name, unit in (
        ("samples_per_s", "samples/s"),
        ("decode_only", "samples/s"),
        ("baseline", "samples/s"),
        ("ratio_decode_only", ""),
        ("ratio_baseline", ""),
        ("ratio_memset", ""),
    ):
        if value := result[name]:
            print(f"{name:20}{value['median']:9.2f} {unit} (quartiles {value['p25']:.2f} to {value['p75']:.2f})")
    print(f"{'start-up':20}{seconds:9.2f} s to the first batch, without imports")
    print(f"{'peak memory':20}{result['peak_memory_mib']['loader']:9.0f} MiB")
    if result["waiting"] is not None:
        print(f"{'waiting':20}{result['waiting']:9.2%} of a training with steps of {options.starve:g} ms")
    if options.json:
        write_bytes(options.json, (json.dumps(result, indent=2) + "\n").encode())


def _doctor(options: argparse.Namespace) -> None:
    from nemo_dali.doctor import diagnose, raise_problems, render, report
    from nemo_dali.probe import gather

    facts = gather()
    findings = diagnose(facts)
    print(json.dumps(report(facts, findings), indent=2) if options.json else render(facts, findings))
    raise_problems(findings)
