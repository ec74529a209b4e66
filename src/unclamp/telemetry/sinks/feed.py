"""A thread for sinks: a slow one delays its own numbers, and neither the log nor the training."""

import queue
import threading
import warnings
from collections.abc import Callable

from unclamp.errors import UnclampWarning

MOST_WAITING = 1000
"""Steps and events that wait for slow sinks; more are left out."""


class SinkFeed:
    """Makes calls one after the other on a thread of its own, which begins with the first."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._left_out = 0
        self._is_told = False

    def put(self, call: Callable[[], None]) -> None:
        """Have a call made, which must not raise; leave it out if too many wait."""
        if self._queue.qsize() >= MOST_WAITING:
            self._left_out += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="unclamp-sinks", daemon=True)
            self._thread.start()
        self._queue.put(call)

    def warn(self, *, stacklevel: int = 3) -> None:
        """Warn once, from the training's thread, that steps were left out."""
        if self._left_out and not self._is_told:
            self._is_told = True
            warnings.warn(
                f"the sinks are slower than the training: {MOST_WAITING} steps wait, and further "
                "ones are left out of them. The run log has them all.",
                UnclampWarning,
                stacklevel=stacklevel,
            )

    def close(self) -> None:
        """Wait until all calls are made; later ones are not."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call()
