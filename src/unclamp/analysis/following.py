"""The curve of a file that another program is still writing, each time there is more of it.

What has been read stays: where the file is truncated or replaced, as by logrotate, the new text
goes on behind the old one. A last line counts when it is complete.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from unclamp.analysis.curves import Curve, read_curve, read_text_curve
from unclamp.analysis.selections import AmbiguousCurveError, Choice
from unclamp.analysis.texts import STANDARD_INPUT, to_text
from unclamp.errors import AnalysisError

EVERY = 1.0
"""Seconds between two looks at a file."""
_PATIENCE = 4.0
"""A look comes no sooner than after so many times what the last one took."""
_CHUNK = 1 << 16


class GrowingFile:
    """The text of a file so far.

    Args:
        path: The file; it may be missing for a while later on.

    Raises:
        AnalysisError: From `read`: it is no text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._data = b""
        self._earlier = ""
        self.ended = False

    def read(self) -> str | None:
        """Return all complete lines so far; None if nothing was written since the last time."""
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if seen == self._seen:
                return None
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None  # being replaced
        except OSError as error:
            raise AnalysisError(f"cannot read {self._path}: {error}") from error
        self._seen = seen
        if not data.startswith(self._data):
            self._earlier += _complete(to_text(self._data, self._path))
        self._data = data
        text = to_text(data, self._path)
        return text if _is_document(text) else self._earlier + _complete(text)


class GrowingPipe:
    """The text that came in through the standard input so far."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._count = -1
        self.ended = False
        threading.Thread(target=self._gather, daemon=True).start()

    def read(self) -> str | None:
        """Return all complete lines so far; None if nothing came since the last time."""
        ended = self._is_closed
        data = bytes(self._data)
        if len(data) == self._count and not ended:
            return None
        self._count = len(data)
        self.ended = ended
        text = to_text(data, Path(STANDARD_INPUT))
        return text if ended else _complete(text)

    _is_closed = False

    def _gather(self) -> None:
        number = sys.stdin.fileno()
        while chunk := os.read(number, _CHUNK):
            self._data += chunk
        self._is_closed = True


def follow_curve(
    path: Path, choice: Choice, *, stop: threading.Event, every: float = EVERY
) -> Iterator[Curve]:
    """Yield the curve whenever there is more of it, until `stop` is set or a pipe is closed.

    A folder is read anew each time. What cannot be read yet, such as a file without a loss, is
    waited for.

    Args:
        path: A file, a folder, or "-" for the standard input.
        choice: What is asked for of it.
        stop: Ends the following.
        every: Seconds between two looks.

    Raises:
        AnalysisError: Nothing is there; or what is there is ambiguous, or no curve in the end.
    """
    is_pipe = str(path) == STANDARD_INPUT
    if not is_pipe and not path.exists():
        raise AnalysisError(f"expected a run or a file with a loss curve, but {path} is not there")
    growing = GrowingPipe() if is_pipe else None if _is_read_whole(path) else GrowingFile(path)
    has_curve, reason = False, AnalysisError(f"{path} holds no loss yet")
    while True:
        began = time.monotonic()
        try:
            text = None if growing is None else growing.read()
            if growing is None:
                yield read_curve(path, column=choice.column, run=choice.run, split=choice.split)
                has_curve = True
            elif text is not None:
                yield read_text_curve(text, path, choice)
                has_curve = True
        except AmbiguousCurveError:
            raise
        except AnalysisError as error:
            reason = error
        ended = growing is not None and growing.ended
        if ended or stop.wait(max(every, _PATIENCE * (time.monotonic() - began))):
            break
    if not has_curve:
        raise reason


def _is_read_whole(path: Path) -> bool:
    """Return whether a path holds no text that grows: a folder, or events."""
    return path.is_dir() or "tfevents" in path.name


def _complete(text: str) -> str:
    """Return a text without a last line that is not ended."""
    return text[: max(text.rfind("\n"), text.rfind("\r")) + 1]


def _is_document(text: str) -> bool:
    """Return whether a text is one JSON document of several lines, written whole each time."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text.lstrip().partition("\n")[0])
    except ValueError:
        try:
            json.loads(text)
        except ValueError:
            return False
        return True
    return False
