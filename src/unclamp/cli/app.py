"""What every command shares: the app, the flags, and the exit codes."""

import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from unclamp.errors import UnclampWarning

INTERRUPTED = 130
USER_ERROR = 2


class _Command(TyperCommand):
    """A command whose help shows flags as flags: typer writes `--json <bool>`, which is none."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, those that take no value without the name of one."""
        return _bare_flags(super().get_params(ctx))


class _Group(TyperGroup):
    """As `_Command`, for the options of `unclamp` itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, as a command does."""
        return _bare_flags(super().get_params(ctx))


class _App(typer.Typer):
    """Makes each of its commands a `_Command`."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """Register a command, as `typer.Typer` does."""
        settings.setdefault("cls", _Command)
        return super().command(name, **settings)


def _bare_flags(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


app = _App(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="FP8 training in which clamping is measured, explained and prevented.",
)


def command_group(name: str, *, help: str) -> typer.Typer:
    """Return a group of commands, `unclamp NAME COMMAND`, that is part of the app."""
    group = _App(cls=_Group, no_args_is_help=True, help=help)
    app.add_typer(group, name=name)
    return group


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def show_warnings_as_lines() -> None:
    """Have what unclamp warns of shown as one line on stderr, without a place in the source."""
    usual = warnings.formatwarning

    def format_line(message: Any, category: type[Warning], *place: Any, **more: Any) -> str:
        if issubclass(category, UnclampWarning):
            return f"unclamp: {message}\n"
        return usual(message, category, *place, **more)

    warnings.formatwarning = format_line
