"""What FP8 covers of a run's matrix products, as its log says it. Torch-free."""

import json
from dataclasses import dataclass
from typing import Any

from unclamp.covered import SMALLEST_ROW, short
from unclamp.names import shown
from unclamp.runlog import COVERAGE_EVENT, RunLog

COVERAGE_COLUMNS = ("product", "M x N x K", "GFLOP a step", "share", "state")
MOST_ROWS = 30


@dataclass(frozen=True, kw_only=True)
class CoverageView:
    """The coverage of a run.

    Attributes:
        sentence: What is covered, and what is left out and why.
        share: Share of the FLOPs that is covered, 0 to 1.
        rows: Products, repeated layers in one, the largest share first: the cells of a table.
        more: How many rows are left out: the smallest.
    """

    sentence: str
    share: float
    rows: list[list[str]]
    more: int


def read_coverage(log: RunLog) -> CoverageView | None:
    """Return the coverage that a run recorded last; None where there is none to read.

    Raises:
        RunLogError: As `RunLog.sql`.
    """
    found = log.sql(
        "SELECT data FROM events WHERE kind = $kind ORDER BY step DESC, rank LIMIT 1",
        kind=COVERAGE_EVENT,
    )
    for text in found.column(0).to_pylist():
        try:
            return _view(json.loads(text))
        except (ValueError, KeyError, TypeError):  # a user's own event of this kind
            return None
    return None


def _view(data: dict[str, Any]) -> CoverageView:
    every = [row for row in data["rows"] if row["share"] >= SMALLEST_ROW]
    rows = [
        [
            shown(row["name"]) + (f" x{row['count']:,}" if row["count"] > 1 else ""),
            " x ".join(f"{size:,}" for size in row["sizes"]),
            f"{row['flops'] / 1e9:,.4g}",
            short(row["share"]),
            f"{row['state']}: {row['why']}" if row["why"] else row["state"],
        ]
        for row in every[:MOST_ROWS]
    ]
    return CoverageView(
        sentence=str(data["sentence"]),
        share=float(data["share"]),
        rows=rows,
        more=len(data["rows"]) - len(rows),
    )
