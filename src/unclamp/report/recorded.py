"""What one run recorded, read from its log: curves, spikes, totals of sites. Torch-free."""

from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from unclamp.analysis import (
    ClampedGradients,
    Spike,
    clamped_gradients,
    clamped_gradients_by,
    find_spikes,
    run_curve,
)
from unclamp.analysis.groups import Group, has_kinds
from unclamp.analysis.prices import Prices, cast_prices
from unclamp.errors import AnalysisError
from unclamp.names import SiteName
from unclamp.report.status import noted
from unclamp.runlog import PLACES_SQL, Cut, RunLog, SiteInfo, Windows
from unclamp.study.marks import PLANTED, WORDS
from unclamp.totals import SiteTotals
from unclamp.written import counted

HEAT_SITES = 60
MOST_HELD = 2_000_000
"""Clamped rows of casts that are read once and kept, some 100 bytes each; of more, each time."""


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """A site of a run and what its casts lost, on all ranks.

    Attributes:
        place: Of the site in the run's windows.
        info: What the log says of it.
        totals: Over the whole run.
        sqnr_row_db_min: Least median over rows of the signal-to-noise ratio, decibel; Inf where
            half of the rows were exact each time, None where none was measured.
    """

    place: int
    info: SiteInfo
    totals: SiteTotals
    sqnr_row_db_min: float | None = None

    @property
    def name(self) -> SiteName:
        """The site's name, the same in every run."""
        return self.info.name


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What one run recorded.

    Attributes:
        steps: Step numbers of `loss` and `grad_norm`, rising; a step counts once.
        loss: Mean over ranks; None where none was recorded, which NaN is not.
        grad_norm: The same of the gradient norm; empty if it was never recorded.
        groups: The kind of each step's batch; empty where no step has one.
        planted: Marked steps: those whose batch the study made different from the others.
        mark: What they are called, a word of `unclamp.study.marks`.
        spikes: Of the loss and the gradient norm, by onset.
        cut: How the steps are cut into windows, for what is told of sites over time.
        recorded: Steps that have rows of casts, where not every step was to have them; else None.
        sites: Those that cast anything from which something was computed, in the order of their
            ids: whatever is said of the run's casts is said of these.
        is_counted: Whether the elements of its casts were counted, and not only their largest one.
        is_observed: Whether its casts are those that FP8 would have made.
        counted_sites: Those whose casts were only counted, beside `sites`, in the same order.
        shares: Clamped share a window, of the sites with the largest total clamp error, worst
            first; of the casts where elements were not counted.
        notes: Sentences of its header that a reader must see beside the figures.
        has_recipe: Whether its header names a recipe; a training in high precision has none.
        is_plain: Whether its header says that no layer was meant to be in FP8.
        gradients: What clamping gradients did to those of the weights.
        kind_gradients: The same at the batches of each kind; empty where there are no kinds.
        prices: What casts of inputs and weights cost, in units of the loss.
    """

    status: str
    steps: list[int]
    loss: list[float | None]
    grad_norm: list[float | None]
    planted: list[int]
    spikes: list[Spike]
    tokens_per_s: float | None
    cut: Cut
    recorded: int | None
    sites: list[SiteRecord]
    shares: dict[SiteName, np.ndarray]
    notes: list[str] = field(default_factory=list)
    has_recipe: bool = False
    is_plain: bool = False
    groups: list[Group] = field(default_factory=list)
    gradients: ClampedGradients = field(default_factory=ClampedGradients)
    kind_gradients: dict[Group, ClampedGradients] = field(default_factory=dict)
    prices: Prices = field(default_factory=Prices)
    mark: str = PLANTED.word
    counted_sites: list[SiteRecord] = field(default_factory=list)
    is_counted: bool = True
    is_observed: bool = False

    @property
    def every_site(self) -> list[SiteRecord]:
        """All that cast anything, those that were only counted last."""
        return self.sites + self.counted_sites

    @property
    def extent(self) -> str:
        """Which steps the counts are of, to be said with them; "" where it is all."""
        if self.recorded is None:
            return ""
        return f" in the {self.recorded:,} recorded of {counted(len(self.steps), 'step')}"

    @property
    def loss_spikes(self) -> list[int]:
        """Steps at which a spike of the loss begins."""
        return [spike.onset for spike in self.spikes if spike.series == "loss"]


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """A site as a row of a table and of the report's JSON; figures that nobody knows are None.

    Attributes:
        fqn: Dotted name of its product.
        role: Which operand.
        format: Name of the FP8 format.
        scaling: Kind of scaling at the beginning.
        saturated: Finite elements clamped; None where they were not counted.
        clamped_casts: Recorded casts in which anything was clamped.
        undecided_casts: Those of which nobody knows it.
        overshoot: Largest amax over the largest representable value; None where nothing was
            clamped, since up to half a rounding step above it an element still fits.
        clamp_error: Mean clamp error of the recorded casts that clamped, a fraction.
        underflow_share: Non-zero elements that became zero, a fraction of all.
        worst_step: First step with the largest clamp error.
        grad_error: How much clamping changed the weight's gradient, a fraction of its norm without
            clamping, over the casts that clamped; None where that was not measured.
        only_counted: Whether nothing is computed from its casts: it would have clamped.
    """

    fqn: str
    role: str
    format: str
    scaling: str
    saturated: int | None
    clamped_casts: int
    overshoot: float | None
    clamp_error: float | None
    underflow_share: float | None
    worst_step: int | None
    grad_error: float | None = None
    only_counted: bool = False
    undecided_casts: int = 0


def read_run(log: RunLog) -> tuple[RunRecord, Windows]:
    """Return what a run recorded, finished or not, and its windows.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    with ThreadPoolExecutor(1) as pool:  # DuckDB cuts while Python looks for spikes
        cutting = pool.submit(log.windows)
        with RunLog.open(log.path) as another:  # a connection is for one thread
            steps, series, groups = _series(another)
        spikes = [
            spike
            for name, values in series.items()
            for spike in find_spikes(values, steps=steps, groups=groups, series=name)
        ]
        windows = cutting.result()
    if (
        log.header.world_size * sum(t.clamped_rows + t.uncounted for t in windows.totals)
        < MOST_HELD
    ):
        log.hold_clamped()
    by_row = _least_by_row(log, windows)
    every = [
        SiteRecord(place=place, info=info, totals=totals, sqnr_row_db_min=by_row.get(place))
        for place, (info, totals) in enumerate(zip(windows.sites, windows.totals, strict=True))
        if totals.rows
    ]
    sites = [site for site in every if not site.info.only_counted]
    planted, mark = _marked(log, set(steps))
    record = RunRecord(
        status=log.header.status,
        steps=steps,
        loss=series.get("loss", [None] * len(steps)),
        grad_norm=series.get("grad_norm", []),
        planted=planted,
        mark=mark,
        spikes=sorted(spikes, key=lambda spike: (spike.onset, spike.series != "loss")),
        tokens_per_s=_column(log, _TOKENS_PER_S)[0] if log.sql(_ANY_SCALARS).num_rows else None,
        cut=windows.cut,
        recorded=_recorded_steps(log),
        sites=sites,
        counted_sites=[site for site in every if site.info.only_counted],
        shares=_shares(sites, windows),
        notes=noted(log),
        has_recipe=log.header.recipe is not None,
        is_plain=log.header.plain,
        is_counted=log.header.counts == "elements",
        is_observed=log.header.observed,
        groups=groups,
        gradients=clamped_gradients(log),
        kind_gradients=clamped_gradients_by(log, dict(zip(steps, groups, strict=True)))
        if has_kinds(groups)
        else {},
        prices=cast_prices(log),
    )
    return record, windows


_ANY_SCALARS = "SELECT 1 FROM steps WHERE scalars IS NOT NULL LIMIT 1"
_TOKENS_PER_S = """
SELECT median(speed) AS speed FROM (
    SELECT sum(map_extract(scalars, 'tokens')[1] / step_ms * 1e3) AS speed FROM (
        SELECT rank, step, last(scalars) AS scalars, last(step_ms) AS step_ms FROM steps
        WHERE step_ms > 0 AND step > (SELECT min(step) FROM steps) GROUP BY rank, step)
    GROUP BY step)
"""
"""Each rank says its own tokens: those of the run are their sum."""


def _least_by_row(log: RunLog, windows: Windows) -> dict[int, float]:
    """Return the least `sqnr_row_median_db` by place; logs of earlier versions have none.

    Summaries of earlier versions do not tell it: then all casts are looked at.
    """
    if windows.rows["sqnr_row_steps"].null_count == 0:
        found = windows.rows.group_by("place").aggregate([("sqnr_row_median_db_min", "min")])
        places, least = found["place"].to_pylist(), found["sqnr_row_median_db_min_min"].to_pylist()
        return {at: db for at, db in zip(places, least, strict=True) if db is not None}
    found = log.sql(
        f"WITH places AS MATERIALIZED (SELECT rank, site, place FROM ({PLACES_SQL})) "
        "SELECT place, min(sqnr_row_median_db) AS least "
        "FROM casts JOIN places USING (rank, site) "  # ranks may number sites differently
        "WHERE sqnr_row_median_db IS NOT NULL GROUP BY ALL"
    )
    return {row["place"]: row["least"] for row in found.to_pylist()}


def by_clamp_error(sites: list[SiteRecord]) -> list[SiteRecord]:
    """Return the sites with the largest total clamp error first; then by name.

    Where elements were not counted, those with the most clamped casts.
    """
    return sorted(sites, key=_by_clamping)


def _by_clamping(site: SiteRecord) -> tuple[float, int, float, SiteName]:
    """Order a site; where no error is known, by its clamped casts and then its overshoot."""
    totals = site.totals
    if totals.is_counted:
        return (-totals.clamp_error_sum, 0, 0.0, site.name)
    return (-totals.clamp_error_sum, -totals.clamped_rows, -totals.overshoot, site.name)


def shown_overshoot(totals: SiteTotals) -> float | None:
    """Return how far elements passed the largest representable value; None if none was clamped.

    An element up to half a rounding step above it is rounded to it, so an overshoot of 1.03
    beside no clamped element would look like a contradiction and is none.
    """
    return totals.overshoot if totals.clamped_rows else None


def _column(log: RunLog, query: str) -> list:
    """Return the only column that a query gives."""
    return log.sql(query).column(0).to_pylist()


def _marked(log: RunLog, recorded: Container[int]) -> tuple[list[int], str]:
    """Return the marked steps that recorded anything, rising, and what they are called."""
    rows = log.sql("SELECT DISTINCT step, kind FROM events ORDER BY step").to_pylist()
    marks = [(row["step"], row["kind"]) for row in rows if row["kind"] in WORDS]
    steps = sorted({step for step, _ in marks if step in recorded})
    return steps, marks[0][1] if marks else PLANTED.word


def _recorded_steps(log: RunLog) -> int | None:
    """Count the steps with rows of casts; None where the cadence is each step, or not said."""
    cadence = log.header.cadence
    if cadence is None or not cadence.is_sparse:
        return None
    left = _column(log, "SELECT count(DISTINCT step) FROM casts")[0]
    return left + sum(thinned.steps for thinned in log.header.thinned)


def _series(log: RunLog) -> tuple[list[int], dict[str, list[float | None]], list[Group]]:
    """Return steps, series and groups of a run; without series where it recorded neither."""
    try:
        curve = run_curve(log)
    except AnalysisError:  # neither loss nor gradient norm
        return _column(log, "SELECT DISTINCT step FROM steps ORDER BY step"), {}, []
    return curve.steps.tolist(), curve.series, list(curve.groups)


def _shares(sites: list[SiteRecord], windows: Windows) -> dict[SiteName, np.ndarray]:
    clamped = [site for site in by_clamp_error(sites) if site.totals.clamped_rows][:HEAT_SITES]
    return {site.name: windows.saturated_share(site.place) for site in clamped}
