"""What one experiment gave, as it travels between processes: facts, or how it failed."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from unclamp.traps.trap import Fact, Trap


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Facts by name, or `error` in one line; `seconds` is how long it took."""

    facts: Mapping[str, Fact] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)


def answer_of(trap: Trap, device: str, *, start: float) -> Answer:
    """Run an experiment in this process, which `start` was the beginning of."""
    try:
        found = trap.experiment() if trap.ranks else trap.experiment(device)
    except Exception as error:
        return Answer(error=one_line(error), seconds=time.perf_counter() - start)
    facts = {name: plain(value) for name, value in found.items()}
    return Answer(facts=facts, seconds=time.perf_counter() - start)


def plain(value: Fact) -> Fact:
    """Return a fact that JSON can hold: NaN and Inf as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def one_line(error: Exception) -> str:
    """Return an exception as its type and the first line of its message."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0] if message else 'no message'}"
