"""Write a run while it trains, at the cost of one queue put per call.

The foreground validates and queues; one daemon thread buffers rows and writes them as Parquet
parts. A part appears whole or not at all (temporary name, fsync, rename), so a killed run loses
at most one flush interval and never what was written before. Merging parts is left to another
thread (`unclamp.runlog.compactor`), so that it delays no flush. When writing fails, the log stops
and says so once, and the training goes on.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Self, get_args

import pyarrow as pa

from unclamp.errors import RunLogError, UnclampWarning, did_you_mean
from unclamp.runlog.attempts import is_superseded
from unclamp.runlog.beginning import begin_run
from unclamp.runlog.compactor import Compactor, Part
from unclamp.runlog.folder import claim_path, note_in_claim, write_header
from unclamp.runlog.header import RUN_FILE, Header, Status
from unclamp.runlog.located import local
from unclamp.runlog.parts import PartName, write_part
from unclamp.runlog.schema import TABLES, Columns, schema_of, to_arrow
from unclamp.worker import Worker
from unclamp.written import counted

_Rows = tuple[str, Callable[[], pa.Table]]  # for which table, and what makes the rows


class RunLogWriter:
    """Write one rank's share of a run into the folder `path`.

    Rank 0 creates the run and writes its header; the other ranks add parts and wait for nothing.
    All ranks give the same `run_id` in their headers, and a folder has one writer a rank. Use it
    from one thread. As a context manager it closes as "finished", as "failed" after an exception,
    as "interrupted" after Ctrl-C or `sys.exit`. The interpreter's exit closes what is still open
    as "interrupted".
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        header: Header,
        rank: int = 0,
        flush_interval_s: float = 2.0,
        overwrite: bool = False,
        resume: bool = False,
        before_replacing: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the run, or join it when `rank` is not 0.

        With "{n}" in `path` the folder gets the first free number; `self.path` is the real one.
        Where `overwrite`, a run that is there is replaced (`unclamp.runlog.beginning`);
        `before_replacing` is called before, once nothing else speaks against it. Where `resume`,
        a run that is there goes on in a new attempt (`unclamp.runlog.attempts`), and the ids of
        its sites are to be `first_site` and above.

        Raises:
            RunLogError: `path` is a file, is being written, holds another run or something else,
                or cannot be written; `rank` is not in the header's world; the header is not JSON
                data.
        """
        if not 0 <= rank < header.world_size:
            raise RunLogError(f"rank must be in 0..{header.world_size - 1}, got {rank}")
        if not flush_interval_s > 0:
            raise RunLogError(f"flush_interval_s must be above 0, got {flush_interval_s}")
        self.rank = rank
        self._header = replace(header, status="running")
        self._failure: BaseException | None = None
        self._missing = ""
        self._warned = False
        self._closing = self._closed = False
        self._process = os.getpid()  # a fork inherits the writer and its exit hook, not the thread
        begun = begin_run(
            local(path),
            rank=rank,
            header=self._header,
            overwrite=overwrite,
            resume=resume,
            beats_s=flush_interval_s,
            before_replacing=before_replacing,
        )
        self.path, self._header = begun.path, begun.joined.header
        self.attempt, self.first_site = begun.joined.attempt, begun.joined.first_site
        self._claim = claim_path(self.path, rank, self.attempt)
        self._compactor = Compactor(self.path)
        self._parts = _Parts(self.path, rank, self.attempt, self._compactor)
        self._worker = Worker(
            self._take,
            name="unclamp-runlog",
            on_due=self._write_due,
            interval_s=flush_interval_s,
            closes_at_exit=False,  # `close` does, and says in the header how the run ended
        )
        atexit.register(self.close, "interrupted")
        if header.world_size > 1:  # give signs of life before the first rows
            self.add("steps", {})

    @property
    def failure(self) -> BaseException | None:
        """What stopped the log, or None while it works."""
        return self._failure

    def add(self, table: str, columns: Columns | Callable[[], Columns]) -> None:
        """Queue rows for `table`; do nothing once the log has failed, or in a forked process.

        Args:
            table: a name in `TABLES`.
            columns: name to values, all of one length; `rank` and nullable columns may be left
                out. Ids of sites are to be unique in the run: the n-th site of a rank is
                n * world size + rank. Or a function without arguments that returns them: it is
                called on the background thread, and an error in it stops the log and not the
                caller.

        Raises:
            RunLogError: the table or a column is unknown, lengths differ, a value does not fit
                its column, or the writer is closed.
        """
        if os.getpid() != self._process:
            return  # in a fork, that has no thread to write with
        self._mind_the_thread()
        self._warn_of_failure()
        if self._failure is not None:
            return
        if self._closing:
            raise RunLogError(f"the run log {self.path} is closed; add rows before close()")
        schema_of(table)
        if isinstance(columns, Mapping):
            rows = to_arrow(table, columns, rank=self.rank)
            self._worker.put((table, lambda: rows))
        else:
            self._worker.put((table, lambda: to_arrow(table, columns(), rank=self.rank)))

    def flush(self) -> None:
        """Block until everything queued so far is on disk, or the log has failed."""
        if self._closing or os.getpid() != self._process:
            return
        self._worker.wait()
        self._mind_the_thread()
        self._warn_of_failure()

    def close(self, status: Status = "finished") -> None:
        """Flush, stop, and write `status` into the header; later calls do nothing.

        A log that failed cannot be called finished: its run is closed as "failed". The parts
        that are left are merged, for some seconds at most; not if the run was interrupted.

        Raises:
            RunLogError: there is no such status.
        """
        if status not in get_args(Status):
            hint = did_you_mean(status, get_args(Status))
            raise RunLogError(f"status must be one of {get_args(Status)}, got {status!r}{hint}")
        if self._closed or os.getpid() != self._process:
            return
        self._mind_the_thread()
        self._closing = True
        self._worker.close()
        ended_by = self._worker.take_failure()
        if ended_by is not None:
            self._fail(ended_by, self._parts.missing())
        self._compactor.close(at_once=status == "interrupted")
        if self.rank == 0:
            self._close_header(status)
        self._note(closed="failed" if self._failure and status == "finished" else status)
        self._closed = True  # not before: after Ctrl-C in here, the exit closes once more
        atexit.unregister(self.close)
        self._warn_of_failure()
        self._warn_of_small_parts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("failed" if issubclass(kind, Exception) else "interrupted")

    def _close_header(self, status: Status) -> None:
        if self._failure is not None and status == "finished":
            status = "failed"
        try:
            if not is_superseded(self.path, attempt=self.attempt):
                write_header(self.path, replace(self._header, status=status))
        except OSError as error:
            self._fail(error, f"the status {status!r} in {RUN_FILE}")

    def _mind_the_thread(self) -> None:
        """Notice that the thread is gone, though nothing it does should end it."""
        if self._failure is None and self._worker.has_died:
            error = self._worker.take_failure() or RuntimeError("its thread has ended")
            self._fail(error, self._parts.missing())

    def _warn_of_failure(self) -> None:
        if self._failure is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"the run log {self.path} stopped: {self._failure!r}. Missing from it: "
            f"{self._missing}. What was written before is intact; the training goes on.",
            UnclampWarning,
            stacklevel=3,
        )

    def _warn_of_small_parts(self) -> None:
        if self._compactor.problem is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"the run log {self.path} stays in many small parts, which are slow to read: merging "
            f"them failed with {self._compactor.problem!r}. What was written is intact.",
            UnclampWarning,
            stacklevel=3,
        )

    def _fail(self, error: BaseException, missing: str) -> None:
        if self._failure is not None:
            return
        self._missing = missing
        self._failure = error
        self._header = replace(self._header, missing=f"{missing}, because of {error!r}")
        # A full disk has no room for this either; close() tries again.
        if self.rank != 0:
            self._note(missing=str(self._header.missing))
            return
        with suppress(OSError, ValueError):
            write_header(self.path, self._header)

    def _note(self, **known: str) -> None:
        with suppress(OSError, ValueError):
            note_in_claim(self.path, rank=self.rank, attempt=self.attempt, **known)

    def _take(self, rows: _Rows) -> None:
        """Be the thread, with rows: buffer them, unless the log has failed."""
        table, make = rows
        self._record(lambda: self._parts.add(table, make()))

    def _write_due(self) -> None:
        self._record(self._parts.write)
        with suppress(OSError):
            os.utime(self._claim)

    def _record(self, act: Callable[[], None]) -> None:
        if self._failure is not None:
            return
        try:
            act()
        except BaseException as error:
            with suppress(Exception):
                self._parts.write()  # a bad batch need not cost the good ones
            self._fail(error, self._parts.missing())


class _Parts:
    """One rank's rows that are not on disk yet, and the parts they go to."""

    def __init__(self, path: Path, rank: int, attempt: int, compactor: Compactor) -> None:
        self._path = path
        self._rank, self._attempt = rank, attempt
        self._compactor = compactor
        self._waiting: dict[str, list[pa.Table]] = {table: [] for table in TABLES}
        self._written = dict.fromkeys(TABLES, 0)

    def add(self, table: str, rows: pa.Table) -> None:
        if rows.num_rows:
            self._waiting[table].append(rows)

    def write(self) -> None:
        """Write one part per table that has rows waiting."""
        for table, waiting in self._waiting.items():
            if waiting:
                name = PartName.flushed(self._rank, self._written[table], attempt=self._attempt)
                rows = pa.concat_tables(waiting)
                write_part(self._path / table / str(name), rows)
                self._written[table] += 1
                waiting.clear()
                self._compactor.add(Part(table=table, name=name, rows=rows.num_rows))

    def missing(self) -> str:
        """Return what is lost if nothing more is written, as a list in a sentence."""
        counts = {table: sum(map(len, rows)) for table, rows in self._waiting.items()}
        waiting = "".join(
            f"{counted(count, 'row')} of {table}, " for table, count in counts.items() if count
        )
        return f"{waiting}everything since {datetime.now():%Y-%m-%d %H:%M:%S}"
