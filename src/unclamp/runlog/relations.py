"""What a query sees of a run's parts: relations, each of some parts, and the views made of them.

Where a run was begun again, what an earlier attempt recorded from the new one's first step on was
thrown away with its weights. It stays on disk, and no view shows it. Each attempt's parts are then
relations of their own, and the tables are views over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds

from unclamp.runlog import schema_1
from unclamp.runlog.header import Header
from unclamp.runlog.levels import coarse_summaries, stored_name
from unclamp.runlog.located import REMOTE_PARQUET, arrow_name, arrow_system
from unclamp.runlog.parts import attempt_of, range_in
from unclamp.runlog.schema import SUMMARY_STEPS, TABLES, VIEWS
from unclamp.runlog.sites import SITES_SQL
from unclamp.runlog.summary import merged_sql, summary_sql
from unclamp.totals import LOOK_FIRST_SQL

Parts = dict[str, list[Path]]
"""The parts of each table, of `stored_summaries`, of what is stored of coarser levels (`levels`),
and of `casts_without_summary`."""

_SUMMARIES = merged_sql(
    f"(FROM stored_summaries UNION ALL BY NAME {summary_sql('casts_without_summary')})"
)
_SWITCHES = """
    SELECT step, rank, site->>'fqn' AS fqn, site->>'role' AS role,
        (site->'before')::VARCHAR AS before, (site->'after')::VARCHAR AS after
    FROM (
        SELECT step, rank, unnest(json_extract(data, '$.sites[*]')) AS site
        FROM events WHERE kind = 'switch' AND json_valid(data)
    )
    WHERE fqn IS NOT NULL AND role IS NOT NULL AND before IS NOT NULL AND after IS NOT NULL"""
_AMAXES = """
    SELECT step, fqn, role, max(amax) FILTER (isfinite(amax)) AS amax,
        max_by(rank, (amax, -rank)) FILTER (isfinite(amax)) AS amax_rank,
        count(DISTINCT rank) AS ranks
    FROM casts JOIN (SELECT DISTINCT rank, site, fqn, role FROM sites) USING (rank, site)
    GROUP BY step, fqn, role"""
_SCHEMAS = {
    **TABLES,
    "stored_summaries": VIEWS["summaries"],
    "casts_without_summary": TABLES["casts"],
}
"""The columns of each kind of relation, of which coarser summaries have those of finer ones."""
CLAMPED_CASTS = "clamped_casts"
"""The rows of casts that clamped, and those of which it takes a look at more than `saturated`."""
HELD_CLAMPED = f"""
    CREATE OR REPLACE TEMP TABLE held_{CLAMPED_CASTS} AS
    SELECT step, rank, site, amax, scale, saturated, saturated_error, clamped, grad_error,
        grad_cosine, grad_ratio, weight_grad_norm, price_clamp, price_rounding
    FROM casts WHERE {LOOK_FIRST_SQL}"""
"""Not from the view, which may be of what was held before."""
_OF_SITES = ("casts", "stored_summaries", "casts_without_summary")
"""Relations whose rows refer to a site by its id."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Rows of some parts.

    Attributes:
        kind: A table, "stored_summaries" (of some level) or "casts_without_summary": which columns
            they have.
        parts: The parts.
    """

    kind: str
    parts: list[Path]


@dataclass(frozen=True, kw_only=True)
class Relations:
    """What to register, and the queries of the views, in an order in which they can be made."""

    registered: dict[str, Relation]
    views: dict[str, str]


def relations_of(parts: Parts, header: Header) -> Relations:
    """Return the relations of a run.

    A view with the name of a kind stands in front of its relation: that is `written_<kind>` then.
    """
    coarsest = max((n for n in range(len(parts)) if stored_name(n) in parts), default=0)
    views = _views(header, coarsest)
    attempts = sorted({attempt_of(path) for files in parts.values() for path in files})
    ends = ends_of(first_steps(parts)) if any(attempts) else {}
    parts = _with_levels(parts, ends)
    names = {kind: f"written_{kind}" if kind in views else kind for kind in parts}
    if not any(attempts):
        registered = {names[kind]: Relation(kind=kind, parts=parts[kind]) for kind in parts}
        return Relations(registered=registered, views=views)
    registered, unions = {}, dict.fromkeys(parts, "")
    summed = _summed(parts)
    for attempt in attempts:
        own = {kind: _of_attempt(files, attempt) for kind, files in parts.items()}
        end = ends.get(attempt)
        for kind, files in own.items():
            name = f"{kind}_of_attempt_{attempt}"
            registered[name] = Relation(kind=kind, parts=files)
            unions[kind] += f" UNION ALL BY NAME (FROM {name}{_until(kind, end)})"
        if end is not None:  # the summary of its last window is of rows beyond the end too
            name = f"summed_casts_of_attempt_{attempt}"
            registered[name] = Relation(kind="casts", parts=_of_attempt(summed, attempt))
            unions["casts_without_summary"] += (
                f" UNION ALL BY NAME (FROM {name} WHERE step >= {_window_of(end)} AND step < {end})"
            )
    tables = {names[kind]: union.removeprefix(" UNION ALL BY NAME ")
              for kind, union in unions.items()}  # fmt: skip
    return Relations(registered=registered, views=tables | views)


def first_steps(parts: Mapping[str, Iterable[Path]]) -> dict[int, int]:
    """Return the first step of each attempt of a run; those that recorded none are not in it."""
    found: dict[int, int] = {}
    files = [path for table in ("steps", "casts") for path in parts[table]]
    for attempt in {attempt_of(path) for path in files}:
        if (steps := range_in(_of_attempt(files, attempt), "step")) is not None:
            found[attempt] = steps[0]
    return found


def ends_of(firsts: Mapping[int, int]) -> dict[int, int]:
    """Return the step from which on an attempt does not count, of those that have one."""
    found: dict[int, int] = {}
    for attempt in range(max(firsts, default=0)):
        found[attempt] = min(first for number, first in firsts.items() if number > attempt)
    return found


def _with_levels(parts: Parts, ends: Mapping[int, int]) -> Parts:
    """Return the parts, those of each level completed by finer ones where it has none."""

    def counts(path: Path, steps: int) -> bool:
        end = ends.get(attempt_of(path))
        if end is None:
            return True
        found = range_in([path], "first_step")
        return found is not None and found[1] + steps <= _window_of(end)

    stored = {n: parts[stored_name(n)] for n in range(1, len(parts)) if stored_name(n) in parts}
    complete = {
        stored_name(level): coarse_summaries(
            parts["stored_summaries"], stored, level=level, may_use=counts
        )
        for level in stored
    }
    return parts | complete


def _of_attempt(files: Iterable[Path], attempt: int) -> list[Path]:
    return [path for path in files if attempt_of(path) == attempt]


def _summed(parts: Parts) -> list[Path]:
    """Return the parts of casts whose summaries are stored."""
    without = set(parts["casts_without_summary"])
    return [path for path in parts["casts"] if path not in without]


def _until(kind: str, end: int | None) -> str:
    if end is None or kind == "sites":
        return ""
    if kind.startswith("stored_summaries"):  # a coarser one is not taken if it goes beyond
        return f" WHERE first_step < {_window_of(end)}"
    return f" WHERE step < {end}"


def _window_of(step: int) -> int:
    return step - step % SUMMARY_STEPS


def _views(header: Header, coarsest: int) -> dict[str, str]:
    views = {}
    if header.schema_version == schema_1.VERSION and header.world_size > 1:
        views = {
            name: schema_1.renumbered_sql(f"written_{name}", world_size=header.world_size)
            for name in _OF_SITES
        }
    return views | {
        "sites": SITES_SQL,
        "amaxes": _AMAXES,
        "summaries": _SUMMARIES,
        "coarsest_summaries": f"FROM {stored_name(coarsest)}",
        CLAMPED_CASTS: f"FROM casts WHERE {LOOK_FIRST_SQL}",
        "switches": _SWITCHES,
    }


def _schema_of(kind: str) -> pa.Schema:
    return _SCHEMAS["stored_summaries" if kind.startswith("stored_summaries") else kind]


def dataset_of(relation: Relation) -> ds.Dataset:
    """Return the rows of a relation's parts, read when they are asked for."""
    paths, schema = relation.parts, _schema_of(relation.kind)
    system = arrow_system(paths[0]) if paths else None
    kind = "parquet" if system is None else REMOTE_PARQUET
    return ds.dataset([arrow_name(path) for path in paths], schema, kind, filesystem=system)
