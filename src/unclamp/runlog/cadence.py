"""Which steps: every one, every n-th, or every n-th and those in which anything was clamped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Every:
    """Every n-th step from 0 on.

    Args:
        steps: n; 1 is every step.
        or_clamped: Also each step in which anything was clamped.

    Raises:
        ValueError: `steps` is not a whole number of at least 1.

    Example:
        >>> [step for step in range(10) if Every(4).is_due(step)]
        [0, 4, 8]
    """

    steps: int = 1
    or_clamped: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"expected every 1 step or more, got {self.steps!r}")

    def is_due(self, step: int) -> bool:
        """Whether the step's number alone says so."""
        return step % self.steps == 0


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often a run's casts were recorded.

    Attributes:
        casts: The steps whose casts were written.
        inspect: Those whose casts got a closer look, which are written too; None for none.
    """

    casts: Every
    inspect: Every | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether there are steps whose casts were not to be written."""
        return self.casts.steps > 1

    @classmethod
    def from_dict(cls, data: object) -> Self | None:
        """Return the cadence that a header holds; None for anything that is none."""
        if not isinstance(data, Mapping):
            return None
        casts = _every(data.get("casts"))
        return None if casts is None else cls(casts=casts, inspect=_every(data.get("inspect")))


def _every(data: object) -> Every | None:
    if not isinstance(data, Mapping):
        return None
    try:
        return Every(data.get("steps"), or_clamped=bool(data.get("or_clamped")))  # type: ignore[arg-type]
    except ValueError:
        return None
