"""What Ctrl-C does to a command that has nothing to put away."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from unclamp.cli.app import INTERRUPTED


@contextmanager
def leaving_at_ctrl_c(words: str) -> Iterator[None]:
    """While entered, Ctrl-C prints one line and ends the process at once, with exit code 130.

    An exception would do neither everywhere: libraries turn it into errors of their own in the
    midst of an import or a query, and some go on as if nothing had happened. So there is no
    exception, and nothing is cleaned up: use it only where files are written atomically and no
    process is running. Where Ctrl-C is ignored, as under nohup, it stays ignored.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # not print: it may be printing just now
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{words}\n".encode())
        os._exit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
