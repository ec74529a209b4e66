"""Which scaling, for which sites of a run: the cheapest whose losses stay tolerable, and why.

What each group of sites gets is decided in `choice`; here are the run's prices, the verdict, and
the recipe. First order may be wrong in both directions, so a price takes a group off the cheap
rungs and never puts one back.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from unclamp.analysis.advice.choice import LADDER, NOTABLE, USUAL, Evidence
from unclamp.analysis.advice.groups import Group, groups_of
from unclamp.analysis.advice.harm import Harm
from unclamp.analysis.advice.outruns import outruns
from unclamp.analysis.advice.record import PUBLIC_RUNS, PublicRun
from unclamp.analysis.advice.tails import Tail, Trend, tail, trend
from unclamp.analysis.advice.underflow import Underflows
from unclamp.analysis.prices import cast_prices
from unclamp.analysis.whatif import policy_text
from unclamp.analysis.whatif.inspected import read_inspected
from unclamp.analysis.whatif.limits import find_limits
from unclamp.analysis.whatif.outcome import Outcome
from unclamp.errors import AnalysisError
from unclamp.names import SiteName
from unclamp.recipe import Recipe
from unclamp.runlog import RunLog
from unclamp.scaling import Scaling
from unclamp.totals import clamp_error_bound, share

LEAST_UPDATES = 3
"""Lengths of the usual history below which a log is too short to say anything."""
MOST_PRICE = 0.01
"""Share of a step's loss that clamping at a site may cost, to first order."""
SIGNIFICANT = 0.05
Verdict = Literal["too short", "does not matter", "matters"]


@dataclass(frozen=True, kw_only=True)
class GroupAdvice:
    """What a group of sites gets, and what that is based on.

    Attributes:
        group: The sites.
        products: Their names.
        scaling: What is advised.
        casts: Casts of the log.
        outrun: Of these, those whose amax outruns the usual history.
        hard: Of these, those that may lose more than is tolerated.
        beside: Casts that outrun mildly in steps in which some value outruns hard.
        overshoot: The largest, under the usual history; 1 where none is outrun.
        hardest: The site with that.
        first_hard: The first such step; None for none.
        price: Largest share of a step's loss that clamping cost here, to first order, in the run
            itself; None where it clamped nothing that was priced.
        trend: Whether amaxes outrun the usual history by more than 1.25x more often as it goes on.
        trend_p: Its p, with all groups counted (Holm).
        reads: Reads an element of what is advised.
        recast: Share of casts that it repeats.
    """

    group: Group
    products: tuple[str, ...]
    scaling: Scaling
    casts: int
    outrun: int
    hard: int
    beside: int
    overshoot: float
    hardest: str
    first_hard: int | None
    price: float | None
    trend: Trend
    trend_p: float
    reads: float
    recast: float

    @property
    def is_needy(self) -> bool:
        """Whether the usual scaling would not do."""
        return self.hard > 0 or self.beside > 0 or (self.price or 0) > MOST_PRICE

    @property
    def rises(self) -> bool:
        """Whether the rate rises, more than chance shows."""
        return self.trend_p < SIGNIFICANT and self.trend.tau > 0


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer.

    Attributes:
        verdict: Whether scaling matters for this run, or the log is too short to say.
        groups: Of each group, those that need most first.
        recipe: What to train with.
        steps: Steps of the log.
        reads: Reads an element of the recipe, over all sites.
        harm: Clamp error of a cast that is tolerated.
        limits: What the log cannot know.
        horizon: Steps that are asked about; None for none.
        tail: The largest overshoot until then; None where none was asked, or too few were seen.
        clamped_share: Share of steps with an outrun amax.
        budget: Reads an element that may be spent; None for any.
        record: What was trained in public.
    """

    verdict: Verdict
    groups: tuple[GroupAdvice, ...]
    recipe: Recipe
    steps: int
    reads: float
    harm: Harm
    limits: tuple[str, ...]
    horizon: int | None
    tail: Tail | None
    clamped_share: float
    budget: float | None
    record: tuple[PublicRun, ...] = field(default=PUBLIC_RUNS, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON data."""
        from unclamp.analysis.advice.words import reasons  # noqa: PLC0415

        return {
            "verdict": self.verdict,
            "reasons": reasons(self),
            "recipe": self.recipe.to_dict(),
            "steps": self.steps,
            "reads_per_element": self.reads,
            "harm": asdict(self.harm),
            "horizon_steps": self.horizon,
            "tail": None if self.tail is None else asdict(self.tail),
            "groups": [_group_data(group) for group in self.groups],
            "record": [asdict(run) for run in self.record],
        }


def _group_data(each: GroupAdvice) -> dict[str, Any]:
    return {
        "match": each.group.match,
        "role": each.group.role,
        "products": list(each.products),
        "policy": policy_text(each.scaling),
        "casts": each.casts,
        "outrun_casts": each.outrun,
        "hard_casts": each.hard,
        "beside_hard_casts": each.beside,
        "largest_overshoot": each.overshoot,
        "hardest_product": each.hardest,
        "first_hard_step": each.first_hard,
        "price_share": each.price,
        "trend_tau": each.trend.tau,
        "trend_p": each.trend_p,
        "rates": list(each.trend.rates),
        "reads_per_element": each.reads,
        "recast_share": each.recast,
    }


def advise(
    log: RunLog,
    *,
    horizon: int | None = None,
    harm: float | None = None,
    budget: float | None = None,
) -> Advice:
    """Return which scaling the sites of a run need.

    Args:
        log: Of a training, or better of an observed, dynamic or guarded one: those are unbiased.
        horizon: Steps that the training is to take; what lies beyond the log is forecast.
        harm: Clamp error of a single cast that is tolerated, fraction in [0, 1); by default that
            of an overshoot of 4, and of 25 for gradients.
        budget: Reads an element that may be spent on the average; where what is needed costs
            more, groups get a cheaper scaling in the order of what they lose by it.

    Raises:
        AnalysisError: The run has no casts; `harm`, `horizon` or `budget` make no sense.
    """
    if harm is not None and not 0 <= harm < 1:
        raise AnalysisError(f"expected a clamp error in [0, 1) for harm, got {harm}")
    tolerated = Harm() if harm is None else Harm(value=harm, gradient=harm)
    if horizon is not None and horizon < 1:
        raise AnalysisError(f"expected at least one step for the horizon, got {horizon}")
    if budget is not None and budget < 1:
        raise AnalysisError(f"expected 1 read an element or more as a budget, got {budget}")
    sites = log.computed_sites()
    inspected = read_inspected(log, sites)
    missed = outruns(log, sites, LADDER, inspected)
    groups = groups_of(sites)
    evidence = Evidence.of(
        groups=groups,
        missed=missed,
        underflows=Underflows.of(missed, inspected, sites),
        harm=tolerated,
    )
    first, last = _span(log)
    names = [site.fqn for site in sites]
    shares = _price_shares(log)
    prices = [_largest_price(shares, group, names) for group in groups]
    chosen = [
        evidence.choice(group, is_dear=(price or 0) > MOST_PRICE)
        for group, price in zip(groups, prices, strict=True)
    ]
    if budget is not None:
        chosen = evidence.within(chosen, budget)
    advices = [
        _advice(group, missed[rung].outcome, evidence, names, price, (first, last))
        for group, rung, price in zip(groups, chosen, prices, strict=True)
    ]
    advices = _with_all_counted(advices)
    steps = last - first + 1
    ahead = None if horizon is None else max(horizon - steps, 0)
    usual = missed[0]
    return Advice(
        verdict=_verdict(advices, steps),
        groups=tuple(sorted(advices, key=_need, reverse=True)),
        recipe=_recipe(advices),
        steps=steps,
        reads=evidence.reads(chosen),
        harm=tolerated,
        limits=find_limits(log, LADDER, looked_at=len(inspected.step), known=inspected.known),
        horizon=horizon,
        tail=tail(usual.step, usual.overshoot, steps=steps, ahead=ahead) if ahead else None,
        clamped_share=share(len(np.unique(usual.step)), steps),
        budget=budget,
    )


def _need(each: GroupAdvice) -> tuple[float, ...]:
    return each.hard, each.beside, each.price or 0, each.overshoot


def _span(log: RunLog) -> tuple[int, int]:
    (row,) = log.sql("SELECT min(step) AS low, max(step) AS high FROM casts").to_pylist()
    return row["low"], row["high"]


def _price_shares(log: RunLog) -> dict[SiteName, float]:
    """Return the largest share of a step's loss that clamping at a site cost, where it is known."""
    rows = log.sql(
        "SELECT step, avg(loss) AS loss FROM steps WHERE isfinite(loss) AND loss > 0 GROUP BY step"
    )
    losses = dict(
        zip(rows.column("step").to_pylist(), rows.column("loss").to_pylist(), strict=True)
    )
    return {
        site.name: site.worst / losses[site.worst_step]
        for site in cast_prices(log).sites
        if site.worst is not None and site.worst_step in losses
    }


def _largest_price(
    shares: Mapping[SiteName, float], group: Group, names: Sequence[str]
) -> float | None:
    """Return the largest of a group's; None where none is known."""
    sites = (SiteName(names[int(i)], group.role) for i in group.sites)
    return max((shares[site] for site in sites if site in shares), default=None)


def _advice(
    group: Group,
    outcome: Outcome,
    evidence: Evidence,
    names: Sequence[str],
    price: float | None,
    span: tuple[int, int],
) -> GroupAdvice:
    usual = evidence.missed[0]
    mine = usual.of_sites(group.sites)
    sites = [outcome.sites[i] for i in group.sites]
    casts, elements = sum(s.casts for s in sites), sum(s.elements for s in sites)
    worst = int(np.argmax(mine.overshoot)) if len(mine.overshoot) else None
    hard = clamp_error_bound(mine.overshoot) > evidence.harm.of(group.role)
    window = usual.policy.history_len or 1
    notable = mine.step[mine.overshoot > NOTABLE]
    return GroupAdvice(
        group=group,
        products=tuple(names[int(i)] for i in group.sites),
        scaling=outcome.policy,
        casts=casts,
        outrun=len(mine.step),
        hard=int(hard.sum()),
        beside=evidence.beside(group, mine),
        overshoot=1.0 if worst is None else float(mine.overshoot[worst]),
        hardest=names[int(group.sites[0] if worst is None else mine.site[worst])],
        first_hard=int(mine.step[hard].min()) if hard.any() else None,
        price=price,
        trend=trend(
            notable,
            first=span[0] + window,
            last=span[1],
            shortest=window,
        ),
        trend_p=1.0,
        reads=share(sum(s.reads for s in sites), elements),
        recast=share(sum(s.recast for s in sites), casts),
    )


def _with_all_counted(advices: Sequence[GroupAdvice]) -> list[GroupAdvice]:
    """Return the advices with p of their trends as one of all that were tested (Holm)."""
    order = sorted(range(len(advices)), key=lambda i: advices[i].trend.p)
    counted, largest = list(advices), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(advices[i].trend.p * (len(order) - rank), 1.0))
        counted[i] = replace(advices[i], trend_p=largest)
    return counted


def _verdict(advices: Sequence[GroupAdvice], steps: int) -> Verdict:
    if steps < LEAST_UPDATES * (USUAL.history_len or 1):
        return "too short"
    if any(each.is_needy for each in advices):
        return "matters"
    return "does not matter"


def _recipe(advices: Sequence[GroupAdvice]) -> Recipe:
    """Return the recipe: the usual scaling, and a rule for each kind of layer that needs more."""
    recipe = Recipe.uniform(USUAL)
    by_match: dict[str, dict[str, Scaling]] = {}
    notes: dict[str, list[str]] = {}
    for each in advices:
        if each.scaling != USUAL:
            by_match.setdefault(each.group.match, {})[each.group.role] = each.scaling
            over = f"{each.overshoot:.3g}x" if math.isfinite(each.overshoot) else "Inf"
            notes.setdefault(each.group.match, []).append(f"{each.group.role} up to {over}")
    for match, scalings in by_match.items():
        note = f"amax outran a history of {USUAL.history_len}: {', '.join(notes[match])}"
        recipe = recipe.override(match, **scalings, note=note)  # type: ignore[arg-type]
    return recipe
