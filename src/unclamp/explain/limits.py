"""How much may be asked about a spike."""

from collections.abc import Collection
from dataclasses import dataclass

from unclamp.errors import ReplayError
from unclamp.explain.players import GROUPS, Group
from unclamp.formats import unknown_name

LEAST_REPLAYS = 4
"""The plain replay, the one with nothing clamped, and two placebos."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much to ask.

    Attributes:
        replays: Most replays, those of earlier processes included. One from an older snapshot
            counts as one, and takes more steps (`Explanation.steps`). If a whole answer from before
            had more, it is returned instead.
        leading: Sites that are replayed by themselves.
        group: What is un-clamped together.
        seed: Of the orders that are drawn.
        anyway: Go on though the code has changed, or the losses do not come back.

    Raises:
        ReplayError: Fewer replays than the first questions need, no leading site, or an unknown
            group.
    """

    replays: int = 100
    leading: int = 12
    group: Group = "site"
    seed: int = 0
    anyway: bool = False

    def __post_init__(self) -> None:
        if self.replays < LEAST_REPLAYS:
            raise ReplayError(
                f"expected a budget of {LEAST_REPLAYS} replays or more, got {self.replays}"
            )
        if self.leading < 1:
            raise ReplayError(f"expected 1 leading site or more, got {self.leading}")
        check_choice("group", self.group, GROUPS)


def check_choice(what: str, value: object, known: Collection[str]) -> None:
    """Raise a ReplayError for a setting that is none of `known`, naming the nearest."""
    if value not in known:
        raise ReplayError(str(unknown_name(what, value, list(known))))
