"""The command line's arguments, command by command."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nemo_dali._checks import LARGEST_BATCH, LARGEST_FRAME, LARGEST_SEED, LONGEST_VALUE, MOST
from nemo_dali._version import __version__
from nemo_dali.io.terminal import printable, say
from nemo_dali.io.threads import most_threads

LONGEST_STEP_MS = 3.6e6  # of a training that is played: an hour


class Parser(argparse.ArgumentParser):
    """A parser whose messages are safe on a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        say(*message.removesuffix("\n").split("\n"), error=file is not sys.stdout)


def integer(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A type of arguments: an integer in a range."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:  # of thousands of digits, too
            raise argparse.ArgumentTypeError(f"{_short(text)} must be an integer") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{_short(text)} must be from {least} to {most}")
        return number

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """A type of arguments: a finite number in a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_short(text)} must be a number") from None
        if not (math.isfinite(value) and least <= value <= most):
            limits = f"from {least:g} to {most:g}" if math.isfinite(least) else "finite"
            raise argparse.ArgumentTypeError(f"{_short(text)} must be {limits}")
        return value

    return parse


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def command_line() -> Parser:
    """The parser. It gives ``command``, a name in ``COMMANDS``, that command's ``parser``, and its options."""
    parser = Parser(prog="nemo-dali", description="NeMo mosaics inside a DALI pipeline.")
    parser.add_argument("--version", action="version", version=f"nemo-dali {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    bench = None
    for name, add_arguments, text in COMMANDS:
        group, word = commands, name
        if name.startswith("bench "):
            bench = bench or commands.add_parser("bench", help="time things").add_subparsers(
                required=True, metavar="WHAT"
            )
            group, word = bench, name.removeprefix("bench ")
        command = group.add_parser(word, help=text, description=text)
        command.add_argument("--verbose", action="store_true", help="log what is done")
        command.set_defaults(command=name, parser=command)
        add_arguments(command)
    return parser


def _demo(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR")


def _synth(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--images", type=integer(), default=500)
    parser.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    parser.add_argument(
        "--layout", choices=["refcoco", "refclef", "grefcoco", "ref-zom"], default="refcoco", help="default: refcoco"
    )
    parser.add_argument(
        "--distractors",
        type=integer(0),
        nargs=2,
        default=(0, 3),
        metavar=("LEAST", "MOST"),
        help="similar objects per photo",
    )


def _index(parser: Parser) -> None:
    what = "the folder of data sets; or a .jsonl file, a .lmdb of CRIS, or Parquet of a mirror"
    parser.add_argument("source", type=Path, metavar="REFER_ROOT", help=what)
    parser.add_argument("--dataset", help="refcoco, refcoco+, refcocog, refclef, grefcoco or ref-zom; for a folder")
    parser.add_argument("--split-by", help="unc, umd, google, berkeley or final; for a folder")
    parser.add_argument("--split", help="train, val, test, testA, ...; for all but a .lmdb")
    where = "the folder of photos, once for each if there are several; or s3://bucket/prefix"
    parser.add_argument("--images", required=True, action="append", metavar="DIR", help=where)
    parser.add_argument(
        "--box-format",
        choices=["xywh", "xyxy", "rel_xywh", "rel_xyxy"],
        help="of the boxes of a .jsonl file; default: as its lines say, else xywh",
    )
    what = "photos, by file name, for a folder; or all of other data sets, G.ris.h5"
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="WHAT", help=what)
    parser.add_argument(
        "--exif",
        choices=["ignore", "apply", "refuse"],
        help="photos that EXIF turns: as stored, as viewers show them, or an error (default for a .jsonl file)",
    )
    parser.add_argument("--verify", action="store_true", help="decode every photo")
    parser.add_argument("--skip-empty", action="store_true", help="skip sentences without text, and refs without any")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave photos out that cannot be used")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.ris.h5")


def _mine(parser: Parser) -> None:
    parser.add_argument("dataset", type=Path, metavar="F.ris.h5")
    parser.add_argument("--model", nargs="+", help="open_clip's name, or a model config .json; several are averaged")
    parser.add_argument("--pretrained", nargs="+", metavar="TAG_OR_FILE", help="for each model")
    parser.add_argument("--embeddings", type=Path, metavar="F.neg.h5", help="take them from a table instead of a model")
    what = "take a .parquet, .csv or .tsv file of sent_id, image_id and score, or an .lmdb, instead of a model"
    parser.add_argument("--scores", type=Path, metavar="FILE", help=what)
    parser.add_argument("--depth", type=integer(), default=1000, help="candidates kept per sentence")
    parser.add_argument(
        "--exclude-similar-photos", type=number(), metavar="S", help="photos more similar than S to the target's photo"
    )
    parser.add_argument("--exclude-category", action="store_true", help="photos that show the target's category")
    parser.add_argument(
        "--exclude-siblings",
        type=number(),
        metavar="S",
        help="photos more similar than S to another sentence of the ref",
    )
    parser.add_argument(
        "--exclude-photos-of", type=Path, nargs="+", default=[], metavar="G.ris.h5", help="photos of other data sets"
    )
    parser.add_argument("--approximate", action="store_true", help="search by FAISS: for millions of photos")
    parser.add_argument("--probes", type=integer(), help="of FAISS's lists; default: a sixteenth of them")
    parser.add_argument("--batch-size", type=integer(1, LARGEST_BATCH), default=64)
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--images", metavar="DIR", help="image root in place of the recorded one")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.neg.h5")


def _tiles(parser: Parser) -> None:
    parser.add_argument("dataset", type=Path, metavar="F.ris.h5")
    parser.add_argument("--size", type=integer(1, LARGEST_FRAME), required=True, help="of the frames, in pixels")
    parser.add_argument(
        "--grids", type=integer(), nargs="+", default=[1, 2], metavar="GRID", help="1 single, 2 2x2, 3 3x3"
    )
    parser.add_argument("--resample", default="cv2-linear", help="cv2-linear or pillow-bilinear")
    parser.add_argument("--images", metavar="DIR", help="image root in place of the recorded one")
    parser.add_argument("--num-threads", type=integer(1, most_threads()))
    parser.add_argument("--device", help="cpu or cuda; by default a GPU if there is one")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.tiles.h5")


def _inspect(parser: Parser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--max-similarity", type=number(), nargs="+", metavar="TAU", help="pool sizes for these")
    parser.add_argument("--top-k", type=integer(), nargs="+", metavar="K", help="and these")
    parser.add_argument("--policy", type=Path, metavar="POLICY.json", help="pool sizes for a policy file's tau and K")


def _preview(parser: Parser) -> None:
    _data(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="sheet.png")
    parser.add_argument("--count", type=integer(), default=12)
    parser.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0)
    parser.add_argument("--size", type=integer(1, LARGEST_FRAME), default=480, help="of a sample, in pixels")
    parser.add_argument("--policy", type=Path, metavar="POLICY.json", help="samples of this policy file")


def _report(parser: Parser) -> None:
    _data(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="report.html")
    parser.add_argument("--examples", type=integer(), default=12, help="expressions with their candidates as pictures")
    parser.add_argument("--seed", type=integer(0, LARGEST_SEED), default=0, help="of the choice of examples")
    _rules(parser)


def _tune(parser: Parser) -> None:
    parser.add_argument("dataset", type=Path, metavar="F.ris.h5")
    parser.add_argument("negatives", type=Path, metavar="F.neg.h5")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="policy.json")
    _rules(parser)


def _bench_loader(parser: Parser) -> None:
    _data(parser)
    parser.add_argument("--mode", choices=["stream", "host", "pinned", "device"], default="stream")
    parser.add_argument("--tiles", type=Path, metavar="F.tiles.h5", help="for every mode but stream")
    parser.add_argument("--device", help="cpu or cuda; by default cuda for the modes pinned and device")
    parser.add_argument(
        "--device-budget", type=integer(0, LARGEST_SEED), metavar="BYTES", help="of GPU memory, for --mode device"
    )
    parser.add_argument("--baseline", action="store_true", help="a PyTorch DataLoader beside it")
    parser.add_argument(
        "--starve", type=number(0, LONGEST_STEP_MS), metavar="MS", help="share of waiting with training steps this long"
    )
    parser.add_argument("--batch-size", type=integer(1, LARGEST_BATCH), default=16)
    parser.add_argument("--size", type=integer(1, LARGEST_FRAME), default=480)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resample", default="cv2-linear")
    parser.add_argument("--num-threads", type=integer(1, most_threads()))
    parser.add_argument("--p-mined", type=number(0, 1), help="default 1; not with --policy")
    parser.add_argument("--policy", type=Path, metavar="POLICY.json", help="time samples of this policy file")
    parser.add_argument("--pairs", type=integer(), default=7)
    parser.add_argument("--steps", type=integer(), default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")


def _doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true")


def _data(parser: Parser) -> None:
    parser.add_argument("dataset", type=Path, metavar="F.ris.h5")
    parser.add_argument("negatives", type=Path, metavar="F.neg.h5")
    parser.add_argument("--images", metavar="DIR", help="image root in place of the recorded one")


def _rules(parser: Parser) -> None:
    parser.add_argument(
        "--passing", type=number(), default=0.25, help="share of the own photos that tau may let pass (default 0.25)"
    )
    parser.add_argument(
        "--grid", type=integer(), choices=[2, 3], default=2, help="mosaics to fill: 2 for 2x2, 3 for 3x3"
    )


COMMANDS: list[tuple[str, Callable[[Parser], None], str]] = [
    ("demo", _demo, "the whole way on generated data, ending in a picture"),
    ("synth", _synth, "generate a data set in the layout of a published one"),
    ("index", _index, "annotations and photos to a data set file"),
    ("mine", _mine, "rank all photos for every sentence by CLIP"),
    ("tiles", _tiles, "decode and resample every photo once"),
    ("inspect", _inspect, "what is in a file"),
    ("preview", _preview, "draw a contact sheet of samples"),
    ("report", _report, "a page to choose tau and K by eye"),
    ("tune", _tune, "propose tau and K"),
    ("bench loader", _bench_loader, "the Loader beside decode-only DALI"),
    ("doctor", _doctor, "what is installed, whether it fits this machine, whether the pixels are right"),
]
