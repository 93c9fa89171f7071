"""Arguments and options that several commands have, and how values are read."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_dali import _choices
from nemo_dali._checks import LARGEST_BATCH, LARGEST_FRAME, LARGEST_SEED, LONGEST_VALUE, MOST
from nemo_dali.io.terminal import Formatter
from nemo_dali.io.threads import most_threads


def integer(least: int = 1, most: int = MOST) -> Callable[[Any], int]:
    """A parser of values: an integer in a range."""

    def parse(value: Any) -> int:
        try:
            number = int(value)
        except ValueError:  # for thousands of digits, too
            raise typer.BadParameter(f"{_short(value)} must be an integer") from None
        if not least <= number <= most:
            raise typer.BadParameter(f"{_short(value)} must be from {least} to {most}")
        return number

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[Any], float]:
    """A parser of values: a finite number in a range."""

    def parse(value: Any) -> float:
        try:
            number = float(value)
        except ValueError:
            raise typer.BadParameter(f"{_short(value)} must be a number") from None
        if not (math.isfinite(number) and least <= number <= most):
            limits = f"from {least:g} to {most:g}" if math.isfinite(least) else "finite"
            raise typer.BadParameter(f"{_short(value)} must be {limits}")
        return number

    return parse


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def as_typed(value: Any) -> str:
    """A parser of values that keeps bytes that are not UTF-8, which typer may refuse otherwise."""
    return str(value)


def _log(verbose: bool) -> None:
    """Send log records to stderr, unless the program that calls this has configured logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    logging.getLogger("nemo_dali.kernels").setLevel(logging.INFO)  # says they compile: else a first start seems to hang


def argument(metavar: str, help: str) -> Any:
    """An argument, which is a file or a folder."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def option(metavar: str, help: str, parser: Callable[[Any], Any] | None = None, *flags: str, default: str = "") -> Any:
    """An option with a value.

    Args:
        flags: if different from what the parameter's name implies.
        default: in words, where None stands for it.
    """
    return typer.Option(*flags, parser=parser, metavar=metavar, help=help, show_default=default or True)


def flag(name: str, help: str) -> Any:
    """An option without a value."""
    return typer.Option(name, help=help)


def output(metavar: str, help: str) -> Any:
    """The option for the file that is written."""
    return option(metavar, help, None, "--output", "-o")


COUNT, SIDE, SEED, BATCH = integer(), integer(1, LARGEST_FRAME), integer(0, LARGEST_SEED), integer(1, LARGEST_BATCH)
SHARE_OF_CORES = "this process's share of the cores"

Verbose = Annotated[bool, typer.Option("--verbose", callback=_log, help="Log each step on stderr.")]
Json = Annotated[bool, flag("--json", "Print JSON.")]
Dataset = Annotated[Path, argument("F.ris.h5", "Data set file, from 'index'.")]
Negatives = Annotated[Path, argument("F.neg.h5", "Its negative table, from 'mine'.")]
Policy = Annotated[Path | None, option("POLICY.json", "Policy file, such as 'tune' writes.")]
ImageRoot = Annotated[
    str | None, option("DIR", "Folder of photos, or s3://...", as_typed, "--images", default="the recorded one")
]
Resample = Annotated[_choices.Resample, typer.Option(help="Resample pixels as OpenCV or as Pillow does.")]
Threads = Annotated[int | None, option("N", "Number of threads.", integer(1, most_threads()), default=SHARE_OF_CORES)]
Passing = Annotated[float, option("SHARE", "Largest share of sentences' own photos that tau may let pass.", number())]
Grid = Annotated[int, option("[2|3]", "Mosaics that pools must fill: 2 for 2x2, 3 for 3x3.", integer(2, 3))]
