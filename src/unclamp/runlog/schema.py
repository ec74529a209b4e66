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

UNCAST_EVENT = "uncast"
"""The event that names products which cast nothing although they were trained."""
COVERAGE_EVENT = "coverage"
"""The event that says what FP8 covers of a step's matrix products."""
OUTSIDE_EVENT = "outside"
"""The event that names modules which ran, and not in the step that the coverage is of."""
SUMMARY_STEPS = 100
"""Steps that one row of `summaries` stands for."""

Columns = Mapping[str, Sequence[Any] | np.ndarray]


def _column(name: str, dtype: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, dtype, nullable=nullable, metadata={"meaning": meaning})


def _uncounted(name: str, meaning: str, dtype: pa.DataType | None = None) -> pa.Field:
    """Return a column that only counting elements fills: a run of counts "casts" has none of it."""
    meaning = f"{meaning}; null where elements were not counted"
    return _column(name, pa.int64() if dtype is None else dtype, meaning, nullable=True)


_STEP = _column("step", pa.int64(), "optimizer step, from the recorder's count")
_RANK = _column("rank", pa.int32(), "rank of the process that recorded the row")
_SITE = _column(
    "site", pa.int32(), "id of the site: one operand (role) of one product (fqn) on one rank"
)

_INSPECTED = [
    _column(
        "sqnr_db",
        pa.float64(),
        "sum of squares of the finite elements over that of the cast's errors, decibel; Inf for "
        "an exact cast; null where the cast was not inspected or saw no non-zero element",
        nullable=True,
    ),
    _column(
        "sqnr_row_median_db",
        pa.float64(),
        "median over rows of the ratio of each row alone, decibel, to 0.25: a row is a token of an "
        "input or grad_output, an output feature of a weight; rows without a non-zero element are "
        "left out; Inf where half of them are exact, null likewise",
        nullable=True,
    ),
    _column(
        "range_used",
        pa.float64(),
        "share of the format's powers of two that at least one code lies in, fraction",
        nullable=True,
    ),
    _column(
        "headroom_bits",
        pa.float64(),
        "log2 of the largest representable value over amax; below 0 where anything was clamped",
        nullable=True,
    ),
    _column(
        "scale_age",
        pa.int32(),
        "updates of the site since the amax that the scale comes from; 0 where it is the tensor's "
        "own, null where it comes from no single one",
        nullable=True,
    ),
    _column(
        "exponents",
        pa.map_(pa.int16(), pa.int64()),
        "floor(log2 |x|) to elements, count, over finite non-zero elements",
        nullable=True,
    ),
]
"""What costs a pass of its own: only at the steps that the recorder inspects, else null."""

_GRADIENT = [
    _column(
        "grad_error",
        pa.float64(),
        "of a grad_output: norm of what its clamping changed in the weight's gradient over the "
        "norm of that gradient without it, each over those of the step's casts that clamped; 0 "
        "where nothing was clamped, null where it was not measured or is not finite",
        nullable=True,
    ),
    _column(
        "grad_cosine",
        pa.float64(),
        "cosine between the weight's gradient and the one without clamping; 1 and null likewise",
        nullable=True,
    ),
    _column(
        "grad_ratio",
        pa.float64(),
        "norm of the weight's gradient over that of the one without clamping; 1 and null likewise",
        nullable=True,
    ),
    _column(
        "weight_grad_norm",
        pa.float64(),
        "norm of the weight's gradient without clamping, of the loss as it was scaled: root of the "
        "sum of squares over those of the step's casts that clamped; null where none did, or it "
        "was not measured",
        nullable=True,
    ),
]
"""What clamping a gradient did to the weight's: where it clamped and was measured, else null."""

_PRICE = [
    _column(
        "price_clamp",
        pa.float64(),
        "of an input or weight: sum over the clamped elements of the gradient of the loss times "
        "what the cast changed, x_hat - x, in units of the loss, over all of the step's casts; "
        "above 0 where clamping raised the loss, to first order; 0 where nothing was clamped, null "
        "where it was not measured or is not finite",
        nullable=True,
    ),
    _column(
        "price_rounding",
        pa.float64(),
        "the same over all other elements: rounding, and underflow with it; null unless the "
        "recorder was asked for it, and likewise",
        nullable=True,
    ),
]
"""What casts changed of the loss, to first order, where it was measured, else null."""

TABLES: Mapping[str, pa.Schema] = {
    "steps": pa.schema(
        [
            _STEP,
            _RANK,
            _column("loss", pa.float64(), "training loss, in the user's unit", nullable=True),
            _column("grad_norm", pa.float64(), "norm of all gradients", nullable=True),
            _column("lr", pa.float64(), "learning rate", nullable=True),
            _column("time_s", pa.float64(), "seconds since the run began"),
            _column("step_ms", pa.float64(), "duration of the step, milliseconds", nullable=True),
            _column(
                "scalars",
                pa.map_(pa.string(), pa.float64()),
                "whatever else the user records: name to value, in the user's unit",
                nullable=True,
            ),
            _column(
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
            _column("fqn", pa.string(), "dotted name of the module; the same on every rank"),
            _column("role", pa.string(), "input, weight or grad_output"),
            _column("format", pa.string(), "name of the FP8 format"),
            _column("scaling", pa.string(), "kind of scaling, such as delayed"),
            _column("history_len", pa.int32(), "amax history, updates", nullable=True),
            _column("granularity", pa.string(), "which elements share a scale", nullable=True),
            _column("format_max", pa.float64(), "largest finite value of the format"),
            _column(
                "replicated",
                pa.bool_(),
                "whether a lower rank casts the same tensor, such as a weight under data "
                "parallelism: totals over ranks leave its counts out; false where nobody said",
                nullable=True,
            ),
            _column(
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
            _column(
                "amax",
                pa.float32(),
                "largest absolute finite element of all the step's casts, in the tensor's unit; "
                "null where a log of others does not tell it",
                nullable=True,
            ),
            _column(
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
            _column("recast", pa.int64(), "casts repeated with the true scale, count"),
            _uncounted(
                "saturated_error",
                "sum of squares removed by saturation over the sum of squares of the tensor, "
                "fraction; 0 where nothing is saturated",
                pa.float64(),
            ),
            _column(
                "clamped",
                pa.bool_(),
                "whether any element was clamped; null where nobody knows, and in older logs, "
                "where saturated tells it",
                nullable=True,
            ),
            _column(
                "microsteps",
                pa.int32(),
                "casts that this row stands for, count: a microbatch, or a call of a module that "
                "is called several times a step, makes one of each operand, or one along each axis",
            ),
            *_INSPECTED,
            *_GRADIENT,
            *_PRICE,
        ]
    ),
    "events": pa.schema(
        [
            _STEP,
            _RANK,
            _column("kind", pa.string(), "what happened: spike, switch, snapshot, uncast, ..."),
            _column("data", pa.string(), "details, as JSON text"),
        ]
    ),
}


def _count(name: str, meaning: str) -> pa.Field:
    return _column(name, pa.int64(), f"{meaning}, count")


def _later(name: str, meaning: str) -> pa.Field:
    return _column(name, pa.int64(), f"{meaning}, count; null in older logs: none", nullable=True)


def _known(name: str, dtype: pa.DataType, meaning: str) -> pa.Field:
    return _column(name, dtype, f"{meaning}; null where no row has it", nullable=True)


VIEWS: Mapping[str, pa.Schema] = {
    "summaries": pa.schema(
        [
            _column(
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
            _column(
                "worst_step",
                pa.int64(),
                "first step with the largest saturated_error; null where all of it is 0",
                nullable=True,
            ),
            _column(
                "sqnr_db_min",
                pa.float64(),
                "smallest sqnr_db, decibel; Inf where every inspected cast was exact; null where "
                "none was inspected",
                nullable=True,
            ),
            _column(
                "sqnr_db_mean",
                pa.float64(),
                "mean of the finite sqnr_db, decibel; null where there is none",
                nullable=True,
            ),
            _count("sqnr_steps", "rows of casts with a finite sqnr_db"),
            _later("uncounted", "rows of casts whose elements were not counted"),
            _later("undecided", "of these, rows of which nobody knows whether they clamped"),
        ]
    ),
    "amaxes": pa.schema(
        [
            _STEP,
            _column("fqn", pa.string(), "dotted name of the module"),
            _column("role", pa.string(), "input, weight or grad_output"),
            _column(
                "amax",
                pa.float32(),
                "largest finite amax of all ranks, in the tensor's unit; null where none is finite",
                nullable=True,
            ),
            _column(
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
            _column("fqn", pa.string(), "dotted name of the module"),
            _column("role", pa.string(), "input, weight or grad_output"),
            _column("before", pa.string(), "scaling until then, as JSON text"),
            _column("after", pa.string(), "scaling from this step on, as JSON text"),
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
