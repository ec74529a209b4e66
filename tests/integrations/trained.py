"""What a training of torchtitan's came to, for a process that has not loaded torchtitan."""

from dataclasses import dataclass

STATE_FILE = "state-{rank}.pt"
"""In the dump folder: all tensors that the training would save, whole, by name."""
Row = tuple[int, float, float, float]
"""Step, loss, gradient norm, learning rate."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to.

    Attributes:
        logged: What torchtitan itself logged.
        validated: What its validator logged: step, loss.
        converted: Names of the products that are converted.
        updates: How many updates each ledger made.
        error: What the training raised.
    """

    logged: list[Row]
    validated: list[tuple[int, float]]
    converted: list[str]
    updates: list[int]
    error: str
