"""What a policy would have done: an outcome for each, site by site."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.analysis.whatif.policies import policy_text
from unclamp.analysis.whatif.recorded import Recorded
from unclamp.names import SiteName
from unclamp.scaling import Scaling
from unclamp.totals import share


@dataclass(frozen=True, kw_only=True)
class Range:
    """An estimate, and between what it lies."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return it as JSON data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What inspected casts would have lost, by their exponents.

    Attributes:
        casts: Inspected casts that were looked at.
        clamped_casts: Of these, those that clamp.
        clamped: Elements clamped in these, count.
        clamp_error: Mean clamp error of those that clamp, fraction; 0 where none does.
        underflow: Mean share of non-zero elements that become zero, fraction.
        elements: Non-zero elements of the inspected casts, count.
    """

    casts: int
    clamped_casts: int
    clamped: Range
    clamp_error: Range
    underflow: Range
    elements: int


@dataclass(frozen=True, kw_only=True)
class SiteOutcome:
    """What a policy would have done at one site.

    Attributes:
        site: Its name.
        casts: Casts of the log, counted as its rows: one a step, however many microsteps.
        clamped: Of these, those in which the largest element is clamped.
        recast: Of these, those that the guard repeats.
        overshoot: Largest scaled amax over the format's largest value, of casts that keep their
            scale; 1 or less where nothing clamps. 0 where the policy takes the tensor's own scale.
        first_clamp: First step that clamps; None for none.
        elements: Elements cast.
        reads: Elements read to cast them.
        lost: What its inspected casts lose; None where none was inspected, or nothing is cast.
    """

    site: SiteName
    casts: int
    clamped: int
    recast: int
    overshoot: float
    first_clamp: int | None
    elements: int
    reads: float
    lost: Lost | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a policy would have done, site by site."""

    policy: Scaling
    sites: tuple[SiteOutcome, ...]

    @property
    def text(self) -> str:
        """The policy as it is written."""
        return policy_text(self.policy)

    @property
    def casts(self) -> int:
        """Casts of all sites."""
        return sum(site.casts for site in self.sites)

    @property
    def clamped(self) -> int:
        """Clamped casts of all sites."""
        return sum(site.clamped for site in self.sites)

    @property
    def recast(self) -> int:
        """Repeated casts of all sites."""
        return sum(site.recast for site in self.sites)

    @property
    def overshoot(self) -> float:
        """The largest of all sites."""
        return max((site.overshoot for site in self.sites), default=0.0)

    @property
    def reads(self) -> float:
        """Reads an element cast, over all sites: 1 is one read of every tensor."""
        elements = sum(site.elements for site in self.sites)
        return share(sum(site.reads for site in self.sites), elements)

    @property
    def lost(self) -> Lost | None:
        """What inspected casts of all sites lose; None where none was inspected."""
        return added([site.lost for site in self.sites if site.lost is not None])

    def extra_bytes(self, per_element: float) -> float:
        """Return the bytes that it reads beyond one read of every tensor."""
        return per_element * sum(site.reads - site.elements for site in self.sites)


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """The answer: an outcome a policy, in the order asked, and what the log cannot know.

    Attributes:
        outcomes: Of each policy.
        steps: Steps of the log.
        limits: Sentences: whether the log is unbiased, and in which direction it errs.
        recorded: What the run's own scalings did, as counted.
    """

    outcomes: tuple[Outcome, ...]
    recorded: Recorded
    steps: int
    limits: tuple[str, ...]

    @property
    def frontier(self) -> list[Outcome]:
        """Outcomes that no other beats, by reads.

        One beats another that is no worse in reads, clamped casts and underflow, and better in
        one of these. Of those that are alike in all three the first counts.
        """
        first: dict[tuple[float, ...], Outcome] = {}
        for outcome in self.outcomes:
            first.setdefault(_figures(outcome), outcome)
        best = [mine for mine in first if not any(_beats(other, mine) for other in first)]
        return [first[figures] for figures in sorted(best)]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON data; an infinite overshoot is null."""
        frontier = {id(outcome) for outcome in self.frontier}
        return {
            "steps": self.steps,
            "limits": list(self.limits),
            "recorded": dataclasses.asdict(self.recorded),
            "policies": [
                {
                    "policy": o.text,
                    "casts": o.casts,
                    "clamped_casts": o.clamped,
                    "recasts": o.recast,
                    "largest_overshoot": _finite(o.overshoot),
                    "reads_per_element": o.reads,
                    "lost": None if o.lost is None else dataclasses.asdict(o.lost),
                    "on_frontier": id(o) in frontier,
                    "sites": [_site_data(site) for site in o.sites],
                }
                for o in self.outcomes
            ],
        }


def _figures(outcome: Outcome) -> tuple[float, int, float]:
    lost = outcome.lost
    return outcome.reads, outcome.clamped, 0.0 if lost is None else lost.underflow.value


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def added(parts: Sequence[Lost]) -> Lost | None:
    """Return what several sites lose together; None of none."""
    if not parts:
        return None
    return Lost(
        casts=sum(part.casts for part in parts),
        clamped_casts=sum(part.clamped_casts for part in parts),
        clamped=_mixed([part.clamped for part in parts], [1] * len(parts), of=1),
        clamp_error=_mixed([p.clamp_error for p in parts], [p.clamped_casts for p in parts]),
        underflow=_mixed([p.underflow for p in parts], [p.casts for p in parts]),
        elements=sum(part.elements for part in parts),
    )


def _mixed(ranges: Sequence[Range], weights: Sequence[int], of: int | None = None) -> Range:
    """Return the mean of ranges by weight; 0 where there is none."""
    whole = sum(weights) if of is None else of
    low, value, high = (
        share(sum(getattr(r, end) * w for r, w in zip(ranges, weights, strict=True)), whole)
        for end in ("low", "value", "high")
    )
    return Range(value=float(value), low=float(low), high=float(high))


def _site_data(site: SiteOutcome) -> dict[str, Any]:
    data = dataclasses.asdict(site)
    del data["site"]
    return {**site.site.to_dict(), **data, "overshoot": _finite(site.overshoot)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
