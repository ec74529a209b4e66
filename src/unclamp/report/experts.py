"""Experts of a run by their tokens: who gets few, and whose scales are old. Torch-free.

An expert without tokens makes no cast, and its scale stays what it was: when tokens come, it is of
a time long past. Experts are told by their names, `experts.up.5` or `experts.5.up`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unclamp.names import bank_of
from unclamp.runlog import PLACES_SQL, RunLog
from unclamp.written import percent

LISTED_BANKS = 16
EXPERT_COLUMNS = (
    "experts",
    "how many",
    "fewest tokens",
    "of an even share",
    "steps without tokens",
    "longest without",
    "past its history",
    "oldest scale",
)

_TOKENS = f"""
WITH places AS MATERIALIZED (
    SELECT rank, site, fqn, history_len FROM ({PLACES_SQL})
    WHERE role = 'input' AND contains(lower(fqn), 'expert')),
looked AS (
    SELECT fqn, step, sum(elements) AS elements, max(scale_age) AS age
    FROM casts JOIN places USING (rank, site) GROUP BY fqn, step),
spans AS (
    SELECT *, step - lag(step, 1, $first - 1) OVER (PARTITION BY fqn ORDER BY step) AS span
    FROM looked),
found AS (
    SELECT fqn, sum(elements)::DOUBLE AS elements, count(*) AS steps, max(age) AS age,
        greatest(max(span), $last - max(step) + 1) AS span
    FROM spans GROUP BY fqn)
SELECT fqn, any_value(history_len) AS history_len, coalesce(any_value(elements), 0) AS elements,
    coalesce(any_value(steps), 0) AS steps, any_value(age) AS age,
    coalesce(any_value(span), $last - $first + 2) - 1 AS gap
FROM (SELECT DISTINCT fqn, history_len FROM places) LEFT JOIN found USING (fqn)
GROUP BY fqn ORDER BY fqn
"""


@dataclass(frozen=True, kw_only=True)
class ExpertsRow:
    """One product of all experts of a layer, as a row of the table.

    Attributes:
        name: Of the product, a star in place of the expert's number.
        experts: How many there are.
        fewest: The expert with the fewest tokens, by its name.
        even_share: Its tokens over those of an even share, fraction; None where the log counts no
            elements: then `fewest` is the one with the fewest casts.
        idle: Recorded steps in which some expert cast nothing: of the expert with most of them.
        gap: Steps in a row without tokens, the most of any expert.
        stale: Experts that once had none for longer than their history looks back.
        oldest: Updates since the amax that a scale came from, the most at an inspected step; None
            where no step was inspected.
    """

    name: str
    experts: int
    fewest: str
    even_share: float | None
    idle: int
    gap: int
    stale: int
    oldest: int | None


def read_experts(log: RunLog) -> list[ExpertsRow]:
    """Return the experts of a run, those with the fewest tokens first; none without any.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    if not any("expert" in site.fqn.lower() for site in log.named_sites()):
        return []
    span = log.sql(
        "SELECT count(DISTINCT step) AS steps, min(step) AS first, max(step) AS last FROM casts"
    ).to_pylist()[0]
    if not span["steps"]:
        return []
    rows = log.sql(_TOKENS, first=span["first"], last=span["last"]).to_pylist()
    banks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = bank_of(row["fqn"])
        if name != row["fqn"]:
            banks.setdefault(name, []).append(row)
    is_counted = log.header.counts == "elements"
    found = [
        _row(name, own, span["steps"], is_counted=is_counted)
        for name, own in banks.items()
        if len(own) > 1
    ]
    return sorted(found, key=lambda row: (row.even_share or 0.0, row.name))


def _row(
    name: str, experts: Sequence[dict[str, Any]], steps: int, *, is_counted: bool
) -> ExpertsRow:
    least = min(experts, key=lambda row: (row["elements"], row["steps"], row["fqn"]))
    mean = sum(row["elements"] for row in experts) / len(experts)
    ages = [row["age"] for row in experts if row["age"] is not None]
    return ExpertsRow(
        name=name,
        experts=len(experts),
        fewest=least["fqn"],
        even_share=(least["elements"] / mean if mean else 0.0) if is_counted else None,
        idle=steps - min(row["steps"] for row in experts),
        gap=max(row["gap"] for row in experts),
        stale=sum(
            row["history_len"] is not None and row["gap"] > row["history_len"] for row in experts
        ),
        oldest=max(ages, default=None),
    )


def experts_row(row: ExpertsRow) -> list[str]:
    """Return one as cells under `EXPERT_COLUMNS`."""
    return [
        row.name,
        f"{row.experts:,}",
        row.fewest,
        "-" if row.even_share is None else percent(row.even_share),
        f"{row.idle:,}",
        f"{row.gap:,}",
        f"{row.stale:,}",
        "-" if row.oldest is None else f"{row.oldest:,}",
    ]
