"""A run's casts cut into windows of steps: few enough for a page, whatever the run's length.

Short runs are read from `casts`, in windows as fine as a step; long ones from summaries, so that
a page of 100,000 steps reads no row of `casts`. Each window adds up counts and keeps extremes, of
all ranks; what ranks hold alike is counted once. What is drawn of it is for readers.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unclamp.runlog.connection import connect
from unclamp.runlog.levels import level_for, stored_name, window_steps
from unclamp.runlog.sites import PLACES_SQL, SiteInfo, over_ranks
from unclamp.runlog.summary import summary_sql
from unclamp.totals import CLAMPED_SQL, SCALED_AMAX_SQL, UNDECIDED_SQL, SiteTotals, overshoot, share

MOST_WINDOWS = 300
LONG_STEPS, LONG_ROWS = 2_000, 2_000_000
"""Runs of more steps, or of more rows of `casts`, are read from their summaries."""

_UNSUMMED = summary_sql("casts_without_summary")
_SUMS = ", ".join(
    f"{over_ranks(f'sum({name})')}::BIGINT AS {name}"
    for name in ("microsteps", "elements", "saturated", "underflowed", "nonfinite", "recast")
)
_FROM_CASTS = f"""
    {over_ranks("count(*)")} AS steps, {over_ranks("count(*)", CLAMPED_SQL)} AS clamped,
    {over_ranks("count(*)", "elements IS NULL")} AS uncounted,
    {over_ranks("count(*)", UNDECIDED_SQL)} AS undecided,
    max(amax) AS amax_max, max({SCALED_AMAX_SQL}) AS scaled_amax_max,
    min(scale) AS scale_min, max(scale) AS scale_max,
    {over_ranks("sum(saturated_error)")} AS saturated_error_sum,
    max(saturated_error) AS saturated_error_max,
    max_by(step, (saturated_error, ~step)) FILTER (saturated_error > 0) AS worst_step,
    min(sqnr_db) AS sqnr_db_min,
    {over_ranks("sum(sqnr_db)", "isfinite(sqnr_db)")} AS sqnr_db_sum,
    {over_ranks("count(*)", "isfinite(sqnr_db)")} AS sqnr_steps,
    min(sqnr_row_median_db) AS sqnr_row_median_db_min,
    count(sqnr_row_median_db) AS sqnr_row_steps"""
_FROM_SUMMARIES = f"""
    {over_ranks("sum(steps)")}::BIGINT AS steps, {over_ranks("sum(clamped)")}::BIGINT AS clamped,
    {over_ranks("sum(uncounted)")}::BIGINT AS uncounted,
    {over_ranks("sum(undecided)")}::BIGINT AS undecided,
    max(amax_max) AS amax_max, max(scaled_amax_max) AS scaled_amax_max,
    min(scale_min) AS scale_min, max(scale_max) AS scale_max,
    {over_ranks("sum(saturated_error_sum)")} AS saturated_error_sum,
    max(saturated_error_max) AS saturated_error_max,
    max_by(worst_step, (saturated_error_max, ~worst_step)) FILTER (saturated_error_max > 0)
        AS worst_step,
    min(sqnr_db_min) AS sqnr_db_min, {over_ranks("sum(sqnr_db_mean * sqnr_steps)")} AS sqnr_db_sum,
    {over_ranks("sum(sqnr_steps)")}::BIGINT AS sqnr_steps,
    min(sqnr_row_median_db_min) AS sqnr_row_median_db_min,
    CASE WHEN bool_and(sqnr_row_steps IS NOT NULL) THEN sum(sqnr_row_steps)::BIGINT END
        AS sqnr_row_steps"""
_FIELDS = {
    "rows": "steps",
    "casts": "microsteps",
    "elements": "elements",
    "saturated": "saturated",
    "underflowed": "underflowed",
    "nonfinite": "nonfinite",
    "recasts": "recast",
    "clamped_rows": "clamped",
    "clamp_error_max": "saturated_error_max",
    "worst_step": "worst_step",
    "sqnr_db_min": "sqnr_db_min",
    "sqnr_rows": "sqnr_steps",
    "uncounted": "uncounted",
    "undecided": "undecided",
}
"""Fields of `SiteTotals` that are columns as they stand."""
_FROM_WINDOWS = _FROM_SUMMARIES.replace("sum(sqnr_db_mean * sqnr_steps)", "sum(sqnr_db_sum)")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the steps of a run are cut into windows.

    Attributes:
        first: First step of the first window; 0 in a run without casts.
        size: Steps a window.
        count: Windows; 0 in a run without casts.
        from_summaries: Whether they are read from summaries and not from `casts`.
        level: How coarse these are (`unclamp.runlog.levels`).
    """

    first: int
    size: int
    count: int
    from_summaries: bool
    level: int = 0

    @property
    def steps(self) -> list[int]:
        """The first step of each window."""
        return [self.first + i * self.size for i in range(self.count)]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one site's casts did in one window, on all ranks.

    Attributes:
        cell: Number of the window.
        totals: What they lost.
        amax: The largest one, in the tensor's unit; None where a log of others tells none.
        scale_min: Smallest scale; None likewise.
        scale_max: Largest scale; None likewise.
    """

    cell: int
    totals: SiteTotals
    amax: float | None
    scale_min: float | None
    scale_max: float | None


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The casts of a run, added up a window and site.

    Attributes:
        cut: How the steps are cut.
        sites: By place: a site a name, over all ranks.
        totals: By place: all windows of a site added up, with sums of fractions to nine figures.
        rows: A row for each window in which a site cast anything, ordered by `place`, that of the
            site, and `cell`, the window's number. Its other columns are those of the view
            `summaries`, over all ranks (of replicated operands the counts of one); a step that was
            recorded again counts twice, and `sqnr_db_sum` takes the place of the mean.
    """

    cut: Cut
    sites: tuple[SiteInfo, ...]
    totals: tuple[SiteTotals, ...]
    rows: pa.Table

    def of(self, place: int) -> list[Window]:
        """Return the windows of the site at this place, rising; those without a cast are absent."""
        rows = self._rows_of(place)
        ranges = _columns(rows, ("cell", "amax_max", "scale_min", "scale_max"))
        totals = _totals(rows, [self.sites[place]] * len(rows))
        return [
            Window(cell=cell, totals=lost, amax=amax, scale_min=least, scale_max=most)
            for lost, (cell, amax, least, most) in zip(totals, ranges, strict=True)
        ]

    def saturated_share(self, place: int) -> NDArray[np.float64]:
        """Return the share of the site's elements that were clamped, for each window.

        Of the casts of which it is known, where elements were not counted.
        """
        rows = self._rows_of(place)
        shares = np.zeros(self.cut.count)
        if self.totals[place].is_counted:
            lost = share(rows["saturated"].to_numpy(), rows["elements"].to_numpy())
        else:
            decided = rows["steps"].to_numpy() - rows["undecided"].to_numpy()
            lost = share(rows["clamped"].to_numpy(), decided)
        shares[rows["cell"].to_numpy()] = lost
        return shares

    def _rows_of(self, place: int) -> pa.Table:
        begin, end = np.searchsorted(self.rows["place"].to_numpy(), [place, place + 1]).tolist()
        return self.rows.slice(begin, end - begin)


class Source(NamedTuple):
    """What windows are read from, as SQL: rows, and the number of the window of each."""

    table: str
    cell: str


def source_of(cut: Cut) -> Source:
    """Return what the windows of a cut are read from."""
    # The view `summaries` adds up a row per window. Windows here are wider and added up once more,
    # so the first sum would be made for nothing; it takes longer than all else on a page.
    summaries = f"(FROM {stored_name(cut.level)} UNION ALL BY NAME {_UNSUMMED})"
    step, table = ("first_step", summaries) if cut.from_summaries else ("step", "casts")
    last = max(0, cut.count - 1)
    cell = f"least(greatest(({step} - {cut.first}) // {cut.size}, 0), {last})"
    return Source(table=table, cell=cell)


def read_windows(
    sql: Callable[[str], pa.Table],
    *,
    sites: list[SiteInfo],
    most: int = MOST_WINDOWS,
    coarsest: int = 0,
    is_thinned: bool = False,
) -> Windows:
    """Return a run's windows, through the `sql` of its log.

    Args:
        sql: Answers a query.
        sites: The names of the log's sites, in order.
        most: Windows at most.
        coarsest: The highest level of summaries that the log has.
        is_thinned: Whether `casts` lacks rows that only summaries tell of.
    """
    cut = _cut(sql, most, coarsest=coarsest, is_thinned=is_thinned)
    source = source_of(cut)
    sums = _FROM_SUMMARIES if cut.from_summaries else _FROM_CASTS
    rows = sql(
        f"WITH places AS MATERIALIZED "
        f"(SELECT rank, site, place, replicated FROM ({PLACES_SQL})) "
        f"SELECT place, {source.cell} AS cell, {_SUMS}, {sums} "
        f"FROM {source.table} JOIN places USING (rank, site) GROUP BY ALL"
    )
    rows = rows.sort_by([("place", "ascending"), ("cell", "ascending")]).combine_chunks()
    added = _by_place(rows)
    places = added["place"].to_pylist()
    totals = dict(zip(places, _totals(added, [sites[at] for at in places]), strict=True))
    return Windows(
        cut=cut,
        sites=tuple(sites),
        totals=tuple(totals.get(place, SiteTotals()) for place in range(len(sites))),
        rows=rows,
    )


def _by_place(windows: pa.Table) -> pa.Table:
    """Add up the windows of each site, in a connection of its own that leaves nothing behind.

    Ranks are added up in each window already.
    """
    with connect() as connection:
        connection.register("windows", windows)
        connection.execute("CREATE VIEW once AS SELECT *, false AS replicated FROM windows")
        query = f"SELECT place, {_SUMS}, {_FROM_WINDOWS} FROM once GROUP BY place"
        return connection.sql(query).to_arrow_table()


def _totals(rows: pa.Table, sites: Sequence[SiteInfo]) -> list[SiteTotals]:
    """Return what each row of sums says of its site."""
    named = (dict(zip(_FIELDS, row, strict=True)) for row in _columns(rows, _FIELDS.values()))
    records = ({**row, "clamp_error_max": row["clamp_error_max"] or 0.0} for row in named)
    peaks = rows["scaled_amax_max"].to_pylist()
    return [
        SiteTotals(
            **record,
            overshoot=0.0 if peak is None else overshoot(peak, site.format_max),
            clamp_error_sum=_settled(error),
            sqnr_db_sum=_settled(sqnr or 0.0),
        )
        for record, peak, site, (error, sqnr) in zip(
            records,
            peaks,
            sites,
            _columns(rows, ("saturated_error_sum", "sqnr_db_sum")),
            strict=True,
        )
    ]


def _columns(rows: pa.Table, names: Iterable[str]) -> Iterable[tuple[Any, ...]]:
    """Return the values of these columns, row by row."""
    return zip(*(rows[name].to_pylist() for name in names), strict=True)


def _settled(total: float) -> float:
    """Return a sum of fractions to nine figures.

    DuckDB's threads add in any order, and one log gives one report.
    """
    return float(f"{total:.9g}")


def _cut(
    sql: Callable[[str], pa.Table], most: int, *, coarsest: int = 0, is_thinned: bool = False
) -> Cut:
    span = _span(sql, "steps") or _span(sql, "casts")
    first, last = span or (0, -1)
    is_long = is_thinned or last - first >= LONG_STEPS or has_more_casts(sql, LONG_ROWS)
    fewest = -(-most // 2)  # finer ones make no more windows: they would be added up by twos
    level = level_for(last + 1 - first, most=fewest, coarsest=coarsest) if is_long else 0
    unit = window_steps(level) if is_long else 1
    first -= first % unit
    units = -(-(last + 1 - first) // unit)
    size = max(1, -(-units // most)) * unit
    return Cut(
        first=first,
        size=size,
        count=-(-units * unit // size),
        from_summaries=is_long,
        level=level,
    )


def has_more_casts(sql: Callable[[str], pa.Table], rows: int) -> bool:
    """Return whether `casts` has more rows than so many; of a long log not all are counted."""
    (found,) = sql(f"SELECT count(*) AS n FROM (SELECT 1 FROM casts LIMIT {rows + 1})")["n"]
    return found.as_py() > rows


def _span(sql: Callable[[str], pa.Table], table: str) -> tuple[int, int] | None:
    (span,) = sql(f"SELECT min(step) AS first, max(step) AS last FROM {table}").to_pylist()
    first, last = span.values()
    return None if first is None else (first, last)
