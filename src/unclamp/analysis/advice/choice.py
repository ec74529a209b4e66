"""Which policy a group of sites gets: the cheapest whose losses stay tolerable.

The ladder is tried from the cheapest policy on, on the log's own amaxes. A policy is taken

- if no cast could have lost more than what is tolerated (`totals.clamp_error_bound`),
- if it does not clamp on the way of an outlier. An outlier passes through a network: at one site
  it outruns a history mildly and at another hard, and clamped anywhere on its way it is lost. Its
  gradients are what is learnt from it. So in the steps in which some value outruns hard mild
  overshoots are not tolerated either,
- if it does not lose much more by underflow than dynamic scaling does (`underflow`),
- and, where the run priced its own clamping (`analysis.prices`), if that cost little of the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unclamp.analysis.advice.groups import Group
from unclamp.analysis.advice.harm import Harm
from unclamp.analysis.advice.outruns import Outruns
from unclamp.analysis.advice.underflow import Underflows
from unclamp.scaling import Delayed, Dynamic, Guarded, Scaling
from unclamp.totals import clamp_error_bound, share

LADDER: tuple[Scaling, ...] = (
    Delayed(),
    Delayed(128),
    Delayed(1024),
    Guarded(),
    Guarded(16, margin=0),
    Dynamic(),
)
"""From the cheapest on; of one price the usual one first. No margins: they meet the outliers that a
log has seen, and not the next larger one."""
USUAL = LADDER[0]
NOTABLE = 1.25
"""Overshoot from which on a cast counts for the trend, and for the same outlier as a harder one of
its step: a little is outrun all the time."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of each policy of the ladder.

    Attributes:
        groups: Of sites.
        missed: Of each policy, what outruns it.
        underflows: What each loses by underflow.
        harm: What is tolerated.
        outliers: Steps in which some input or weight outruns the usual history too far.
    """

    groups: Sequence[Group]
    missed: Sequence[Outruns]
    underflows: Underflows
    harm: Harm
    outliers: np.ndarray

    @classmethod
    def of(
        cls,
        *,
        groups: Sequence[Group],
        missed: Sequence[Outruns],
        underflows: Underflows,
        harm: Harm,
    ) -> "Evidence":
        """Return it, with the outliers of values."""
        values = [group.sites for group in groups if group.role != "grad_output"]
        mine = missed[0].of_sites(np.concatenate([np.zeros(0, np.int64), *values]))
        outliers = np.unique(mine.step[clamp_error_bound(mine.overshoot) > harm.value])
        return cls(
            groups=groups, missed=missed, underflows=underflows, harm=harm, outliers=outliers
        )

    def beside(self, group: Group, mine: Outruns) -> int:
        """Return how many of a group's casts outrun mildly on the way of outliers."""
        is_mild = clamp_error_bound(mine.overshoot) <= self.harm.of(group.role)
        is_mild &= mine.overshoot > NOTABLE
        return int((is_mild & np.isin(mine.step, self.outliers)).sum())

    def choice(self, group: Group, *, is_dear: bool) -> int:
        """Return the first rung that is tolerable; without one the last, dynamic scaling."""
        for rung, outrun in enumerate(self.missed):
            mine = outrun.of_sites(group.sites)
            cannot_clamp = outrun.policy.guards or outrun.policy.takes_own
            clamps = is_dear or mine.hard(self.harm.of(group.role)) or self.beside(group, mine)
            if (cannot_clamp or not clamps) and self.underflows.tolerable(rung, group):
                return rung
        return len(self.missed) - 1

    def within(self, chosen: Sequence[int], budget: float) -> list[int]:
        """Return rungs that cost at most the budget: what loses least gives way first."""
        chosen = list(chosen)
        usual = [self.missed[0].of_sites(group.sites) for group in self.groups]
        lost = [
            (mine.hard(self.harm.of(group.role)), self.beside(group, mine))
            for group, mine in zip(self.groups, usual, strict=True)
        ]
        for i in sorted((i for i, rung in enumerate(chosen) if rung), key=lambda i: (lost[i], i)):
            if self.reads(chosen) <= budget:
                break
            chosen[i] = 0
        return chosen

    def reads(self, chosen: Sequence[int]) -> float:
        """Return the reads an element of a rung for each group."""
        reads = elements = 0.0
        for group, rung in zip(self.groups, chosen, strict=True):
            for i in group.sites:
                reads += self.missed[rung].outcome.sites[i].reads
                elements += self.missed[rung].outcome.sites[i].elements
        return share(reads, elements)
