"""The tables and views of a run, and the meaning of every column.

Nothing here touches the disk. The meaning of a column, with its unit, travels in the Parquet
files as field metadata, so that a part explains itself wherever it ends up. Tables are what a
writer is given; views are made of them when a run is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from unclamp.errors import RunLogError, did_you_mean
from unclamp.runlog.looks import GRADIENT, INSPECTED, PRICE, column

UNCAST_EVENT = "uncast"
"""The event that names products which cast nothing although they were trained."""
COVERAGE_EVENT = "coverage"
"""The event that says what FP8 covers of a step's matrix products."""
OUTSIDE_EVENT = "outside"
"""The event that names modules which ran, and not in the step that the coverage is of."""
AUTOPILOT_EVENT = "autopilot"
"""The event that says by which rule sites are steered, or what was decided, on what evidence."""
SUMMARY_STEPS = 100
"""Steps that one row of `summaries` stands for."""

Columns = Mapping[str, Sequence[Any] | np.ndarray]


def _uncounted(name: str, meaning: str, dtype: pa.DataType | None = None) -> pa.Field:
    """Return a column that only counting elements fills: a run of counts "casts" has none of it."""
    meaning = f"{meaning}; null where elements were not counted"
    return column(name, pa.int64() if dtype is None else dtype, meaning, nullable=True)


_STEP = column("step", pa.int64(), "optimizer step, from the recorder's count")
_RANK = column("rank", pa.int32(), "rank of the process that recorded the row")
_SITE = column(
    "site", pa.int32(), "id of the site: one operand (role) of one product (fqn) on one rank"
)

TABLES: Mapping[str, pa.Schema] = {
    "steps": pa.schema(
        [
            _STEP,
            _RANK,
            column("loss", pa.float64(), "training loss, in the user's unit", nullable=True),
            column("grad_norm", pa.float64(), "norm of all gradients", nullable=True),
            column("lr", pa.float64(), "learning rate", nullable=True),
            column("time_s", pa.float64(), "seconds since the run began"),
            column("step_ms", pa.float64(), "duration of the step, milliseconds", nullable=True),
            column(
                "scalars",
                pa.map_(pa.string(), pa.float64()),
                "whatever else the user records: name to value, in the user's unit",
                nullable=True,
            ),
            column(
                "group",
                pa.string(),
                "the user's name for the kind of the step's batch; null where none was given",
                nullable=True,
            ),
        ]
    ),
    "sites": pa.schema(
        [
            _SITE,
            _RANK,
            column("fqn", pa.string(), "dotted name of the module; the same on every rank"),
            column("role", pa.string(), "input, weight or grad_output"),
            column("format", pa.string(), "name of the FP8 format"),
            column("scaling", pa.string(), "kind of scaling, such as delayed"),
            column("history_len", pa.int32(), "amax history, updates", nullable=True),
            column("granularity", pa.string(), "which elements share a scale", nullable=True),
            column("format_max", pa.float64(), "largest finite value of the format"),
            column(
                "replicated",
                pa.bool_(),
                "whether a lower rank casts the same tensor, such as a weight under data "
                "parallelism: totals over ranks leave its counts out; false where nobody said",
                nullable=True,
            ),
            column(
                "only_counted",
                pa.bool_(),
                "whether nothing is computed from its casts, though the model trains in FP8: they "
                "are made to count what FP8 would lose, as of attention's products that no rule "
                "names; false where nobody said",
                nullable=True,
            ),
        ]
    ),
    "casts": pa.schema(
        [
            _STEP,
            _RANK,
            _SITE,
            column(
                "amax",
                pa.float32(),
                "largest absolute finite element of all the step's casts, in the tensor's unit; "
                "null where a log of others does not tell it",
                nullable=True,
            ),
            column(
                "scale",
                pa.float32(),
                "factor the tensor was multiplied by before the cast; of several casts in a step "
                "(microsteps), or several scales of one cast, the smallest; null likewise",
                nullable=True,
            ),
            _uncounted("elements", "elements cast, of all the step's casts, count"),
            _uncounted("saturated", "finite elements clamped to +-max, count"),
            _uncounted("underflowed", "non-zero elements that became zero, count"),
            _uncounted("nonfinite", "Inf and NaN elements, count"),
            column("recast", pa.int64(), "casts repeated with the true scale, count"),
            _uncounted(
                "saturated_error",
                "sum of squares removed by saturation over the sum of squares of the tensor, "
                "fraction; 0 where nothing is saturated",
                pa.float64(),
            ),
            column(
                "clamped",
                pa.bool_(),
                "whether any element was clamped; null where nobody knows, and in older logs, "
                "where saturated tells it",
                nullable=True,
            ),
            column(
                "microsteps",
                pa.int32(),
                "casts that this row stands for, count: a microbatch, or a call of a module that "
                "is called several times a step, makes one of each operand, or one along each axis",
            ),
            *INSPECTED,
            *GRADIENT,
            *PRICE,
        ]
    ),
    "events": pa.schema(
        [
            _STEP,
            _RANK,
            column("kind", pa.string(), "what happened: spike, switch, autopilot, snapshot, ..."),
            column("data", pa.string(), "details, as JSON text"),
        ]
    ),
}


def _count(name: str, meaning: str) -> pa.Field:
    return column(name, pa.int64(), f"{meaning}, count")


def _later(name: str, meaning: str) -> pa.Field:
    return column(name, pa.int64(), f"{meaning}, count; null in older logs: none", nullable=True)


def _known(name: str, dtype: pa.DataType, meaning: str) -> pa.Field:
    return column(name, dtype, f"{meaning}; null where no row has it", nullable=True)


VIEWS: Mapping[str, pa.Schema] = {
    "summaries": pa.schema(
        [
            column(
                "first_step",
                pa.int64(),
                f"first of the {SUMMARY_STEPS} steps that the row is about, a multiple of them",
            ),
            _RANK,
            _SITE,
            _count("steps", "rows of casts in this one"),
            _count("microsteps", "casts; a row of casts may stand for several"),
            _uncounted("elements", "elements cast, count"),
            _uncounted("saturated", "finite elements clamped to +-max, count"),
            _uncounted("underflowed", "non-zero elements that became zero, count"),
            _uncounted("nonfinite", "Inf and NaN elements, count"),
            _count("recast", "casts repeated with the true scale"),
            _count("clamped", "rows of casts with anything clamped, however many casts in it"),
            _known("amax_max", pa.float32(), "largest amax, in the tensor's unit"),
            _known("amax_mean", pa.float64(), "mean amax, in the tensor's unit"),
            _known(
                "scaled_amax_max",
                pa.float64(),
                "largest product of amax and scale; over sites.format_max it is the overshoot",
            ),
            _known("scale_min", pa.float32(), "smallest scale"),
            _known("scale_max", pa.float32(), "largest scale"),
            _uncounted("saturated_error_sum", "sum of saturated_error", pa.float64()),
            _uncounted("saturated_error_max", "largest saturated_error, fraction", pa.float64()),
            column(
                "worst_step",
                pa.int64(),
                "first step with the largest saturated_error; null where all of it is 0",
                nullable=True,
            ),
            column(
                "sqnr_db_min",
                pa.float64(),
                "smallest sqnr_db, decibel; Inf where every inspected cast was exact; null where "
                "none was inspected",
                nullable=True,
            ),
            column(
                "sqnr_db_mean",
                pa.float64(),
                "mean of the finite sqnr_db, decibel; null where there is none",
                nullable=True,
            ),
            _count("sqnr_steps", "rows of casts with a finite sqnr_db"),
            _later("uncounted", "rows of casts whose elements were not counted"),
            _later("undecided", "of these, rows of which nobody knows whether they clamped"),
            column(
                "sqnr_row_median_db_min",
                pa.float64(),
                "smallest sqnr_row_median_db, decibel; null where none was measured, and in older "
                "logs",
                nullable=True,
            ),
            column(
                "sqnr_row_steps",
                pa.int64(),
                "rows of casts with an sqnr_row_median_db, count; null in older logs: not known",
                nullable=True,
            ),
        ]
    ),
    "amaxes": pa.schema(
        [
            _STEP,
            column("fqn", pa.string(), "dotted name of the module"),
            column("role", pa.string(), "input, weight or grad_output"),
            column(
                "amax",
                pa.float32(),
                "largest finite amax of all ranks, in the tensor's unit; null where none is finite",
                nullable=True,
            ),
            column(
                "amax_rank",
                pa.int32(),
                "rank that had it, the lowest of several: the one that sets a scale which ranks "
                "share; null likewise",
                nullable=True,
            ),
            _count("ranks", "ranks that cast the operand in this step"),
        ]
    ),
    "switches": pa.schema(
        [
            _STEP,
            _RANK,
            column("fqn", pa.string(), "dotted name of the module"),
            column("role", pa.string(), "input, weight or grad_output"),
            column("before", pa.string(), "scaling until then, as JSON text"),
            column("after", pa.string(), "scaling from this step on, as JSON text"),
        ]
    ),
}


def describe_columns() -> pa.Table:
    """Return a row for each column of each table and view: table, column, type, meaning."""
    rows = [
        {
            "table": table,
            "column": column.name,
            "type": f"{column.type}, may be null" if column.nullable else str(column.type),
            "meaning": column.metadata[b"meaning"].decode(),
        }
        for table, schema in {**TABLES, **VIEWS}.items()
        for column in schema
    ]
    return pa.Table.from_pylist(rows)


def schema_of(table: str) -> pa.Schema:
    """Return the schema of `table`.

    Raises:
        RunLogError: there is no such table.
    """
    if table not in TABLES:
        hint = did_you_mean(table, TABLES)
        raise RunLogError(f"there is no table {table!r}; the tables are {list(TABLES)}{hint}")
    return TABLES[table]


def to_arrow(table: str, columns: Columns, *, rank: int) -> pa.Table:
    """Return `columns` as rows of `table`, sharing no memory with them.

    Missing nullable columns become null, a missing `rank` becomes `rank`; NaN stays NaN.
    No columns, or columns without elements, give no rows.

    Raises:
        RunLogError: a column is unknown, missing, of another length than the others, or holds
            what its type cannot (a null where none is allowed, a fraction in a count).
    """
    schema = schema_of(table)
    unknown = [name for name in columns if name not in schema.names]
    if unknown:
        hint = did_you_mean(unknown[0], schema.names)
        raise RunLogError(f"table {table!r} has no column {unknown}; it has {schema.names}{hint}")
    try:
        lengths = {name: len(values) for name, values in columns.items()}
    except TypeError as error:
        raise RunLogError(f"columns of {table!r} must be sequences: {error}") from error
    if len(set(lengths.values())) > 1:
        raise RunLogError(f"columns of {table!r} must have equal lengths, got {lengths}")
    rows = max(lengths.values(), default=0)
    filled = {"rank": np.full(rows, rank, dtype=np.int32), **columns}
    arrays = [_to_array(table, column, filled.get(column.name), rows) for column in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _to_array(
    table: str, column: pa.Field, values: Sequence[Any] | np.ndarray | None, rows: int
) -> pa.Array:
    if isinstance(values, np.ndarray):
        values = values.copy()  # Arrow would share the caller's buffer, which may be reused
    try:
        array = pa.nulls(rows, column.type) if values is None else pa.array(values, column.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise RunLogError(
            f"column {column.name!r} of {table!r} must hold {column.type}: {error}"
        ) from error
    if array.null_count and not column.nullable:
        raise RunLogError(f"column {column.name!r} of {table!r} needs a value in every row")
    return array
