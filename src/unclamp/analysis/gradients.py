"""How much of the weights' gradients clamping took: over a run, some of its steps, and each site.

The run log has, for each cast of a gradient that clamped and was measured, what that changed in
the gradient of the weight. Here these are added up as if they were one long vector: sums of
squares, so that a large gradient counts for more than a small one. Weights whose gradients did
not clamp are not in it: what these were is not in the log.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from unclamp.analysis.groups import Group
from unclamp.names import SiteName, is_attention_name
from unclamp.runlog import COMPUTED_SQL, RunLog, over_ranks
from unclamp.totals import CLAMPED_SQL, GradientChange
from unclamp.written import counted, listed, percent

MOST_SITES = 3
"""Sites that a sentence names."""
LEAST_DEGREES = 0.1
"""Below it a gradient hardly turns."""

_PLACES = f"""
    WITH places AS MATERIALIZED (
        SELECT rank, site, role, place, replicated,
            coalesce(bool_and(replicated) FILTER (role <> 'weight') OVER (PARTITION BY rank, fqn),
                false) AS is_same_gradient
        FROM ({COMPUTED_SQL}))"""
"""Ranks with the same input and grad_output of a product have one gradient of its weight; with one
of the two alike, each has a part of it, whose squares add up."""
_CASTS = "FROM clamped_casts JOIN places USING (rank, site)"
_ALL_STEPS = "CROSS JOIN (SELECT 0 AS kind)"
_BY_KIND = """
    JOIN (SELECT unnest($steps::BIGINT[]) AS step, unnest($kinds::BIGINT[]) AS kind) USING (step)"""
_CLAMPED = f"WHERE role = 'grad_output' AND {CLAMPED_SQL}"
_KNOWN = "FILTER (weight_grad_norm IS NOT NULL)"
_ONCE = "FILTER (NOT is_same_gradient)"
_WORST = "(grad_error, ~step)"
"""Of equal errors the first step wins."""
_SUMS = f"""
    {over_ranks("count(*)", "weight_grad_norm IS NOT NULL")} AS casts,
    coalesce(sum((grad_ratio * weight_grad_norm) ** 2) {_ONCE}, 0) AS computed,
    coalesce(sum(weight_grad_norm ** 2) {_ONCE}, 0) AS unclamped,
    coalesce(sum((grad_error * weight_grad_norm) ** 2) {_ONCE}, 0) AS change,
    coalesce(sum(grad_cosine * grad_ratio * weight_grad_norm ** 2) {_ONCE}, 0) AS product,
    max_by(step, {_WORST}) {_KNOWN} AS step, max(grad_error) {_KNOWN} AS error,
    max_by(grad_cosine, {_WORST}) {_KNOWN} AS cosine,
    max_by(grad_ratio, {_WORST}) {_KNOWN} AS ratio"""

ONE = ("the weight's gradient", "its", "it")
MANY = ("the weights' gradients", "their", "them")


@dataclass(frozen=True, kw_only=True)
class WorstGradient:
    """The cast of a site whose clamping changed the weight's gradient most.

    Attributes:
        step: The first with the largest error.
        error: Norm of the change over that of the gradient without clamping.
        cosine: Between the gradient and the one without clamping.
        ratio: Norm of the gradient over that of the one without clamping.
    """

    step: int
    error: float
    cosine: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class SiteGradient:
    """What clamping at one site of gradients did to the weight's gradient.

    Attributes:
        name: Of the site.
        casts: Recorded casts that clamped and were measured.
        change: What they changed, added up.
        worst: The one that changed most.
    """

    name: SiteName
    casts: int
    change: GradientChange
    worst: WorstGradient


@dataclass(frozen=True, kw_only=True)
class ClampedGradients:
    """What clamping gradients did to the gradients of weights; `a + b` is of two runs.

    It is told of those casts that clamped and were measured, and is no share of the whole update:
    other weights, and the same weights at other steps, are not in it, since the size of a gradient
    that did not clamp is not recorded. What clamping in later layers had done to a gradient before
    it arrived is not in it either. Steps count by the squares of their gradients, and these are of
    the loss as it was scaled: where a gradient scaler doubles its scale, later steps count four
    times as much.

    Attributes:
        asked: Steps that were asked about; None for all.
        steps: Steps at which any clamped gradient was measured.
        casts: Casts that clamped and were measured.
        unmeasured: Casts of gradients that clamped and were not, as between inspected steps where
            many tokens clamp or off the CPU, or whose weight's gradient was not finite.
        change: What those that were measured changed.
        sites: Those of them, largest error of the added up changes first.
        weights: The sites of all gradients of weights' layers in the log, clamped or not.
    """

    asked: int | None = None
    steps: int = 0
    casts: int = 0
    unmeasured: int = 0
    change: GradientChange = field(default_factory=GradientChange)
    sites: tuple[SiteGradient, ...] = ()
    weights: frozenset[SiteName] = frozenset()

    @property
    def has_clamped(self) -> bool:
        """Whether any gradient was clamped, measured or not."""
        return bool(self.casts or self.unmeasured)

    @property
    def by_name(self) -> dict[SiteName, SiteGradient]:
        """The sites by name."""
        return {site.name: site for site in self.sites}

    def words(self, step: str = "step", steps: str = "") -> str:
        """Return it as a sentence; `step` and `steps` is what people call the steps.

        It says how many weights and steps it is of, and how many casts were not measured.

        Example:
            >>> ClampedGradients(asked=40).words("'answers' batch", "'answers' batches")
            "No gradient was clamped in 40 'answers' batches."
        """
        asked = "" if self.asked is None else f" in {counted(self.asked, step, steps)}"
        if not self.has_clamped:
            return f"No gradient was clamped{asked}."
        if not self.casts:
            return (
                f"{counted(self.unmeasured, 'cast of a gradient', 'casts of gradients')} "
                f"clamped{asked}; what that did to the gradients of the weights was not measured."
            )
        more = counted(self.unmeasured, "more clamped cast", "more clamped casts")
        return (
            f"{'Clamped gradients were measured' if self.unmeasured else 'Gradients were clamped'} "
            f"at {self._which_weights()}, in {self._which_steps(step, steps)}: there clamping "
            f"{change_in_words(self.change, of_many=True)}"
            f"{f'; what {more} did was not measured' if self.unmeasured else ''}."
        )

    def _which_weights(self) -> str:
        every = len(self.weights | self.by_name.keys())
        return f"{len(self.sites):,} of {counted(every, 'weight')}"

    def _which_steps(self, step: str, steps: str) -> str:
        if self.asked is None:
            return counted(self.steps, step, steps)
        return f"{self.steps:,} of {counted(self.asked, step, steps)}"

    def worst_words(self) -> list[str]:
        """Return what stands out: the worst cast, and the sites with the largest error."""
        if not self.sites:
            return []
        name, worst = max(
            ((site.name, site.worst) for site in self.sites), key=lambda pair: pair[1].error
        )
        said = [
            f"Clamping changed the gradient of a weight most at {name}: at step {worst.step:,} it "
            f"{_in_words(worst.cosine, worst.ratio, ONE)}."
        ]
        if len(self.sites) > 1:
            ranked = [
                f"{site.name} ({percent(site.change.error)})" for site in self.sites[:MOST_SITES]
            ]
            said.append(f"By gradient error over all clamped casts: {listed(ranked)}.")
        return said

    def __add__(self, other: ClampedGradients) -> ClampedGradients:
        """Return what both did; steps of two runs are different ones."""
        asked = [each.asked for each in (self, other) if each.asked is not None]
        merged = self.by_name
        for site in other.sites:
            known = merged.get(site.name)
            merged[site.name] = site if known is None else _both(known, site)
        return ClampedGradients(
            asked=sum(asked) if asked else None,
            steps=self.steps + other.steps,
            casts=self.casts + other.casts,
            unmeasured=self.unmeasured + other.unmeasured,
            change=self.change + other.change,
            sites=_ranked(merged.values()),
            weights=self.weights | other.weights,
        )


def clamped_gradients(log: RunLog, *, steps: Iterable[int] | None = None) -> ClampedGradients:
    """Return how much clamping gradients took of the gradients of weights.

    Args:
        log: The run; its ranks are taken together.
        steps: Only these, such as the batches of one kind; None for all. A step that was recorded
            again, because the run went back, counts each time.

    Raises:
        RunLogError: The run cannot be read.

    Numerics: Sums are kept to nine figures, since DuckDB adds in any order.
    """
    if steps is None:
        (found,) = _added_up(log, _ALL_STEPS, [None])
        return found
    return clamped_gradients_by(log, dict.fromkeys(map(int, steps))).get(None, _NO_STEPS)


def clamped_gradients_by(log: RunLog, groups: Mapping[int, Group]) -> dict[Group, ClampedGradients]:
    """Return the same as `clamped_gradients` of each kind's steps, in one pass over the log.

    Args:
        log: The run.
        groups: The kind of each step.

    Raises:
        RunLogError: The run cannot be read.
    """
    sizes = Counter(groups.values())
    numbers = {group: number for number, group in enumerate(sizes)}
    found = _added_up(
        log,
        _BY_KIND,
        list(sizes.values()),
        steps=list(groups),
        kinds=[numbers[group] for group in groups.values()],
    )
    return dict(zip(sizes, found, strict=True))


def _added_up(
    log: RunLog, kinds_sql: str, asked: Sequence[int | None], **params: list[int]
) -> list[ClampedGradients]:
    """Return what was clamped at the steps of each kind; `asked` is how many steps it has."""
    rows = log.sql(
        f"{_PLACES} SELECT kind, place, {_SUMS}, {over_ranks('count(*)')} AS clamped "
        f"{_CASTS} {kinds_sql} {_CLAMPED} GROUP BY kind, place ORDER BY kind, place",
        **params,
    ).to_pylist()
    measured = log.sql(
        f"{_PLACES} SELECT kind, count(DISTINCT step) AS steps {_CASTS} {kinds_sql} "
        f"{_CLAMPED} AND weight_grad_norm IS NOT NULL GROUP BY kind",
        **params,
    ).to_pylist()
    steps = {row["kind"]: row["steps"] for row in measured}
    own: list[list[dict]] = [[] for _ in asked]
    for row in rows:
        own[row["kind"]].append(row)
    names = [site.name for site in log.computed_sites()]
    return [
        _of_rows(own[kind], names, asked=size, steps=steps.get(kind, 0))
        for kind, size in enumerate(asked)
    ]


def _of_rows(
    rows: Sequence[dict], names: Sequence[SiteName], *, asked: int | None, steps: int
) -> ClampedGradients:
    sites = [_site(names[row["place"]], row) for row in rows if row["casts"]]
    return ClampedGradients(
        asked=asked,
        steps=steps,
        casts=sum(site.casts for site in sites),
        unmeasured=sum(row["clamped"] - row["casts"] for row in rows),
        change=sum((site.change for site in sites), GradientChange()),
        sites=_ranked(sites),
        weights=frozenset(
            name for name in names if name.role == "grad_output" and not is_attention_name(name.fqn)
        ),
    )


_NO_STEPS = ClampedGradients(asked=0)


def change_in_words(change: GradientChange, *, of_many: bool = False) -> str:
    """Return what clamping did to a weight's gradient, or to those `of_many`, as a predicate.

    Example:
        >>> change = GradientChange(computed=0.04, unclamped=1.0, change=0.72, product=0.16)
        >>> change_in_words(change)
        "turned the weight's gradient by 36.9 degrees and took 80 % of its size"
        >>> change_in_words(change, of_many=True)
        "turned the weights' gradients by 36.9 degrees and took 80 % of their size"
    """
    return _in_words(change.cosine, change.ratio, MANY if of_many else ONE)


def _in_words(cosine: float, ratio: float, words: tuple[str, str, str]) -> str:
    what, own, it = words
    degrees = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
    turned = (
        f"turned {what} by {degrees:.3g} degrees" if degrees >= 0.1 else f"hardly turned {what}"
    )
    if ratio > 1:
        return f"{turned} and made {it} {percent(ratio - 1)} larger"
    return f"{turned} and took {percent(1 - ratio)} of {own} size"


def _site(name: SiteName, row: dict) -> SiteGradient:
    sums = {key: float(f"{row[key]:.9g}") for key in ("computed", "unclamped", "change", "product")}
    worst = {key: row[key] for key in ("step", "error", "cosine", "ratio")}
    return SiteGradient(
        name=name,
        casts=row["casts"],
        change=GradientChange(**sums),
        worst=WorstGradient(**worst),
    )


def _both(one: SiteGradient, other: SiteGradient) -> SiteGradient:
    return replace(
        one,
        casts=one.casts + other.casts,
        change=one.change + other.change,
        worst=max((one.worst, other.worst), key=lambda worst: worst.error),
    )


def _ranked(sites: Iterable[SiteGradient]) -> tuple[SiteGradient, ...]:
    return tuple(sorted(sites, key=lambda site: (-site.change.error, site.name)))
