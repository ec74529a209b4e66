"""What a training that went back to before a spike is told."""

from collections.abc import Mapping
from dataclasses import dataclass

from unclamp.analysis.explanation import MOST, Explanation, Override
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


def mends(override: Override) -> bool:
    """Whether a change is worth going back for: by a replay it removes most of the spike.

    What it adds at other steps counts against it: those come again too.
    """
    return override.removed is not None and override.removed - override.added >= MOST
