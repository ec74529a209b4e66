"""Logs of schema 1, read as those of schema 2.

Their table `sites` had no rank, and each rank numbered its sites from 0. The rank stands in a
part's name; and site n of rank r becomes n * world size + r, as recorders number sites since.
Their header kept what a recorder knew among the user's metadata, in the place of keys of the
user's that were called the same.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unclamp.runlog.cadence import Cadence
from unclamp.runlog.parts import PartName, opened
from unclamp.runlog.schema import TABLES

VERSION = 1


def lift_header(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header's data with fields for what was kept among the metadata."""
    metadata = dict(data.get("metadata") or {})
    lifted: dict[str, Any] = {}
    if Cadence.from_dict(metadata.get("cadence")) is not None:
        lifted["cadence"] = metadata.pop("cadence")
    if metadata.get("observed") is True:
        lifted["observed"] = metadata.pop("observed")
    return {**data, **lifted, "metadata": metadata}


def read_sites(parts: Iterable[Path], *, world_size: int) -> pa.Table:
    """Return the table `sites` with the ranks that the names of its parts say.

    A part of another name, such as one that a user made of several, holds for all ranks.

    Raises:
        OSError, pa.ArrowException: A part cannot be read.
    """
    tables = [TABLES["sites"].empty_table()]
    for path in parts:
        with opened(path) as file:
            rows = file.read(use_threads=False)
        name = PartName.parse(path.name)
        for rank in range(world_size) if name is None else (name.rank,):
            tables.append(_with_rank(rows, rank, world_size))
    return pa.concat_tables(tables)


def renumbered_sql(relation: str, *, world_size: int) -> str:
    """Return the query of a relation whose site ids are unique in the run."""
    return (
        f"SELECT * REPLACE ((site::BIGINT * {world_size} + rank)::INTEGER AS site) FROM {relation}"
    )


def _with_rank(rows: pa.Table, rank: int, world_size: int) -> pa.Table:
    sites = rows["site"].to_numpy().astype(np.int64) * world_size + rank
    known = {"site": sites, "rank": np.full(len(rows), rank)}
    columns = [
        pa.array(known[column.name], column.type)
        if column.name in known
        else rows[column.name].cast(column.type)
        if column.name in rows.column_names
        else pa.nulls(len(rows), column.type)
        for column in TABLES["sites"]
    ]
    return pa.Table.from_arrays(columns, schema=TABLES["sites"])
