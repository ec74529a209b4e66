"""A DuckDB connection that is silent."""

from contextlib import suppress
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc


def connect(*, threads: int | None = None) -> duckdb.DuckDBPyConnection:
    """Return a connection in memory, with so many threads, or as many as the machine has.

    A bar after two seconds of a query would go to stdout: into the JSON of a command, or between
    what a training prints.
    """
    config: dict[str, Any] = {} if threads is None else {"threads": threads}
    connection = duckdb.connect(config=config)
    # In a notebook without ipywidgets there is no bar, and DuckDB refuses to set it.
    with suppress(duckdb.InvalidInputException):
        connection.execute("SET enable_progress_bar = false")
    return connection


def whole_numbers(rows: pa.Table) -> pa.Table:
    """Return `rows` with whole decimals as int64, in columns where all of them fit."""
    for index, column in enumerate(rows.schema):
        if pa.types.is_decimal(column.type) and column.type.scale == 0:
            try:
                whole = pc.cast(rows.column(index), pa.int64())
            except pa.ArrowInvalid:
                continue
            rows = rows.set_column(index, column.name, whole)
    return rows
