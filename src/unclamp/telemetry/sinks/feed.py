"""A thread for sinks: a slow one delays its own numbers, and neither the log nor the training."""

import warnings
from collections.abc import Callable

from unclamp.errors import UnclampWarning
from unclamp.worker import Worker

MOST_WAITING = 1000
"""Steps and events that wait for slow sinks; more are left out."""


class SinkFeed:
    """Makes calls one after the other on a thread of its own, which begins with the first."""

    def __init__(self) -> None:
        self._worker = Worker[Callable[[], None]](lambda call: call(), name="unclamp-sinks")
        self._left_out = 0
        self._is_told = False

    def put(self, call: Callable[[], None]) -> None:
        """Have a call made, which must not raise; leave it out if too many wait."""
        if self._worker.waiting >= MOST_WAITING:
            self._left_out += 1
            return
        self._worker.put(call)

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
        self._worker.close()
