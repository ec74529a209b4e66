"""Read a run, finished or not, with SQL or as Arrow tables.

The parts on disk are listed anew for every query, so a query sees all that has been flushed by
then. DuckDB reads them through an Arrow dataset: paths are never parsed as patterns or SQL.
Which parts count is for `unclamp.runlog.parts`, finding and describing runs for `finder`.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

from unclamp.errors import RunLogError
from unclamp.names import SiteName
from unclamp.runlog import schema_1
from unclamp.runlog.connection import connect, whole_numbers
from unclamp.runlog.damage import (
    DamagedPart,
    describe_damage,
    find_damaged,
    find_without_footer,
    is_damaged,
    lost_summaries,
    tell,
    warn_of_lost_summaries,
)
from unclamp.runlog.finder import read_header
from unclamp.runlog.folder import read_missing
from unclamp.runlog.header import RUN_FILE, Header
from unclamp.runlog.levels import find_levels, stored_name
from unclamp.runlog.located import (
    forget_listing,
    located,
)
from unclamp.runlog.parts import PartName, parts_that_count
from unclamp.runlog.ranks import (
    RankEnd,
    RankOvershoot,
    RunAttempt,
    attempts_of,
    read_ends,
    read_overshoots,
)
from unclamp.runlog.relations import (
    CLAMPED_CASTS,
    HELD_CLAMPED,
    Parts,
    Relation,
    dataset_of,
    relations_of,
)
from unclamp.runlog.schema import TABLES, VIEWS, describe_columns
from unclamp.runlog.sites import COMPUTED_SQL, PLACES_SQL, SiteInfo, named_sites_sql
from unclamp.runlog.windows import MOST_WINDOWS, Cut, Windows, read_windows
from unclamp.written import counted

_OF_THE_QUERY = (
    duckdb.ParserException,
    duckdb.BinderException,
    duckdb.CatalogException,
    duckdb.ConnectionException,
    duckdb.ConversionException,
)
"""Failures that no part is to blame for."""


class RunLog:
    """One run, open for reading; `open` makes it, `close` or `with` releases it.

    The views `steps`, `sites`, `casts` and `events` hold the rows of all ranks. A table nothing
    was written to yet is empty, with all its columns. Ids of sites are unique in a run that a
    recorder wrote: `casts JOIN sites USING (site)` is right however many ranks there are, and
    rows of a site's ranks share its fqn and role. The view `summaries` has a row per 100 steps,
    rank and site, and says at any moment what the casts on disk say; `amaxes` a row per step and
    name of a site, with the rank whose amax was largest; `switches` a row per site that changed
    its scaling.
    """

    def __init__(self, path: Path) -> None:
        """Prefer `RunLog.open`, which checks that `path` is a run."""
        self.path = path
        self._connection = connect()
        self._parts: Parts = {}
        self._registered: dict[str, Relation] = {}
        self._views: dict[str, str] = {}
        self._level = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunLog:
        """Open the run in the folder `path`, or under a URL such as `s3://bucket/run`.

        Raises:
            RunLogError: `path` does not exist, is a file, is not a run, is a run that this version
                cannot read, or lies in a storage that cannot be read.
        """
        place = located(path)
        read_header(place)
        return cls(place)

    @property
    def header(self) -> Header:
        """The header as it is now: `header.status` follows a run that is still going on.

        Raises:
            RunLogError: the run is gone.
        """
        return read_header(self.path)

    @property
    def missing(self) -> dict[int, str]:
        """What could not be written, by rank; empty where nothing is known to be missing.

        A process that was killed could not say: its run's status stays "running".

        Raises:
            RunLogError: the run is gone.
        """
        noted = read_missing(self.path)
        missing = self.header.missing
        return noted if missing is None else {0: missing} | noted

    @property
    def damaged(self) -> list[DamagedPart]:
        """The parts that cannot be read and are left out, with what is missing for them.

        The summary of a thinned part is among them, as no other file has its totals.
        Every part's end is looked at; damage within one is found when a query meets it.

        Raises:
            RunLogError: the run is gone.
        """
        every = self._list_parts(whole=False)
        find_without_footer(path for files in every.values() for path in files)
        return [
            describe_damage(path, every[table])
            for table in TABLES
            for path in every[table]
            if is_damaged(path)
        ] + lost_summaries(self.path, every["casts"])

    @property
    def attempts(self) -> list[RunAttempt]:
        """How the run was begun, and begun again, in order; one that was not has one.

        Raises:
            RunLogError: The run is gone, or its parts cannot be listed.
        """
        return attempts_of(self.header, self._list_parts())

    @staticmethod
    def columns() -> pa.Table:
        """Return the columns of every table and view: table, column, type and meaning."""
        return describe_columns()

    def sql(self, query: str, **params: Any) -> pa.Table:
        """Return what `query` selects; it refers to a parameter as `$name`.

        NaN follows DuckDB: it equals itself and is above every number. Whole decimals, such as
        the sum of a count, come as int64 where they fit. A statement without a result returns a
        table without columns. A part that cannot be read is left out, with a warning; `damaged`
        says what is missing for it.

        Raises:
            RunLogError: DuckDB refuses the query, the run is gone, or the log is closed.

        Example:
            `log.sql("SELECT max(amax) AS peak FROM casts WHERE site = $site", site=3)`
        """
        failed = None
        while True:
            try:
                parts = self._list_parts()
            except OSError as error:
                raise RunLogError(f"the parts of {self.path} cannot be listed: {error}") from error
            try:
                self._register(parts)
                relation = self._connection.sql(query, params=params or None)
                if relation is None:
                    return pa.table({})
                return whole_numbers(relation.to_arrow_table())
            except (duckdb.Error, pa.ArrowException, OSError) as error:
                forget_listing(self.path)
                gone = [part for files in parts.values() for part in files if not part.exists()]
                if not gone:
                    if not isinstance(error, _OF_THE_QUERY) and self._leaves_out_damaged(parts):
                        continue
                    raise RunLogError(f"the query on {self.path} failed: {error}") from error
                if parts == failed:
                    raise RunLogError(
                        f"expected {gone[0]} to be a part of the run, but it is listed and cannot "
                        "be opened, like a link to a file that is gone; restore it or remove it"
                    ) from error
                # A part was merged or removed under the query: ask again, of what is there.
                failed = parts

    def hold_clamped(self) -> None:
        """Read the rows of casts that clamped once, for all that is asked of `clamped_casts`.

        They are those of now, also where the run goes on.

        Raises:
            RunLogError: as for `sql`.
        """
        self.sql(HELD_CLAMPED)
        self.sql(f"CREATE OR REPLACE TEMP VIEW {CLAMPED_CASTS} AS FROM held_{CLAMPED_CASTS}")

    def steps(self) -> pa.Table:
        """Return the table `steps`, ordered by step, then rank, then time of recording."""
        return self._table("steps", "step", "rank")

    def sites(self) -> pa.Table:
        """Return the table `sites`, ordered by site and rank: a row for each rank of a site."""
        return self._table("sites", "site", "rank")

    def named_sites(self) -> list[SiteInfo]:
        """Return the sites by name, ranks taken together, in the order of their lowest ids.

        Of what ranks or repeated rows say differently, the lowest rank's first row counts. A name
        that is only counted in one attempt and computed in another stands for two sites.

        Raises:
            RunLogError: as for `sql`.
        """
        return [SiteInfo(**row) for row in self.sql(named_sites_sql(PLACES_SQL)).to_pylist()]

    def computed_sites(self) -> list[SiteInfo]:
        """Return those of `named_sites` from whose casts something is computed.

        Raises:
            RunLogError: as for `sql`.
        """
        return [SiteInfo(**row) for row in self.sql(named_sites_sql(COMPUTED_SQL)).to_pylist()]

    def windows(self, *, most: int = MOST_WINDOWS) -> Windows:
        """Return the casts cut into at most `most` windows of steps and added up.

        Windows of a run of 2,000 steps or more, or of very many casts, are made of summaries, and
        as wide as one or several of these.

        Raises:
            RunLogError: as for `sql`.
        """
        return read_windows(
            self.sql,
            sites=self.named_sites(),
            most=most,
            coarsest=self._coarsest(find_levels(self.path)),
            is_thinned=bool(self.header.thinned),
        )

    def overshoots(self, cut: Cut) -> list[RankOvershoot]:
        """Return what each rank overshot in the windows of a cut, at sites that several ranks hold.

        Empty where no two ranks hold the same site, or nothing tells them apart.

        Raises:
            RunLogError: as for `sql`.
        """
        return read_overshoots(self.sql, cut, self.named_sites())

    def ends(self) -> list[RankEnd]:
        """Return how each rank's log ended, of all ranks of the run's last attempt.

        Raises:
            RunLogError: as for `sql`.
        """
        return read_ends(self.sql, self.path, self.header, self.attempts[-1])

    def casts(self, site: int | SiteName | None = None) -> pa.Table:
        """Return the table `casts`, ordered by step, rank and site.

        Args:
            site: Only those of this id, or of this name on all ranks.
        """
        if isinstance(site, SiteName):
            ids = "SELECT rank, site FROM sites WHERE fqn = $fqn AND role = $role"
            where = f"SEMI JOIN ({ids}) USING (rank, site)"
            return self._table("casts", "step", "rank", "site", where=where, **site.to_dict())
        where = "" if site is None else f"WHERE site = {int(site)}"
        return self._table("casts", "step", "rank", "site", where=where)

    def events(self) -> pa.Table:
        """Return the table `events`, ordered by step, then rank, then time of recording."""
        return self._table("events", "step", "rank")

    def summaries(self) -> pa.Table:
        """Return the view `summaries`, ordered by first step, rank and site."""
        return self._table("summaries", "first_step", "rank", "site")

    def amaxes(self) -> pa.Table:
        """Return the view `amaxes`, ordered by step, fqn and role."""
        return self._table("amaxes", "step", "fqn", "role")

    def switches(self) -> pa.Table:
        """Return the view `switches`, ordered by step, then rank, then time of recording."""
        return self._table("switches", "step", "rank")

    def close(self) -> None:
        """Release the connection; later calls do nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Say what the run holds, or why that cannot be said."""
        try:
            (steps,) = self.sql(
                "SELECT count(DISTINCT step) AS steps, min(rank) AS first, max(rank) AS last, "
                "(SELECT count(DISTINCT (fqn, role)) FROM sites) AS sites FROM steps"
            ).to_pylist()
            ranks = "none" if steps["first"] is None else f"{steps['first']}-{steps['last']}"
            status, missing = self.header.status, ", rows missing" if self.missing else ""
        except RunLogError as error:
            return f"RunLog({str(self.path)!r}: {error})"
        return (
            f"RunLog({str(self.path)!r}: {status}{missing}, "
            f"{counted(steps['steps'], 'step')}, {counted(steps['sites'], 'site')}, ranks {ranks})"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _table(self, name: str, *order: str, where: str = "", **params: str) -> pa.Table:
        rows = self.sql(f"SELECT * FROM {name} {where}", **params)
        rows = rows.cast({**TABLES, **VIEWS}[name])
        return rows.sort_by([(column, "ascending") for column in order])  # stable

    def _leaves_out_damaged(self, parts: Parts) -> bool:
        """Look for damaged parts among these, tell of them, and say whether there are any."""
        damaged = find_damaged(dict.fromkeys(p for files in parts.values() for p in files))
        for path in (path for path, is_news in damaged.items() if is_news):
            every = self._list_parts(whole=False)
            tell(self.path, describe_damage(path, every.get(path.parent.name) or [path]))
        return bool(damaged)

    def _list_parts(self, *, whole: bool = True) -> Parts:
        """Return the parts of each relation that views are made of; damaged ones if not `whole`."""
        if not (self.path / RUN_FILE).is_file():
            raise RunLogError(f"the run {self.path} is gone: it was moved or removed")
        parts = {table: parts_that_count(self.path / table) for table in TABLES}
        stored = {path.name: path for path in (self.path / "summaries").glob("*.parquet")}
        if whole:  # a summary that is damaged is made again, of its casts
            parts = {t: [p for p in files if not is_damaged(p)] for t, files in parts.items()}
            stored = {name: path for name, path in stored.items() if not is_damaged(path)}
        summed = {path.name for path in parts["casts"] if _is_merged(path)} & stored.keys()
        parts["stored_summaries"] = [stored[name] for name in sorted(summed)]
        parts["casts_without_summary"] = [p for p in parts["casts"] if p.name not in summed]
        if whole:
            levels = find_levels(self.path)
            for level in range(1, self._coarsest(levels) + 1):
                files = levels.get(level, [])
                parts[stored_name(level)] = [path for path in files if not is_damaged(path)]
        return parts

    def _coarsest(self, levels: Iterable[int]) -> int:
        """Return the highest level that the run has, or had: a cut may still ask for it.

        A compaction removes levels and makes them anew; meanwhile finer summaries stand for them.
        """
        self._level = max(self._level, *levels, 0)
        return self._level

    def _register(self, parts: Parts) -> None:
        """Make each relation read its current parts; those whose parts are the same stay."""
        if self._parts == parts and self._views:
            return
        warn_of_lost_summaries(self.path, parts["casts"])
        header = self.header
        relations = relations_of(parts, header)
        if relations.views != self._views:
            self._forget()
        for name, relation in relations.registered.items():
            if self._registered.get(name) == relation:
                continue
            if relation.kind == "sites" and header.schema_version == schema_1.VERSION:
                rows = schema_1.read_sites(relation.parts, world_size=header.world_size)
            else:
                rows = dataset_of(relation)
            self._connection.register(name, rows)
            self._registered[name] = relation
        if not self._views:
            for view, query in relations.views.items():
                self._connection.execute(f"CREATE OR REPLACE TEMP VIEW {view} AS {query}")
            self._views = relations.views
        self._parts = parts

    def _forget(self) -> None:
        """Take away relations and views: of a run that was begun again they are others."""
        for view in reversed(self._views):
            self._connection.execute(f"DROP VIEW IF EXISTS {view}")
        for name in self._registered:
            self._connection.unregister(name)
        self._views, self._registered, self._parts = {}, {}, {}


def _is_merged(path: Path) -> bool:
    name = PartName.parse(path.name)
    return name is not None and name.is_merged
