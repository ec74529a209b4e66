"""Which steps: every one, every n-th, or every n-th and those in which anything was clamped."""

from dataclasses import dataclass


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
