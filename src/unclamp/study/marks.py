"""What a study's marked steps are called: those whose batch differs from the others. Torch-free.

A run's log names them by an event at each one, whose kind is the word; a report compares the arms
at these steps apart from all others, and uses the same word.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How the marked steps of a scenario are named.

    Attributes:
        word: Before "step": the kind of their events, and the word in every sentence.
        what: What their batches have, for the event; of planted ones `planting` says it.
        group: The kind of their batches in the run's log, where they are to be judged among
            themselves. Planted steps have none: their losses are to be compared with the others.
    """

    word: str
    what: str = ""
    group: str | None = None


PLANTED = Mark(word="planted")
FEW_LABELS = Mark(
    word="few-label", what="a loss that is the mean over few labels", group="few labels"
)
MARKS = {"outlier": PLANTED, "labels": FEW_LABELS}
"""By scenario; one that is not here has no marked steps."""
WORDS = tuple(mark.word for mark in MARKS.values())
