"""What snapshots need of a recorder: it takes events, and may know the run's folder and groups."""

from pathlib import Path
from typing import Any, Protocol

from unclamp.errors import ReplayError
from unclamp.runlog import NUMBER


class Events(Protocol):
    """Takes events, as a Recorder does."""

    def event(self, kind: str, step: int | None = None, **data: Any) -> None:
        """Record that something happened."""


def numbered(path: str | Path, recorder: Events | None) -> Path:
    """Return a run's folder, with the number that the recorder chose where "{n}" stands for it.

    Raises:
        ReplayError: The recorder has chosen none.
    """
    if NUMBER not in str(path):
        return Path(path)
    chosen = getattr(recorder, "path", None)
    if not isinstance(chosen, Path):
        raise ReplayError(
            f"a recorder chooses the number of {str(path)!r}: give it too, recorder=..., or its "
            "folder, recorder.path"
        )
    return chosen


def group_of(recorder: Events | None, step: int) -> str | None:
    """Return the group that a recorder was given for a step that it has just recorded."""
    ask = getattr(recorder, "group_of", None)
    return None if ask is None else ask(step)
