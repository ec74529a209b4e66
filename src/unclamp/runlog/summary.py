"""The summary of `casts`: a row per window of steps, rank and site.

The same SQL serves the writer, which stores a summary next to each merged part, and the reader,
which adds up those and summarises the parts that have none. It says nothing about where rows lie.

Windows are ranges of steps, not of parts. So rows of one window lie in several parts, and a run
that went back to an earlier step adds to the windows it had: summaries are merged once more.
"""

from unclamp.runlog.schema import SUMMARY_STEPS
from unclamp.totals import CLAMPED_SQL, SCALED_AMAX_SQL, UNDECIDED_SQL

_COUNTS = ("microsteps", "elements", "saturated", "underflowed", "nonfinite", "recast")
_INT64 = (-(2**63), 2**63 - 1)


def summary_sql(casts: str) -> str:
    """Return the query that summarises the rows of `casts`, a name or a query in brackets.

    NaN is above every number, as in DuckDB. Sums beyond int64 stay at its end.
    """
    totals = ", ".join(f"{_total(name)} AS {name}" for name in _COUNTS)
    return f"""
        SELECT {_window("step")} AS first_step, rank, site,
            count(*) AS steps, {totals},
            count(*) FILTER ({CLAMPED_SQL}) AS clamped,
            max(amax) AS amax_max,
            avg(amax::DOUBLE) AS amax_mean,
            max({SCALED_AMAX_SQL}) AS scaled_amax_max,
            min(scale) AS scale_min,
            max(scale) AS scale_max,
            sum(saturated_error) AS saturated_error_sum,
            max(saturated_error) AS saturated_error_max,
            {_worst("step", "saturated_error")} AS worst_step,
            min(sqnr_db) AS sqnr_db_min,
            avg(sqnr_db) FILTER (isfinite(sqnr_db)) AS sqnr_db_mean,
            count(*) FILTER (isfinite(sqnr_db)) AS sqnr_steps,
            count(*) FILTER (elements IS NULL) AS uncounted,
            count(*) FILTER ({UNDECIDED_SQL}) AS undecided,
            min(sqnr_row_median_db) AS sqnr_row_median_db_min,
            count(sqnr_row_median_db) AS sqnr_row_steps
        FROM {casts} GROUP BY ALL"""


def merged_sql(summaries: str) -> str:
    """Return the query that makes one row of those of a window, rank and site."""
    return _merged_sql(summaries, "first_step")


def coarser_sql(summaries: str, steps: int) -> str:
    """Return the same of windows of so many steps, a multiple of those that there are."""
    return _merged_sql(summaries, _window("first_step", steps))


def _merged_sql(summaries: str, window: str) -> str:
    counts = ("steps", *_COUNTS, "clamped")
    totals = ", ".join(f"{_total(name)} AS {name}" for name in counts)
    return f"""
        SELECT {window} AS first_step, rank, site, {totals},
            max(amax_max) AS amax_max,
            sum(amax_mean * steps) / sum(steps) FILTER (amax_mean IS NOT NULL) AS amax_mean,
            max(scaled_amax_max) AS scaled_amax_max,
            min(scale_min) AS scale_min,
            max(scale_max) AS scale_max,
            sum(saturated_error_sum) AS saturated_error_sum,
            max(saturated_error_max) AS saturated_error_max,
            {_worst("worst_step", "saturated_error_max")} AS worst_step,
            min(sqnr_db_min) AS sqnr_db_min,
            sum(sqnr_db_mean * sqnr_steps) / nullif(sum(sqnr_steps), 0) AS sqnr_db_mean,
            {_total("sqnr_steps")} AS sqnr_steps,
            coalesce(sum(uncounted), 0)::BIGINT AS uncounted,
            coalesce(sum(undecided), 0)::BIGINT AS undecided,
            min(sqnr_row_median_db_min) AS sqnr_row_median_db_min,
            CASE WHEN bool_and(sqnr_row_steps IS NOT NULL) THEN sum(sqnr_row_steps)::BIGINT END
                AS sqnr_row_steps
        FROM {summaries} GROUP BY ALL"""


def _window(step: str, steps: int = SUMMARY_STEPS) -> str:
    """Round a step down to its window, steps below 0 too; the last ones of int64 stay in it."""
    below = f"CASE WHEN {step} % {steps} < 0 AND {step} > {_INT64[0] + steps}"
    return f"({step} - {step} % {steps} - {below} THEN {steps} ELSE 0 END)"


def _total(count: str) -> str:
    """Return a sum within int64; null of nulls alone, which `least` and `greatest` would drop."""
    within = f"least(greatest(sum({count}), {_INT64[0]}), {_INT64[1]})::BIGINT"
    return f"CASE WHEN count({count}) > 0 THEN {within} END"


def _worst(step: str, error: str) -> str:
    """Of equal errors the first step wins, whatever the order of rows; `~` turns steps around."""
    return f"max_by({step}, ({error}, ~{step})) FILTER ({error} > 0)"
