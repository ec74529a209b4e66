"""A thread that handles what it is given, one thing after the other, and is not left behind.

Left behind is a thread whose work is lost, or for which the interpreter waits without end:

- A thread that ends with the interpreter (a daemon) loses what it still had to do. One that does
  not is waited for at exit, for ever if nobody told it that no more will come. So a `Worker` is a
  daemon that is closed at exit, if it was not before.
- Python 3.11 takes a thread for ended once a join of it was interrupted by Ctrl-C. So it is waited
  for by an event that the thread sets, not by `Thread.join`; see `wait_for`.
- After a fork the child has the queue and not the thread. There a worker does nothing.
"""

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
_LOOK_S = 0.2
"""How often to look whether a thread still lives."""


@dataclass(frozen=True)
class _Task(Generic[T]):
    """One thing to handle; a marker, in contrast, is an event to set."""

    item: T


def _nothing() -> None:
    pass


class Worker(Generic[T]):
    """Handles things in the order in which they were put, on a thread that begins with the first.

    What `handle` raises does not end the thread: the newest failure is kept, for
    `take_failure`, and the next thing is handled.

    Args:
        handle: Called on the thread for each thing.
        name: The thread's.
        on_begin: Called on the thread before all else.
        on_due: Called on the thread every `interval_s` at the latest, for `wait`, and at the end.
        interval_s: Seconds between calls of `on_due`; without it there are none but those asked
            for.
        closes_at_exit: Whether the interpreter's exit closes it; False where an owner does that,
            which has something to say first.
    """

    def __init__(
        self,
        handle: Callable[[T], None],
        *,
        name: str,
        on_begin: Callable[[], None] = _nothing,
        on_due: Callable[[], None] = _nothing,
        interval_s: float | None = None,
        closes_at_exit: bool = True,
    ) -> None:
        self._handle, self._name = handle, name
        self._on_begin, self._on_due, self._interval_s = on_begin, on_due, interval_s
        self._closes_at_exit = closes_at_exit
        self._queue: queue.SimpleQueue[_Task[T] | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._is_closing = False
        self._process = os.getpid()

    @property
    def waiting(self) -> int:
        """How many things were put and are not being handled yet."""
        return self._queue.qsize()

    @property
    def has_died(self) -> bool:
        """Whether the thread is gone without having been told to end."""
        thread = self._thread
        is_gone = thread is not None and not thread.is_alive()
        return is_gone and not self._is_closing and os.getpid() == self._process

    def put(self, item: T) -> None:
        """Have something handled; return at once.

        Do nothing after `close`, in a fork, and where the thread has died.
        """
        if not (self._is_closing or self.has_died) and os.getpid() == self._process:
            self._begin()
            self._queue.put(_Task(item))

    def wait(self) -> None:
        """Return when all that was put so far is handled, and `on_due` was called after it."""
        thread = self._thread
        if thread is None or self._is_closing or os.getpid() != self._process:
            return
        done = threading.Event()
        self._queue.put(done)
        wait_for(done, thread)

    def close(self) -> None:
        """Handle all that was put, end the thread, and wait for it. May be called again.

        After a Ctrl-C in here it goes on to end, and a second call waits again.
        """
        if os.getpid() != self._process:
            return
        is_first, self._is_closing = not self._is_closing, True
        if self._thread is None:
            return
        if is_first:
            self._queue.put(None)
        wait_for(self._ended, self._thread)
        atexit.unregister(self.close)

    def take_failure(self) -> BaseException | None:
        """Return the newest failure since the last call, None if there was none."""
        failure, self._failure = self._failure, None
        return failure

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            if self._closes_at_exit:
                # Before the start: were there a Ctrl-C between the two, the exit would not wait.
                atexit.register(self.close)
            self._thread.start()

    def _work(self) -> None:
        try:
            self._try(self._on_begin)
            self._serve()
        except BaseException as error:  # such as one that another thread raised in this one
            self._failure = error
        finally:
            self._ended.set()

    def _serve(self) -> None:
        due_at = self._next_due()
        while True:
            try:
                task = self._queue.get(timeout=self._left(due_at))
            except queue.Empty:
                task = threading.Event()  # it is time, and nobody waits for it
            if isinstance(task, _Task):
                self._try(lambda item=task.item: self._handle(item))
            is_due = not isinstance(task, _Task) or self._left(due_at) == 0.0
            if is_due:
                self._try(self._on_due)
                due_at = self._next_due()
            if isinstance(task, threading.Event):
                task.set()
            if task is None:
                return

    def _next_due(self) -> float | None:
        return None if self._interval_s is None else time.monotonic() + self._interval_s

    @staticmethod
    def _left(due_at: float | None) -> float | None:
        return None if due_at is None else max(0.0, due_at - time.monotonic())

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # SystemExit too: nobody else would handle the rest
            self._failure = error


def wait_for(event: threading.Event, thread: threading.Thread) -> None:
    """Return when `event` is set, or `thread` has ended without setting it.

    Unlike `Thread.join` this may be interrupted by Ctrl-C and called again.
    """
    while not event.wait(_LOOK_S) and thread.is_alive():
        pass
