"""What workers of a study tell. Torch-free, because what carries it needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a worker tells: a run's step and loss; `status` at its end."""

    label: str
    step: int
    loss: float | None = None
    status: str | None = None


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line that a worker would have written to stderr.

    Args:
        text: The line; of a warning its message.
        label: The run that was training, "" before the first.
        kind: The name of the warning's class, "" for what is no warning.
        once: Whether all runs say the same, so that once is enough.
    """

    text: str
    label: str = ""
    kind: str = ""
    once: bool = False


Message = Progress | Note
