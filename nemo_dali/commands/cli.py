"""The command ``nemo-dali``. Exit codes: 0 done, 1 failed with a one-line reason, 2 wrong usage."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

from nemo_dali._version import __version__
from nemo_dali.commands import examination, preparation
from nemo_dali.commands.limits import raise_it_first
from nemo_dali.commands.parser import Command, Group, UsageError
from nemo_dali.errors import NemoError, ToldElsewhere
from nemo_dali.io.terminal import drop_unwritten, open_closed_streams, say

LONGEST_NAME = 4096  # characters around one that is not UTF-8

app = typer.Typer(cls=Group, rich_markup_mode=None, add_completion=False)  # help is plain text, as it is in a pipe
bench = typer.Typer(cls=Group)
for function in (
    *(preparation.demo, preparation.synth, preparation.index, preparation.mine),
    *(examination.tune, examination.report, examination.preview),
    *(preparation.tiles, examination.inspect, examination.doctor),
):
    app.command(cls=Command)(function)
bench.command("loader", cls=Command)(examination.bench_loader)
bench.command("peers", cls=Command)(examination.bench_peers)
app.add_typer(bench, name="bench", help="Time the Loader: bench loader, bench peers.")


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"nemo-dali {__version__}")
        raise typer.Exit


@app.callback()
def nemo_dali(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """NeMo mosaics inside a DALI pipeline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    open_closed_streams()
    command = get_command(app)
    try:
        with command.make_context("nemo-dali", list(sys.argv[1:] if arguments is None else arguments)) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except UsageError as error:
        _refuse(error)
    except ToldElsewhere:
        return 1
    except NemoError as error:
        flag = "--json" if context.invoked_subcommand == "bench" else "-o"
        return _fail(str(error).replace("another place with -o.", f"another place with {flag}."))
    except UnicodeEncodeError as error:
        name = error.object[: error.end][-LONGEST_NAME:] + error.object[error.end :][:LONGEST_NAME]
        return _fail(f"The name '{name}' is not UTF-8, but files and pages store names as UTF-8. Rename it.")
    except ImportError as error:
        return _fail(
            f"A library cannot be loaded ({_gist(error)}). {raise_it_first()}Find the cause with: nemo-dali doctor"
        )
    except (OSError, MemoryError) as error:  # the system's own refusals
        return _fail(
            f"{_gist(error) or 'out of memory'}. {raise_it_first()}Free disk space or memory, or ask for less."
        )
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        limit = raise_it_first()
        return _fail(f"The system cannot start another thread. {limit}Raise the limits (ulimit -u), or ask for less.")
    except KeyboardInterrupt:
        return _fail("interrupted; files under their real names are complete")
    return 0


def _fail(reason: str) -> int:
    with suppress(OSError):  # stderr may be on the full disk too
        say(f"nemo-dali: {reason}", error=True)
    drop_unwritten()
    return 1


def _refuse(error: typer.BadParameter) -> NoReturn:
    """Report wrong usage of the command in the error's context, and exit."""
    assert error.ctx is not None
    reason = error.format_message().replace(": Value error, ", ": ")  # of pydantic's, from typer 0.29 on
    say(*error.ctx.get_usage().split("\n"), f"{error.ctx.command_path}: error: {reason}", error=True)
    raise SystemExit(2)


def _gist(error: BaseException) -> str:
    """What the innermost cause says, on one line: some libraries wrap it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".")
