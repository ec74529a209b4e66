"""Read a run, finished or not, with SQL or as Arrow tables.

The parts on disk are listed anew for every query, so a query sees all that has been flushed by
then. DuckDB reads them through an Arrow dataset: paths are never parsed as patterns or SQL.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from unclamp.errors import RunLogError
from unclamp.runlog.schema import KIND, RUN_FILE, TABLES, Header

STUDY_FILE = "study.json"


class RunLog:
    """One run, open for reading; `open` makes it, `close` or `with` releases it.

    The views `steps`, `sites`, `casts` and `events` hold the rows of all ranks. A table nothing
    was written to yet is empty, with all its columns. A site that several ranks recorded alike
    is one row.
    """

    def __init__(self, path: Path) -> None:
        """Prefer `RunLog.open`, which checks that `path` is a run."""
        self.path = path
        self._connection = duckdb.connect()
        self._parts: dict[str, list[Path]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunLog:
        """Open the run in the folder `path`, whatever its status.

        Raises:
            RunLogError: `path` does not exist, is a file, is not a run, or is a run that this
                version cannot read.
        """
        _read_header(Path(path))
        return cls(Path(path))

    @property
    def header(self) -> Header:
        """The header as it is now: `header.status` follows a run that is still going on.

        Raises:
            RunLogError: the run is gone.
        """
        return _read_header(self.path)

    def sql(self, query: str, **params: Any) -> pa.Table:
        """Return what `query` selects; it refers to a parameter as `$name`.

        NaN follows DuckDB: it equals itself and is above every number. A statement without a
        result returns a table without columns.

        Raises:
            RunLogError: DuckDB refuses the query, a part is damaged, the run is gone, or the
                log is closed.

        Example:
            `log.sql("SELECT max(amax) AS peak FROM casts WHERE site = $site", site=3)`
        """
        while True:
            parts = self._list_parts()
            try:
                self._register(parts)
                relation = self._connection.sql(query, params=params or None)
                return pa.table({}) if relation is None else relation.to_arrow_table()
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                if all(part.exists() for files in parts.values() for part in files):
                    raise RunLogError(f"the query on {self.path} failed: {error}") from error
                # A part was removed under the query: ask again, of those that are left.

    def steps(self) -> pa.Table:
        """Return the table `steps`, ordered by step, then rank, then time of recording."""
        return self._table("steps", "step", "rank")

    def sites(self) -> pa.Table:
        """Return the table `sites`, ordered by site."""
        return self._table("sites", "site")

    def casts(self, site: int | None = None) -> pa.Table:
        """Return the table `casts`, of one `site` or all, ordered by step, rank and site."""
        if site is None:
            return self._table("casts", "step", "rank", "site")
        return self._table("casts", "step", "rank", where=f"WHERE site = {int(site)}")

    def events(self) -> pa.Table:
        """Return the table `events`, ordered by step, then rank, then time of recording."""
        return self._table("events", "step", "rank")

    def close(self) -> None:
        """Release the connection; later calls do nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _table(self, name: str, *order: str, where: str = "") -> pa.Table:
        rows = self.sql(f"SELECT * FROM {name} {where}").cast(TABLES[name])
        return rows.sort_by([(column, "ascending") for column in order])  # stable

    def _list_parts(self) -> dict[str, list[Path]]:
        if not (self.path / RUN_FILE).is_file():
            raise RunLogError(f"the run {self.path} is gone: it was moved or removed")
        return {table: sorted((self.path / table).glob("*.parquet")) for table in TABLES}

    def _register(self, parts: dict[str, list[Path]]) -> None:
        """Make each view read its current parts; views whose parts are the same stay."""
        for table, files in parts.items():
            if self._parts.get(table) == files:
                continue
            rows = ds.dataset([str(file) for file in files], TABLES[table], format="parquet")
            name = "sites_by_rank" if table == "sites" else table
            self._connection.register(name, rows)
            self._parts[table] = files
            if table == "sites":
                distinct = "SELECT DISTINCT * FROM sites_by_rank"
                self._connection.execute(f"CREATE OR REPLACE TEMP VIEW sites AS {distinct}")


def is_run(path: str | os.PathLike[str]) -> bool:
    """Return whether the folder `path` holds a run, of any schema version.

    A path that does not exist, or cannot be read, is not a run.
    """
    try:
        return _read_json(Path(path) / RUN_FILE).get("kind") == KIND
    except (OSError, ValueError):
        return False


def find_runs(path: str | os.PathLike[str]) -> list[Path]:
    """Return the run folders at or below `path`, sorted; none if it does not exist.

    The inside of a run is not searched, and links to folders are not followed.
    """
    runs = []
    for folder, subfolders, files in os.walk(path):
        if RUN_FILE in files and is_run(folder):
            runs.append(Path(folder))
            subfolders.clear()
    return sorted(runs)


def _read_header(path: Path) -> Header:
    if not path.exists():
        raise RunLogError(f"expected a run, but {path} does not exist")
    if not path.is_dir():
        raise RunLogError(f"expected the folder of a run, but {path} is a file")
    if not (path / RUN_FILE).is_file():
        raise RunLogError(_what_it_holds(path))
    try:
        return Header.from_dict(_read_json(path / RUN_FILE))
    except (OSError, ValueError) as error:
        raise RunLogError(f"cannot open {path / RUN_FILE}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {type(data).__name__}")
    return data


def _what_it_holds(path: Path) -> str:
    """Say why `path` is not a run, and what to open in its place."""
    below = [str(run) for run in find_runs(path)[:5]]
    if (path / STUDY_FILE).is_file():
        return (
            f"{path} is a study, not a run: `unclamp report` reads it as a whole; "
            f"as runs, open {below or 'those it will hold once it has started'}"
        )
    if below:
        return f"{path} is not a run (it has no {RUN_FILE}); runs below it: {below}"
    held = sorted(entry.name for entry in path.iterdir())[:5]
    return f"{path} is not a run: it has no {RUN_FILE}, it holds {held or 'nothing'}"
