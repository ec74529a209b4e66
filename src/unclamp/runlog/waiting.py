"""Wait for what a thread will say, and never longer than it lives."""

import threading

_LOOK_S = 0.2
"""How often to look whether the thread still lives."""


def wait_for(event: threading.Event, thread: threading.Thread) -> None:
    """Return when `event` is set, or `thread` has ended without setting it.

    Unlike `Thread.join` this may be interrupted by Ctrl-C and called again: Python 3.11 takes a
    thread for ended once a join of it was interrupted.
    """
    while not event.wait(_LOOK_S) and thread.is_alive():
        pass
