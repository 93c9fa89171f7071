"""The command ``nemo-dali``. Exit codes: 0 done, 1 failed with a one-line reason, 2 wrong usage."""

import argparse
import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_dali.commands._arguments import command_line
from nemo_dali.errors import NemoError, ToldElsewhere
from nemo_dali.io.output import check_inputs
from nemo_dali.io.terminal import Formatter, open_closed_streams, say, say_json

LOAD_MUCH = ("demo", "mine", "tiles", "preview", "bench loader")  # torch and DALI
ROOM_ENOUGH = 8 * 2**30  # bytes of address space for both, built for GPUs
LONGEST_NAME = 4096  # characters around one that is not UTF-8
INPUTS = (
    "source",
    "dataset",
    "negatives",
    "embeddings",
    "scores",
    "exclude_photos_of",
    "leave_out",
    "pretrained",
    "model",
    "policy",
    "tiles",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    open_closed_streams()
    parser = command_line()
    try:
        options = parser.parse_args(arguments)
        parser = options.parser
        _log(verbose=options.verbose)
        _check_output(options)
        if options.command in LOAD_MUCH:
            _check_address_space()
        RUN[options.command](options)
    except ToldElsewhere:
        return 1
    except NemoError as error:
        flag = "--json" if options.command == "bench loader" else "-o"
        return _fail(str(error).replace("another place with -o.", f"another place with {flag}."))
    except UnicodeEncodeError as error:
        name = error.object[: error.end][-LONGEST_NAME:] + error.object[error.end :][:LONGEST_NAME]
        return _fail(f"The name '{name}' is not UTF-8, and files and pages hold names as UTF-8. Rename it.")
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        return _fail(
            f"A library cannot be loaded ({_gist(error)}). {_limit()}Look for the cause with: nemo-dali doctor"
        )
    except (OSError, MemoryError) as error:  # the system's own refusals
        return _fail(f"{_gist(error) or 'out of memory'}. {_limit()}Free disk space or memory, or ask for less.")
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        return _fail(f"The system starts no further thread. {_limit()}Raise the limits (ulimit -u), or ask for less.")
    except KeyboardInterrupt:
        return _fail("interrupted; files under their real names are complete")
    return 0


def _must_be_utf8(*paths: str | Path) -> None:
    """Raise a UnicodeEncodeError for names that a file is to record, now and not after the work."""
    "".join(map(os.path.abspath, paths)).encode()


def _fail(reason: str) -> int:
    say(f"nemo-dali: {reason}", error=True)
    return 1


def _gist(error: BaseException) -> str:
    """What the innermost cause says, on one line: some libraries wrap it into a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".")


def _limit() -> str:
    """The remedy for a limit of the address space, which libraries for GPUs need much of."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"This process may map {limit / 2**30:.1f} GiB only: raise that first (ulimit -v). "


def _check_address_space() -> None:
    """Where it is limited, load torch and DALI in another process first: with too little of it they end theirs.

    Raises:
        NemoError: they did.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if not 0 <= limit < ROOM_ENOUGH:
        return
    done = subprocess.run([sys.executable, "-c", "import torch, nvidia.dali"], capture_output=True)
    if done.returncode < 0 or re.search(b"failed to map|[Aa]llocat|MemoryError", done.stderr):
        raise NemoError(
            f"torch and DALI cannot be loaded within the {limit / 2**30:.1f} GiB that this process may map. Raise its "
            f"limit (ulimit -v), to {ROOM_ENOUGH >> 30} GiB, say."
        )


def _log(*, verbose: bool) -> None:
    """Let log records go to stderr, unless the program that calls this has seen to its own."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def _check_output(options: argparse.Namespace) -> None:
    output = getattr(options, "output", None) or (options.json if options.command == "bench loader" else None)
    if output is None:
        return
    for name in INPUTS:
        given = getattr(options, name, None) or []
        check_inputs(output, given if isinstance(given, list) else [given])


def _demo(options: argparse.Namespace) -> None:
    from nemo_dali.commands.demo import run_demo

    _must_be_utf8(options.out)
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
    say(
        f"{options.folder}: {options.images} photos. Next:",
        f"  nemo-dali index {options.folder} --dataset {layout.folder} --split-by {split_by} --split train "
        f"--images {photos} -o train.ris.h5",
    )


def _index(options: argparse.Namespace) -> None:
    from nemo_dali.data.annotations import read_annotations
    from nemo_dali.data.indexing import index_dataset

    _must_be_utf8(*options.images)
    annotations = read_annotations(
        options.source,
        images=options.images,
        dataset=options.dataset,
        split_by=options.split_by,
        split=options.split,
        leave_out=[name for name in options.leave_out if not name.endswith(".ris.h5")],
        skip_empty=options.skip_empty,
        box_format=options.box_format,
        exif=options.exif,
    )
    report = index_dataset(
        annotations,
        images=options.images,
        output=options.output,
        verify=options.verify,
        skip_corrupt=options.skip_corrupt,
        photos_of=[name for name in options.leave_out if name.endswith(".ris.h5")],
    )
    say(*str(report).split("\n"))


def _mine(options: argparse.Namespace) -> None:
    from nemo_dali.mining.exclusions import Exclusions
    from nemo_dali.mining.given import mine_scores
    from nemo_dali.mining.job import mine

    exclusions = Exclusions(
        similar_photos=options.exclude_similar_photos,
        category=options.exclude_category,
        siblings=options.exclude_siblings,
        photos_of=options.exclude_photos_of,
    )
    common = {"output": options.output, "depth": options.depth, "exclusions": exclusions}
    if options.scores is not None:
        for name in ("model", "pretrained", "embeddings", "approximate", "probes"):
            if value := getattr(options, name):
                raise ValueError(f"--{name} ({value}) must be left out with --scores")
        report: object = mine_scores(options.dataset, options.scores, **common)
    else:
        report = mine(
            options.dataset,
            model=options.model,
            pretrained=options.pretrained,
            embeddings=options.embeddings,
            batch_size=options.batch_size,
            device=options.device,
            images=options.images,
            approximate=options.approximate,
            probes=options.probes,
            **common,
        )
    if os.environ.get("RANK", "0") == "0":
        say(*str(report).split("\n"))


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
        announce=say,
    )
    say(str(report))


def _inspect(options: argparse.Namespace) -> None:
    from nemo_dali.commands.inspection import inspect_file
    from nemo_dali.plan.policy import MosaicPolicy, read_policy

    taus, ks = options.max_similarity or [None], options.top_k or [MosaicPolicy().top_k]
    asked = options.max_similarity or options.top_k
    pools = [(tau, k) for tau in taus for k in ks] if asked else []
    if options.policy is not None:
        policy, _ = read_policy(options.policy)
        pools.append((policy.max_similarity, policy.top_k))
    found = inspect_file(options.file, pools=pools)
    if options.json:
        say_json(found)
        return
    for name, value in found.items():
        if name != "pools":
            say(f"{name + ':':22}{value}")
    for pool in found.get("pools", []):
        say("pool " + ", ".join(f"{name} {value}" for name, value in pool.items()))


def _preview(options: argparse.Namespace) -> None:
    from nemo_dali.commands.preview import preview

    outside = preview(
        options.dataset,
        options.negatives,
        output=options.output,
        count=options.count,
        seed=options.seed,
        images=options.images,
        size=options.size,
        policy=options.policy,
    )
    say(str(options.output))
    if outside:
        say(
            f"{outside} of {options.count} samples show negatives outside the policy, as their pools are too short. "
            "Raise max_similarity or top_k, mine deeper, or use more photos."
        )


def _report(options: argparse.Namespace) -> None:
    from nemo_dali.commands.report.page import report

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
    say(f"{options.output}: open it in a browser. It begins with tau and K as 'nemo-dali tune' proposes them:")
    say(*proposal.why)


def _tune(options: argparse.Namespace) -> None:
    from nemo_dali.data.dataset import Dataset
    from nemo_dali.mining.pool_curves import measure_curves
    from nemo_dali.mining.table import NegativeTable
    from nemo_dali.mining.tune import depth_advice, propose
    from nemo_dali.plan.policy import check_policy_place, write_policy

    check_policy_place(options.output)  # told now, not after the work
    table = NegativeTable.open(options.negatives)
    curves = measure_curves(Dataset.open(options.dataset), table)
    proposal = propose(curves, passing=options.passing, grid=options.grid)
    why = [*proposal.why, depth_advice(curves, proposal)]
    write_policy(options.output, proposal.policy, tuned_for=table.fingerprint, why=why)
    say(*why)
    policy = proposal.policy
    other = policy.max_similarity_no_target
    say(
        f"{options.output}: max_similarity {policy.max_similarity}, top_k {policy.top_k}"
        + ("" if other is None else f", max_similarity_no_target {other}")
    )


def _bench_loader(options: argparse.Namespace) -> None:
    from nemo_dali.commands.bench import RESULT, bench_loader, is_result, timed_start
    from nemo_dali.io.output import check_place, write_bytes
    from nemo_dali.loader.loader import Loader
    from nemo_dali.plan.policy import MosaicPolicy

    if options.json is not None and options.json.suffix != ".json":
        raise ValueError(f"--json ({options.json}) must end in .json")
    if (options.mode == "stream") != (options.tiles is None):
        raise ValueError(f"--tiles ({options.tiles}) must be given with --mode host, pinned or device, and only then")
    if options.policy is not None and options.p_mined is not None:
        raise ValueError(f"--p-mined ({options.p_mined}) must be left out with --policy")
    if options.json is not None:
        check_place(options.json, is_ours=is_result, kind=RESULT)
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
            say(f"{name:20}{value['median']:9.2f} {unit} (quartiles {value['p25']:.2f} to {value['p75']:.2f})")
    say(f"{'start-up':20}{seconds:9.2f} s to the first batch, without imports")
    say(f"{'peak memory':20}{result['peak_memory_mib']['loader']:9.0f} MiB")
    if result["waiting"] is not None:
        say(f"{'waiting':20}{result['waiting']:9.2%} of a training with steps of {options.starve:g} ms")
    if options.json:
        content = (json.dumps(result, indent=2) + "\n").encode()
        write_bytes(options.json, content, is_ours=is_result, kind=RESULT)


def _doctor(options: argparse.Namespace) -> None:
    from nemo_dali.commands.doctor.findings import diagnose, raise_problems, render, report
    from nemo_dali.commands.doctor.machine import gather

    facts = gather()
    findings = diagnose(facts)
    if options.json:
        say_json(report(facts, findings))
    else:
        say(*render(facts, findings).split("\n"))
    raise_problems(findings)


RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "synth": _synth,
    "index": _index,
    "mine": _mine,
    "tiles": _tiles,
    "inspect": _inspect,
    "preview": _preview,
    "report": _report,
    "tune": _tune,
    "bench loader": _bench_loader,
    "doctor": _doctor,
}
