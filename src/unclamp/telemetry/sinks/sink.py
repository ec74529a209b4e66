"""What a sink is, and how the recorder keeps several of them.

A sink that fails costs itself, never another sink or the run. The recorder starts and closes the
sinks from the training's thread and hands them every step on a thread of their own, so that a slow
one delays the numbers and not the training. That thread sees the context variables (`contextvars`)
of whoever started the sinks: there a tracker may keep its open run.
"""

import contextvars
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

from unclamp.errors import UnclampWarning, UnsupportedError
from unclamp.runlog import Columns, Header, Status
from unclamp.telemetry.sinks.numbers import SiteInfo, site_infos, summarise

NumbersFunction = Callable[[int, dict[str, float]], object]
"""A function of the step and its numbers, as `summarise` names them."""


@runtime_checkable
class Sink(Protocol):
    """What the recorder calls. An exception ends this sink's part, with a warning to the user.

    A sink with an attribute `every_rank` that is true is used on every rank, others on rank 0.
    """

    def start(self, header: Header, sites: Mapping[int, SiteInfo]) -> None:
        """Begin a run, called once from the training's thread; `sites` by their id."""
        ...

    def step(self, step: int, steps: Columns, casts: Columns | None) -> None:
        """Take one step's rows of the tables `steps` and `casts`, on another thread.

        The columns are shared with the run log: read them only. `casts` is None at a step
        without recorded casts.
        """
        ...

    def event(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        """Take an event with its JSON data, on the thread that `step` is called on."""
        ...

    def close(self, status: Status) -> None:
        """End the run, called once after the last step."""
        ...


class Sinks:
    """The sinks of one recorder. No method raises because of a sink; `warn` tells the user.

    Args:
        sinks: Sinks, and functions `f(step, numbers)`.
        rank: This process's rank; above 0 only sinks that say `every_rank` are used.

    Raises:
        UnsupportedError: Something is neither a sink nor a function.
    """

    def __init__(self, sinks: Iterable[Sink | NumbersFunction] = (), *, rank: int = 0) -> None:
        everything = [(_name(sink), _as_sink(sink)) for sink in sinks]
        self._sinks = [
            (name, sink)
            for name, sink in everything
            if rank == 0 or getattr(sink, "every_rank", False)
        ]
        self._failures: list[str] = []
        self._lock = threading.Lock()  # failures come from the thread, warnings leave outside it
        self._closed = False
        self._context = contextvars.copy_context()

    def __len__(self) -> int:
        """Return how many sinks still take numbers."""
        return len(self._sinks)

    def start(self, header: Header, *sites: Columns) -> None:
        """Start every sink, from the training's thread, and warn of those that fail.

        Args:
            header: The run's header.
            *sites: The table `sites`, in one piece or more.
        """
        infos = site_infos(*sites)
        self._each("at its start", lambda sink: sink.start(header, infos), close_failed=False)
        self._context = contextvars.copy_context()  # with what the sinks have set in `start`
        self.warn(stacklevel=4)

    def step(self, step: int, steps: Columns, casts: Columns | None) -> None:
        """Hand one step's rows to every sink; after `close` to none."""
        if not self._closed:
            self._on_thread(step, lambda sink: sink.step(step, steps, casts))

    def event(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        """Hand an event to every sink; after `close` to none."""
        if not self._closed:
            self._on_thread(step, lambda sink: sink.event(step, kind, data))

    def close(self, status: Status) -> None:
        """Close every sink, once, when all steps are handed over; call `warn` after it."""
        if not self._closed:
            self._closed = True
            self._each("at its end", lambda sink: sink.close(status), close_failed=False)

    def warn(self, *, stacklevel: int = 3) -> None:
        """Warn, from the training's thread, of each sink that failed since the last call.

        The warning names the line that called the caller; `stacklevel` as in `warnings.warn`.
        """
        with self._lock:
            failures, self._failures = self._failures, []
        for failure in failures:
            warnings.warn(failure, UnclampWarning, stacklevel=stacklevel)

    def _on_thread(self, step: int, call: Callable[[Sink], None]) -> None:
        self._context.run(self._each, f"at step {step}", call)

    def _each(self, when: str, call: Callable[[Sink], None], *, close_failed: bool = True) -> None:
        for entry in list(self._sinks):
            name, sink = entry
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(entry)
                if close_failed:
                    with suppress(Exception):
                        sink.close("failed")  # what it has may still be kept
                with self._lock:
                    self._failures.append(
                        f"the sink {name} stopped {when}: {type(error).__name__}: {error}. It "
                        "gets no more numbers; the run log, other sinks and the training go on."
                    )


class _Function:
    """A function as a sink: it gets every step's numbers and hears nothing else."""

    def __init__(self, function: NumbersFunction) -> None:
        self._function = function
        self._sites: Mapping[int, SiteInfo] = {}
        self.every_rank = getattr(function, "every_rank", False)

    def start(self, header: Header, sites: Mapping[int, SiteInfo]) -> None:
        self._sites = sites

    def step(self, step: int, steps: Columns, casts: Columns | None) -> None:
        self._function(step, summarise(self._sites, steps, casts))

    def event(self, step: int, kind: str, data: Mapping[str, Any]) -> None:
        pass

    def close(self, status: Status) -> None:
        pass


def _as_sink(sink: object) -> Sink:
    if not isinstance(sink, type):
        if isinstance(sink, Sink):
            return sink
        if callable(sink):
            return _Function(sink)
    hint = f"; write {sink.__name__}(...)" if isinstance(sink, type) else ""
    raise UnsupportedError(
        "expected a sink (an object with start, step, event and close) or a function of step and "
        f"numbers, got {sink!r}{hint}"
    )


def _name(sink: object) -> str:
    named = sink if isinstance(sink, type) or hasattr(sink, "__name__") else type(sink)
    return getattr(named, "__name__", repr(sink))
