"""A command as it is typed, without the seconds that a process of its own would take to import."""

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from unclamp.cli import main


@dataclass(kw_only=True)
class Typed:
    """How a command ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def _to_stderr(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Show a warning as a program does, where pytest would keep it."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def unclamp(*arguments: object) -> Typed:
    """Run `unclamp` with these arguments in this process, by the entry point of the program."""
    out, err = io.StringIO(), io.StringIO()
    line = ["unclamp", *map(str, arguments)]
    with (
        warnings.catch_warnings(),
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", line),
        patch.object(warnings, "formatwarning", warnings.formatwarning),
    ):
        warnings.simplefilter("default")  # in tests they are errors
        warnings.simplefilter("ignore", DeprecationWarning)  # as in any Python that a user starts
        warnings.showwarning = _to_stderr
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
    assert isinstance(code, int), code
    return Typed(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
