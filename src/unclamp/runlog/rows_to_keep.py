"""Which rows of `casts` a rule keeps, and what else has to stay so that readers stay right.

Beside what `Keep` says these stay:

- a step that a rank recorded twice, since its last record replaces the first;
- the window of steps in which an attempt's rows cease to count, which is summed up from its rows;
- on all ranks a cast that clamped on one of them, since a price is the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unclamp.runlog.keeping import KEPT_SQL, Keep
from unclamp.runlog.parts import PartName, column_range, parts_that_count
from unclamp.runlog.reader import RunLog
from unclamp.runlog.relations import ends_of, first_steps
from unclamp.runlog.schema import SUMMARY_STEPS
from unclamp.runlog.sites import PLACES_SQL
from unclamp.totals import CLAMPED_SQL, SCALED_AMAX_SQL

_NO_STEP = -(2**63)
_KEPT = KEPT_SQL.format(clamped=CLAMPED_SQL, scaled_amax=SCALED_AMAX_SQL)
_AGAIN = """
    SELECT DISTINCT step FROM (
        SELECT step FROM steps GROUP BY step, rank HAVING count(*) > 1) ORDER BY step"""
_CLAMPED_ELSEWHERE = f"""
    WITH places AS MATERIALIZED (SELECT rank, site, place FROM ({PLACES_SQL})),
    clamped AS (
        SELECT DISTINCT place, step FROM casts JOIN places USING (rank, site)
        WHERE step BETWEEN $first AND $last AND rank <> $rank AND {CLAMPED_SQL})
    SELECT site, step FROM clamped JOIN places USING (place) WHERE places.rank = $rank"""


@dataclass(frozen=True, kw_only=True)
class RowsToKeep:
    """Says of a part's rows which stay.

    Attributes:
        path: The run.
        keep: The rule; None where all stay.
        before: Steps from this one on are whole.
        whole: Earlier ones that are, rising.
        ends: The step from which on an attempt does not count, by attempt: from there its rows
            stay as they are.
        sites: Ids of sites, rising.
        format_max: Of each of them.
        ranks: How many ranks wrote casts.
    """

    path: Path
    keep: Keep | None
    before: int
    whole: NDArray[np.int64]
    ends: dict[int, int]
    sites: NDArray[np.int64]
    format_max: NDArray[np.float64]
    ranks: int

    def keeps_all_of(self, path: Path) -> bool:
        """Whether no row of a part can go, by its steps alone."""
        first, _ = _steps_of(path)
        return self.keep is None or first is None or first >= self.before

    def extent(self, path: Path) -> tuple[int, set[int]]:
        """Return how many rows a part has, and the steps they are of."""
        with pq.ParquetFile(path) as file:
            if self.keep is None:
                return file.metadata.num_rows, set()
            steps = file.read(columns=["step"], use_threads=False)["step"].to_numpy()
        return len(steps), set(np.unique(steps).tolist())

    def mask(
        self, rows: pa.Table, name: PartName, connection: duckdb.DuckDBPyConnection
    ) -> NDArray[np.bool_]:
        """Return of each row of a part whether it stays."""
        if self.keep is None:
            return np.ones(len(rows), dtype=np.bool_)
        step, site = rows["step"].to_numpy(), rows["site"].to_numpy().astype(np.int64)
        kept = (step >= self.before) | (step % self.keep.every == 0) | np.isin(step, self.whole)
        if (end := self.ends.get(name.attempt)) is not None:
            kept |= step >= end - end % SUMMARY_STEPS
        if self.ranks > 1 and not kept.all():
            kept |= self._clamped_elsewhere(name.rank, step, site)
        return kept | self._by_row(rows, site, connection)

    def _by_row(
        self, rows: pa.Table, site: NDArray[np.int64], connection: duckdb.DuckDBPyConnection
    ) -> NDArray[np.bool_]:
        at = np.searchsorted(self.sites, site)
        is_known = np.append(self.sites, -1)[at] == site
        largest = np.append(self.format_max, np.nan)[at]
        names = ["amax", "scale", "saturated", "nonfinite", "recast", "clamped", "range_used",
                 "sqnr_db", "price_rounding"]  # fmt: skip
        asked = rows.select(names).append_column(
            "format_max", pa.array(largest, mask=~is_known, type=pa.float64())
        )
        connection.register("asked", asked)
        try:
            found = connection.sql(f"SELECT {_KEPT} AS stays FROM asked")  # in their order
            return found.to_arrow_table()["stays"].to_numpy().astype(np.bool_)
        finally:
            connection.unregister("asked")

    def _clamped_elsewhere(
        self, rank: int, step: NDArray[np.int64], site: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        asked = {"rank": rank, "first": int(step.min()), "last": int(step.max())}
        with RunLog.open(self.path) as log:
            found = log.sql(_CLAMPED_ELSEWHERE, **asked)
        first = asked["first"]
        sites = found["site"].to_numpy().astype(np.int64)
        return np.isin(_key(site, step - first), _key(sites, found["step"].to_numpy() - first))


def rows_to_keep(path: Path, keep: Keep | None, *, near: Iterable[int]) -> RowsToKeep:
    """Return what says which rows of a run stay.

    Args:
        path: The run.
        keep: The rule; None to keep all.
        near: Steps around which all rows stay, as the rule says.

    Raises:
        RunLogError: The run cannot be read.
    """
    tables = {table: parts_that_count(path / table) for table in ("steps", "casts")}
    with RunLog.open(path) as log:
        again = log.sql(_AGAIN)["step"].to_numpy()
        (span,) = log.sql("SELECT max(step) AS last FROM steps").to_pylist()
        last = span["last"]
        if last is None:
            (span,) = log.sql("SELECT max(step) AS last FROM casts").to_pylist()
            last = span["last"]
        largest = log.sql(
            "SELECT site, min(format_max) AS format_max FROM sites GROUP BY site ORDER BY site"
        )
    names = [PartName.parse(part.name) for part in tables["casts"]]
    is_again = any(name is not None and name.attempt for name in names)
    whole = [again]
    if keep is not None:
        around = np.arange(-keep.near, keep.near + 1)
        whole.append(np.add.outer(np.fromiter(near, dtype=np.int64), around).ravel())
    return RowsToKeep(
        path=path,
        keep=keep,
        before=_NO_STEP if keep is None or last is None else last + 1 - keep.recent,
        whole=np.unique(np.concatenate(whole)),
        ends=ends_of(first_steps(tables)) if is_again else {},
        sites=largest["site"].to_numpy().astype(np.int64),
        format_max=largest["format_max"].to_numpy(),
        ranks=len({name.rank for name in names if name is not None}),
    )


def _steps_of(path: Path) -> tuple[int | None, int | None]:
    return column_range(pq.read_metadata(path), "step") or (None, None)


def _key(site: NDArray[np.int64], step: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one number of both: steps of a part are fewer than 2**31."""
    return site << 32 | step
