"""A run's casts cut into windows of steps: few enough for a page, whatever the run's length.

Short runs are read from `casts`, in windows as fine as a step; long ones from `summaries`, so that
a page of 100,000 steps reads no row of `casts`. Each window adds up counts and keeps extremes. What
is drawn of it is for `figures` and `panels`.
"""

from dataclasses import dataclass

from unclamp.runlog import SUMMARY_STEPS, RunLog
from unclamp.runlog.summary import summary_sql

MOST_WINDOWS = 300
LONG_STEPS, LONG_ROWS = 2_000, 2_000_000
"""Runs of more steps, or of more rows of `casts`, are read from their summaries."""
CELLS = "report_cells"
"""Name of the table of windows that `cut` makes in the log's connection."""

_SUMMARIES = f"(FROM stored_summaries UNION ALL BY NAME {summary_sql('casts_without_summary')})"
"""What the view `summaries` adds up a row per window. Windows here are wider and added up once
more, so the first sum would be made for nothing; it takes longer than all else on a page."""
_COUNTS = ("microsteps", "elements", "saturated", "underflowed", "nonfinite", "recast")
_FROM_CASTS = """
    count(*) AS steps, count(*) FILTER (saturated > 0) AS clamped,
    max(amax) AS amax, max(amax::DOUBLE * scale) AS scaled_amax,
    min(scale) AS scale_min, max(scale) AS scale_max,
    sum(saturated_error) AS error, max(saturated_error) AS error_max,
    max_by(step, (saturated_error, ~step)) FILTER (saturated_error > 0) AS worst_step,
    min(sqnr_db) AS sqnr_min, sum(sqnr_db) FILTER (isfinite(sqnr_db)) AS sqnr_sum,
    count(*) FILTER (isfinite(sqnr_db)) AS sqnr_steps"""
_FROM_SUMMARIES = """
    sum(steps) AS steps, sum(clamped) AS clamped,
    max(amax_max) AS amax, max(scaled_amax_max) AS scaled_amax,
    min(scale_min) AS scale_min, max(scale_max) AS scale_max,
    sum(saturated_error_sum) AS error, max(saturated_error_max) AS error_max,
    max_by(worst_step, (saturated_error_max, ~worst_step)) FILTER (saturated_error_max > 0)
        AS worst_step,
    min(sqnr_db_min) AS sqnr_min, sum(sqnr_db_mean * sqnr_steps) AS sqnr_sum,
    sum(sqnr_steps) AS sqnr_steps"""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How the steps of a run are cut.

    Attributes:
        first: First step of the first window; 0 in a run without casts.
        size: Steps a window.
        count: Windows; 0 in a run without casts.
        from_summaries: Whether they were read from `summaries` and not from `casts`.
    """

    first: int
    size: int
    count: int
    from_summaries: bool

    @property
    def steps(self) -> list[int]:
        """The first step of each window."""
        return [self.first + i * self.size for i in range(self.count)]


def cut(log: RunLog) -> Windows:
    """Cut a run into windows and keep them as the table `CELLS` of the log's connection.

    Its columns are `cell` (the window's number), `site`, sums and extremes over the window and all
    ranks; `steps` counts rows of `casts`. A step that was recorded again counts twice.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    span = _span(log, "steps") or _span(log, "casts")
    first, last = span or (0, -1)
    is_long = last - first >= LONG_STEPS or _rows_of_casts(log) > LONG_ROWS
    unit = SUMMARY_STEPS if is_long else 1
    first -= first % unit
    units = -(-(last + 1 - first) // unit)
    size = max(1, -(-units // MOST_WINDOWS)) * unit
    windows = Windows(
        first=first, size=size, count=-(-units * unit // size), from_summaries=is_long
    )
    _make_cells(log, windows)
    return windows


def _rows_of_casts(log: RunLog) -> int:
    return log.sql("SELECT count(*) AS casts FROM casts").to_pydict()["casts"][0]


def _span(log: RunLog, table: str) -> tuple[int, int] | None:
    (span,) = log.sql(f"SELECT min(step) AS first, max(step) AS last FROM {table}").to_pylist()
    return None if span["first"] is None else (span["first"], span["last"])


def _make_cells(log: RunLog, windows: Windows) -> None:
    step, table = ("first_step", _SUMMARIES) if windows.from_summaries else ("step", "casts")
    figures = _FROM_SUMMARIES if windows.from_summaries else _FROM_CASTS
    counts = ", ".join(f"sum({name})::BIGINT AS {name}" for name in _COUNTS)
    log.sql(
        f"CREATE OR REPLACE TEMP TABLE {CELLS} AS "
        f"SELECT least(greatest(({step} - {windows.first}) // {windows.size}, 0), "
        f"{max(0, windows.count - 1)}) AS cell, site, {counts}, {figures} "
        f"FROM {table} GROUP BY ALL"
    )
