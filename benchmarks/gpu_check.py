"""Everything to know about a GPU, in one command: is it set up right, are the bytes right, and how fast is it.

    make gpu-check                       with the Python at hand; or, without make,
    python benchmarks/gpu_check.py       [--pretend] [--list] [--again STAGE] [--revision NAME]

Each stage is a process with its own time limit and result, so no stage hides anything about another. The limits
add up to eight minutes; later stages may use the time that a stage leaves over. No network, git, make or C++
compiler is needed. All output goes to benchmarks/results/<device>/: the record STAGE.json and the log STAGE.log of
every stage, summary.json and summary.md. The exit code is 0 if all stages passed.

When called again, it continues: a stage that was done with these sources and packages, passed or failed, is not run
again; one that timed out or was interrupted is. ``--pretend`` rehearses everything on a small scale without a GPU, with
the host playing its part; the files say so in their names and contents.
"""

import argparse
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from gpu_run import Place, run_all, say
from gpu_setup import ROOT, digest_of_sources, first_gpu, folder_name, packages, revision_of
from gpu_stages import STAGES
from gpu_summary import write_summary

RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "gpu-check"  # generated data, and results on their way into a record
PATIENCE = 4  # factor of the limits under --pretend, where the CPU plays the GPU
NO_GPU = "NVIDIA's driver shows no GPU: see 'python -m nemo_dali doctor', or rehearse with --pretend.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check as the command line says; returns the exit code."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the stages with their limits, and run none")
    parser.add_argument("--again", action="append", default=[], choices=[*names, "all"], metavar="STAGE", help="or all")
    parser.add_argument("--revision", help="what the sources are called where there is no git repository to ask")
    parser.add_argument("--pretend", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another limit")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the devices' folders")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for generated data")
    options = parser.parse_args(arguments)
    limits = dict(limit_of(text, names, parser) for text in options.limit)
    stages = [replace(stage, limit=limits.get(stage.name, stage.limit)) for stage in STAGES]
    if options.list:
        for stage in stages:
            say(f"{stage.name:15}{stage.limit:4.0f} s  {stage.what}")
        say(f"{'together':15}{sum(stage.limit for stage in stages):4.0f} s")
        return 0
    gpu = {"device": "pretended"} if options.pretend else first_gpu()
    if not gpu:
        parser.exit(1, NO_GPU)
    device = gpu["device"]
    work = options.work / "pretended" if options.pretend else options.work
    place = Place(
        folder=options.output.resolve() / folder_name(device),
        work=work.resolve(),
        device=device,
        revision=options.revision or revision_of(),
        source=digest_of_sources(),
        setup={**gpu, **packages()},
        pretended=options.pretend,
    )
    say(f"{device}, revision {place.revision}: records go to {place.folder}")
    signal.signal(signal.SIGTERM, interrupt)
    # A stage that is killed must not write its memory to the disk first.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    summarise = partial(write_summary, place, stages)
    try:
        run_all(stages, place, again=options.again, patience=PATIENCE if options.pretend else 1, after_each=summarise)
    except KeyboardInterrupt:
        summarise()
        say("Interrupted; the next call goes on from here.")
        return 130
    summary = summarise()
    say(f"{'All stages passed' if summary['passed'] else 'Not all stages passed'}: {place.file('summary.md')}")
    return 0 if summary["passed"] else 1


def limit_of(text: str, names: Sequence[str], parser: argparse.ArgumentParser) -> tuple[str, float]:
    """A stage and seconds, from an argument."""
    name, _, seconds = text.partition("=")
    try:
        if name in names and 0 < float(seconds) < 86400:
            return name, float(seconds)
    except ValueError:
        pass
    parser.error(f"--limit ({text}) must be STAGE=SECONDS, as --list shows them")


def interrupt(number: int, frame: Any) -> NoReturn:
    """Handle SIGTERM like Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
