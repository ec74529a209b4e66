"""Processes of tests that get a Ctrl-C."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


def with_ctrl_c() -> None:
    """Take Ctrl-C as a program of a terminal does, whatever the tests themselves do with it.

    A shell has what it starts in the background ignore it, and children inherit that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def ended(process: "subprocess.Popen[str]") -> "Iterator[subprocess.Popen[str]]":
    """Have a process ended in any case: `Popen`'s own block waits for it without a limit."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
