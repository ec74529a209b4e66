"""What every command shares: the app, the flags, and the exit codes."""

from typing import Annotated

import typer

INTERRUPTED = 130
USER_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="FP8 training in which clamping is measured, explained and prevented.",
)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
