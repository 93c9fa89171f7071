"""The commands that look at what was made, and at the machine: ``tune``, ``report``, ``preview``, ..."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from nemo_dali._checks import LARGEST_SEED
from nemo_dali._choices import DType, PeerDType, Placement
from nemo_dali.commands.limits import check_address_space
from nemo_dali.commands.options import (
    BATCH,
    COUNT,
    SEED,
    SIDE,
    Dataset,
    Grid,
    ImageRoot,
    Json,
    Negatives,
    Passing,
    Policy,
    Resample,
    Threads,
    Verbose,
    argument,
    as_typed,
    flag,
    integer,
    number,
    option,
    output,
)
from nemo_dali.io.terminal import say, say_json
from nemo_dali.plan.by_epoch import LAST_EPOCH

Mode = Literal["stream", Placement]
BYTES = integer(0, LARGEST_SEED)
LONGEST_STEP_MS = 3.6e6  # of a training that is simulated: an hour


def tune(
    dataset: Dataset,
    negatives: Negatives,
    output: Annotated[Path, output("POLICY.json", "Policy file to write.")],
    passing: Passing = 0.25,
    grid: Grid = 2,
    verbose: Verbose = False,
) -> None:
    """Propose tau and K, and write them to a policy file."""
    from nemo_dali.data.dataset import Dataset
    from nemo_dali.mining.pool_curves import measure_curves
    from nemo_dali.mining.table import NegativeTable
    from nemo_dali.mining.tune import depth_advice, propose
    from nemo_dali.plan.policy import check_policy_place, write_policy

    check_policy_place(output)  # fail now, not after the work
    table = NegativeTable.open(negatives)
    curves = measure_curves(Dataset.open(dataset), table)
    proposal = propose(curves, passing=passing, grid=grid)
    why = [*proposal.why, depth_advice(curves, proposal)]
    write_policy(output, proposal.policy, tuned_for=table.fingerprint, why=why)
    say(*why)
    policy = proposal.policy
    other = policy.max_similarity_no_target
    say(
        f"{output}: max_similarity {policy.max_similarity}, top_k {policy.top_k}"
        + ("" if other is None else f", max_similarity_no_target {other}")
    )


def report(
    dataset: Dataset,
    negatives: Negatives,
    output: Annotated[Path, output("REPORT.html", "Page to write.")],
    examples: Annotated[int, option("N", "Expressions shown with pictures of their candidates.", COUNT)] = 12,
    seed: Annotated[int, option("N", "Random seed; a different one gives different examples.", SEED)] = 0,
    passing: Passing = 0.25,
    grid: Grid = 2,
    images: ImageRoot = None,
    truth: Annotated[
        Path | None, option("DIR", "Folder written by 'synth': report how many negatives are false.")
    ] = None,
    policy: Annotated[
        Path | None,
        option("POLICY.json", "Policy whose negatives --truth judges.", default="the proposed one"),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Draw a page for choosing tau and K by eye."""
    if policy is not None and truth is None:
        raise ValueError(f"--policy ({policy}) must be left out without --truth")
    from nemo_dali.commands.report.page import report
    from nemo_dali.mining.table import NegativeTable
    from nemo_dali.plan.policy import read_policy, warn_if_tuned_elsewhere

    drawn = None
    if policy is not None:
        drawn, tuned_for = read_policy(policy)
        warn_if_tuned_elsewhere(policy, tuned_for, [NegativeTable.open(negatives).fingerprint])
    reported = report(
        dataset,
        negatives,
        output=output,
        examples=examples,
        seed=seed,
        images=images,
        passing=passing,
        grid=grid,
        truth=truth,
        policy=drawn,
    )
    say(f"{output}: open it in a browser. It starts from the tau and K that 'nemo-dali tune' proposes:")
    say(*reported.proposal.why)
    if reported.false_negatives is not None:
        say(f"False negatives under {policy or 'the proposed policy'}, judged by what each photo of {truth} shows:")
        say(*str(reported.false_negatives).split("\n"))


def preview(
    dataset: Dataset,
    negatives: Negatives,
    output: Annotated[Path, output("SHEET.png", "Picture to write.")],
    count: Annotated[int, option("N", "Number of samples.", COUNT)] = 12,
    seed: Annotated[int, option("N", "Random seed; a different one gives different samples.", SEED)] = 0,
    size: Annotated[int, option("PIXELS", "Side length of a sample.", SIDE)] = 480,
    epoch: Annotated[int, option("N", "Epoch of the samples, counted from 0.", integer(0, LAST_EPOCH))] = 0,
    policy: Policy = None,
    images: ImageRoot = None,
    verbose: Verbose = False,
) -> None:
    """Draw a contact sheet of samples."""
    check_address_space()
    from nemo_dali.commands.preview import preview

    outside = preview(
        dataset,
        negatives,
        output=output,
        count=count,
        seed=seed,
        images=images,
        size=size,
        epoch=epoch,
        policy=policy,
    )
    say(str(output))
    if outside:
        say(
            f"{outside} of {count} samples show negatives outside the policy, because their pools are too short. "
            "Raise max_similarity or top_k, mine deeper, or use more photos."
        )


def inspect(
    file: Annotated[Path, argument("FILE", "Data set file, negative table or tile file.")],
    json: Json = False,
    max_similarity: Annotated[
        list[float] | None, option("TAU...", "Report a table's pool sizes for these values of tau.", number())
    ] = None,
    top_k: Annotated[
        list[int] | None, option("K...", "Report a table's pool sizes for these values of K.", COUNT)
    ] = None,
    policy: Policy = None,
    verbose: Verbose = False,
) -> None:
    """Check a file and show what is in it."""
    from nemo_dali.commands.inspection import inspect_file
    from nemo_dali.plan.policy import MosaicPolicy, read_policy

    taus: Sequence[float | None] = max_similarity or [None]
    ks = top_k or [MosaicPolicy().difficulty(0).top_k]
    pools = [(tau, k) for tau in taus for k in ks] if max_similarity or top_k else []
    if policy is not None:
        read, _ = read_policy(policy)
        epochs = map(read.difficulty, read.breakpoints)
        pools += dict.fromkeys((now.max_similarity, now.top_k) for now in epochs)
    found = inspect_file(file, pools=pools)
    if json:
        say_json(found)
        return
    for name, value in found.items():
        if name != "pools":
            say(f"{name + ':':22}{value}")
    for pool in found.get("pools", []):
        say("pool " + ", ".join(f"{name} {value}" for name, value in pool.items()))


def bench_loader(
    dataset: Dataset,
    negatives: Negatives,
    mode: Annotated[Mode, typer.Option(help="Where photos or tiles are read from.")] = "stream",
    tiles: Annotated[Path | None, option("F.tiles.h5", "Tile file, for every mode except stream.")] = None,
    device: Annotated[str | None, option("DEVICE", "cpu or cuda.", default="cuda in modes pinned and device")] = None,
    device_budget: Annotated[int | None, option("BYTES", "GPU memory for tiles in mode device.", BYTES)] = None,
    baseline: Annotated[bool, flag("--baseline", "Time a PyTorch DataLoader too.")] = False,
    starve: Annotated[
        float | None,
        option("MS", "Report the share of time that training with such steps would wait.", number(0, LONGEST_STEP_MS)),
    ] = None,
    batch_size: Annotated[int, option("N", "Samples per batch.", BATCH)] = 16,
    size: Annotated[int, option("PIXELS", "Side length of a frame.", SIDE)] = 480,
    dtype: Annotated[DType, typer.Option(help="Data type of the images.")] = "float32",
    resample: Resample = "cv2-linear",
    num_threads: Threads = None,
    p_mined: Annotated[
        float | None, option("P", "Share of mined mosaics, 1 by default; not with --policy.", number(0, 1))
    ] = None,
    policy: Policy = None,
    pairs: Annotated[int, option("N", "How many times each is timed.", COUNT)] = 7,
    steps: Annotated[int, option("N", "Fewest batches in a timing.", COUNT)] = 20,
    output: Annotated[Path | None, option("FILE.json", "File to write the result to.", None, "--json")] = None,
    images: ImageRoot = None,
    verbose: Verbose = False,
) -> None:
    """Time the Loader against DALI that only reads and decodes."""
    check_address_space()
    from nemo_dali.commands.bench import RESULT, bench_loader, is_result, timed_policy, timed_start
    from nemo_dali.io.output import check_place, write_bytes
    from nemo_dali.loader.loader import Loader
    from nemo_dali.plan.policy import MosaicPolicy

    if output is not None and output.suffix != ".json":
        raise ValueError(f"--json ({output}) must end in .json")
    if (mode == "stream") != (tiles is None):
        raise ValueError(f"--tiles ({tiles}) must be given with --mode host, pinned or device, and only then")
    if policy is not None and p_mined is not None:
        raise ValueError(f"--p-mined ({p_mined}) must be left out with --policy")
    if output is not None:
        check_place(output, is_ours=is_result, kind=RESULT)
    if policy is None:
        timed = MosaicPolicy(p_mined=1.0 if p_mined is None else p_mined)
    else:
        timed = timed_policy(policy, negatives)
    loader, seconds = timed_start(
        lambda: Loader(
            dataset,
            negatives,
            batch_size=batch_size,
            policy=timed,
            size=size,
            dtype=dtype,
            resample=resample,
            num_threads=num_threads,
            images=images,
            tiles=tiles,
            placement="host" if mode == "stream" else mode,
            device=device or ("cuda" if mode in ("pinned", "device") else "cpu"),
            device_budget=device_budget,
        )
    )
    result = bench_loader(loader, pairs=pairs, steps=steps, baseline=baseline, starve=starve)
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
    say(f"{'start-up':20}{seconds:9.2f} s to the first batch, excluding imports")
    say(f"{'peak memory':20}{result['peak_memory_mib']['loader']:9.0f} MiB")
    if result["waiting"] is not None:
        say(f"{'waiting':20}{result['waiting']:9.2%} of the time of training with steps of {starve:g} ms")
    if output is not None:
        content = (json.dumps(result, indent=2) + "\n").encode()
        write_bytes(output, content, is_ours=is_result, kind=RESULT)


def bench_peers(
    dataset: Dataset,
    negatives: Negatives,
    tiles: Annotated[
        Path | None, option("F.tiles.h5", "Tile file of 2x2 mosaics.", default="made for the comparison")
    ] = None,
    peers: Annotated[list[str] | None, option("NAME...", "Peers to time.", as_typed, default="all")] = None,
    batch_size: Annotated[int, option("N", "Samples per batch.", BATCH)] = 16,
    size: Annotated[int, option("PIXELS", "Side length of a frame.", SIDE)] = 480,
    dtype: Annotated[PeerDType, typer.Option(help="Data type of the images.")] = "float32",
    num_threads: Threads = None,
    pairs: Annotated[int, option("N", "How many times each is timed.", COUNT)] = 5,
    steps: Annotated[int, option("N", "Fewest batches in a timing.", COUNT)] = 10,
    output: Annotated[Path | None, option("FILE.json", "File to write the result to.", None, "--json")] = None,
    images: ImageRoot = None,
    verbose: Verbose = False,
) -> None:
    """Time the Loader against other ways to make the same mosaics."""
    check_address_space()
    from tempfile import TemporaryDirectory

    from nemo_dali.commands.peers.comparison import RESULT, compare, is_result, lines_of
    from nemo_dali.commands.peers.rows import PEERS
    from nemo_dali.io.output import check_place, write_bytes
    from nemo_dali.io.threads import thread_count

    if output is not None and output.suffix != ".json":
        raise ValueError(f"--json ({output}) must end in .json")
    if output is not None:
        check_place(output, is_ours=is_result, kind=RESULT)
    with TemporaryDirectory() as folder:
        result = compare(
            {"dataset": dataset, "negatives": negatives, "images": images},
            Path(folder),
            tiles=tiles,
            batch_size=batch_size,
            size=size,
            dtype=dtype,
            cores=num_threads or thread_count(),
            peers=peers or PEERS,
            pairs=pairs,
            steps=steps,
        )
    say(*lines_of(result))
    if output is not None:
        content = (json.dumps(result, indent=2) + "\n").encode()
        write_bytes(output, content, is_ours=is_result, kind=RESULT)


def doctor(json: Json = False, verbose: Verbose = False) -> None:
    """Report what is installed, and whether it fits this machine."""
    from nemo_dali.commands.doctor.findings import diagnose, raise_problems, render, report
    from nemo_dali.commands.doctor.machine import gather

    facts = gather()
    findings = diagnose(facts)
    if json:
        say_json(report(facts, findings))
    else:
        say(*render(facts, findings).split("\n"))
    raise_problems(findings)
