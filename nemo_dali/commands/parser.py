"""How a command reads its line and shows what it takes: as in typer, but with several values after a flag."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from nemo_dali._checks import as_list
from nemo_dali.io.output import check_inputs
from nemo_dali.io.terminal import say

# The base of all errors in a command line: click's, which typer brings along from 0.26 on.
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__base__)
SEVERAL = "..."  # ends the metavar of an option that takes any number of values after one flag
HELP = ("-h", "--help")
# The parameters that name what a command reads, which must not be overwritten.
INPUTS = (
    *("source", "dataset", "negatives", "embeddings", "scores", "exclude_photos_of", "leave_out"),
    *("pretrained", "model", "policy", "tiles", "truth"),
)


class _Shown:
    """Usage and help as lines, wherever they are shown: in a pipe, on a terminal, or for nobody."""

    params: list[Any]

    def get_help(self, ctx: Any) -> str:
        say(*super().get_help(ctx).split("\n"))  # type: ignore[misc]  # a command's or a group's
        raise typer.Exit

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return cast(list[str], super().parse_args(ctx, args))  # type: ignore[misc]  # as above
        except UsageError as error:
            error.ctx = error.ctx or ctx  # not every error has one
            raise

    def get_help_option_names(self, ctx: Any) -> list[str]:
        return [*HELP]

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        formatter.write_usage(ctx.command_path, " ".join(self.collect_usage_pieces(ctx)), prefix="usage: ")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        needed = [param for param in self.params if param.required]
        return ["[OPTIONS]", *(" ".join([*param.opts[-1:] * _is_option(param), param.metavar]) for param in needed)]


class Group(_Shown, TyperGroup):
    """Commands, and after them groups of commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: isinstance(self.commands[name], Group))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "COMMAND ..."]


class Command(_Shown, TyperCommand):
    """A command whose options may take several values: ``--grids 1 2`` is ``--grids 1 --grids 2``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = [param for param in self.params if _is_option(param) and not param.is_flag]
        several = {flag for param in options if (param.metavar or "").endswith(SEVERAL) for flag in param.opts}
        valued = {flag for param in options for flag in param.opts}
        try:
            args = [*_repeated(args, several=several, valued=valued)]
        except LookupError as error:
            ctx.fail(f"Option '{error.args[0]}' requires an argument.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Its output must not be one of its inputs; an argument that it refuses is wrong usage."""
        try:
            if (output := ctx.params.get("output")) is not None:
                for given in map(ctx.params.get, INPUTS):
                    check_inputs(Path(output), as_list(given))
            return super().invoke(ctx)
        except UnicodeEncodeError:
            raise
        except ValueError as error:
            ctx.fail(str(error))


def _is_option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def _repeated(words: Sequence[str], *, several: set[str], valued: set[str]) -> Iterator[str]:
    """A line's words, with the flag of an option that has several values before each value.

    Args:
        several: flags of such options.
        valued: flags of options with a value; a word that begins with a dash is not a value, unless it is a number.

    Raises:
        LookupError: the flag that has no value.
    """
    flag, is_first = "", False
    for i, word in enumerate(words):
        is_value = not re.match(r"-[^\d.]", word)
        if is_first and not is_value:
            raise LookupError(flag)
        if word == "--":
            yield from words[i:]
            return
        if is_value and not is_first and flag in several:
            yield flag
        yield word
        is_first = word in valued
        flag = flag if is_value else word
