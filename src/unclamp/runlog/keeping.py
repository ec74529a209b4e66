"""By which rule old rows of `casts` are left out of a log, and what a header says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from unclamp.errors import RunLogError, did_you_mean

KEPT_SQL = """
    {clamped} OR clamped IS NULL AND saturated IS NULL
    OR coalesce(saturated, 0) > 0 OR coalesce(nonfinite, 0) > 0 OR recast > 0
    OR coalesce(NOT isfinite(amax), false) OR coalesce(NOT isfinite(scale), false)
    OR coalesce({scaled_amax} > format_max, true)
    OR range_used IS NOT NULL OR sqnr_db IS NOT NULL OR price_rounding IS NOT NULL"""
"""What is kept of any step. Here format_max is that of the row's site, null where nobody says."""


_ANY_STEP = "every cast that clamped, overshot, was cast again, held Inf or NaN, or was inspected"


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which rows of `casts` stay.

    Of the last `recent` steps, of every `every`-th step and of those within `near` steps of a
    spike or an event all of them. Of the others those that clamped, overshot, were cast again or
    held Inf or NaN, those of which nobody knows it, and those that got a closer look.

    Raises:
        RunLogError: A number is below 0, or `every` below 1.

    Example:
        >>> Keep.parse(["recent=5000", "every=16"])
        Keep(recent=5000, every=16, near=100)
    """

    recent: int = 100_000
    every: int = 16
    near: int = 100

    def __post_init__(self) -> None:
        if self.every < 1 or self.recent < 0 or self.near < 0:
            raise RunLogError(
                "expected recent and near of at least 0 and every of at least 1, got "
                f"recent={self.recent}, every={self.every}, near={self.near}"
            )

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Return the rule that texts such as "every=16" are; what none names has its default.

        Raises:
            RunLogError: A text names nothing of the rule, or twice the same, or no whole number.
        """
        names = [field.name for field in fields(cls)]
        given: dict[str, int] = {}
        for text in texts:
            name, _, number = text.partition("=")
            if name not in names:
                raise RunLogError(
                    f"expected {', '.join(f'{n}=N' for n in names[:-1])} or {names[-1]}=N, got "
                    f"{text!r}{did_you_mean(name, names)}"
                )
            if name in given:
                raise RunLogError(
                    f"expected {name}=N once at most, got {name}={given[name]} and {text}"
                )
            if not number.isascii() or not number.isdecimal():
                raise RunLogError(
                    f"expected a whole number of steps, such as {name}="
                    f"{getattr(cls, name)}, got {text!r}"
                )
            given[name] = int(number)
        return cls(**given)

    def words(self) -> str:
        """Return the rule as the end of a sentence on what stays."""
        return f"{self.every_words()}, {self.near_words()}, and {_ANY_STEP}"

    def every_words(self) -> str:
        """Return which steps stay whatever lies near them."""
        return "every step" if self.every == 1 else f"one step in {self.every:,}"

    def near_words(self) -> str:
        """Return which steps stay for what lies near them."""
        return f"{self.near:,} steps on both sides of each spike and event"

    def implies(self, other: Self) -> bool:
        """Return whether all that this rule keeps of old steps the other one keeps too."""
        return self.every % other.every == 0 and self.near <= other.near


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """That rows of `casts` were left out.

    Attributes:
        recent: As `Keep` says.
        every: Likewise.
        near: Likewise.
        before: The steps from this one on are whole.
        rows: How many rows were left out.
        steps: Steps of which no row is left.
    """

    recent: int
    every: int
    near: int
    before: int
    rows: int
    steps: int

    @property
    def keep(self) -> Keep:
        """The rule."""
        return Keep(recent=self.recent, every=self.every, near=self.near)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return what a header holds.

        Raises:
            RunLogError: It is no such thing.
        """
        try:
            return cls(**{field.name: int(data[field.name]) for field in fields(cls)})
        except (KeyError, TypeError, ValueError) as error:
            raise RunLogError(
                f"its header says of thinned steps what none can be: {error!r}"
            ) from error


def kept_words(rules: Iterable[tuple[int, Keep]]) -> str:
    """Return what is left of a log that was thinned by one rule after the other.

    What one rule has left out, no later one brings back, however much it would keep.

    Args:
        rules: Each with the step before which it held, in the order in which they were applied.

    Example:
        >>> print(kept_words([(90, Keep(every=16, near=2)), (500, Keep(every=4))]))
        what each of these rules keeps: before step 90 one step in 16, and 2 steps on both sides of each spike and event; before step 500 one step in 4, and 100 steps on both sides of each spike and event; and of any step every cast that clamped, overshot, was cast again, held Inf or NaN, or was inspected
    """  # noqa: E501
    told: list[tuple[int, Keep]] = []
    for before, keep in rules:
        if any(last >= before and rule.implies(keep) for last, rule in told):
            continue
        told = [(last, rule) for last, rule in told if last > before or not keep.implies(rule)]
        told.append((before, keep))
    if len(told) == 1:
        return told[0][1].words()
    said = [
        f"before step {max(before, 0):,} {keep.every_words()}, and {keep.near_words()}"
        for before, keep in told
    ]
    return f"what each of these rules keeps: {'; '.join(said)}; and of any step {_ANY_STEP}"


def thinned_words(thinned: Iterable[Thinned]) -> str | None:
    """Return a sentence on what was left out of a log; None where nothing was.

    Example:
        >>> print(thinned_words([Thinned(recent=9, every=4, near=2, before=90, rows=1200, steps=60)]))
        Rows of casts before step 90 were thinned (1,200 left out): kept are one step in 4, 2 steps on both sides of each spike and event, and every cast that clamped, overshot, was cast again, held Inf or NaN, or was inspected; totals are of all.
    """  # noqa: E501
    every = list(thinned)
    if not every:
        return None
    before, rows = max(one.before for one in every), sum(one.rows for one in every)
    return (
        f"Rows of casts before step {before:,} were thinned ({rows:,} left out): kept are "
        f"{kept_words((one.before, one.keep) for one in every)}; totals are of all."
    )
