"""What a training that went back to before a spike is told."""

from collections.abc import Mapping
from dataclasses import dataclass

from unclamp.analysis.explanation import Explanation
from unclamp.explain.training import Batch


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """The training is as it was before `step`, with some sites switched.

    Attributes:
        step: The step that comes next.
        batches: The batches from that step on, as they were.
        explanation: Why; what RUN/explain-<onset>.json says.
    """

    step: int
    batches: Mapping[int, Batch]
    explanation: Explanation
