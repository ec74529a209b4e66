"""The command line, a module a command.

Results go to stdout, progress and notes to stderr, so that `--json` prints one JSON document and
nothing else. What a user can mend is one line and exit code 2. torch is imported only by the
commands that train or probe.
"""

import sys
from typing import Annotated

import typer

from unclamp.cli import (  # noqa: F401  (they register)
    advise,
    associate,
    backtest,
    compact,
    coverage,
    explain,
    importing,
    machine,
    report,
    spikes,
    study,
    traps,
    whatif,
)
from unclamp.cli.app import USER_ERROR, app, show_warnings_as_lines
from unclamp.cli.plain import show_what_can_be_shown
from unclamp.errors import UnclampError
from unclamp.quiet import quiet_imports
from unclamp.version import __version__


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unclamp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the entry point `unclamp`."""
    show_warnings_as_lines()
    show_what_can_be_shown()
    quiet_imports()
    try:
        app()
    except UnclampError as error:
        typer.echo(f"unclamp: {error}", err=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
