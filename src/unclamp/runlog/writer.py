"""Write a run while it trains, at the cost of one queue put per call.

The foreground validates and queues; one daemon thread buffers rows and writes them as Parquet
parts. A part appears whole or not at all (temporary name, fsync, rename), so a killed run loses
at most one flush interval and never what was written before. When writing fails, the log stops
and says so once, and the training goes on.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Self, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from unclamp.errors import RunLogError, UnclampWarning
from unclamp.runlog.schema import RUN_FILE, TABLES, Columns, Header, Status, schema_of, to_arrow

_Rows = tuple[str, Callable[[], pa.Table]]  # for which table, and what makes the rows
_Message = _Rows | threading.Event | None  # rows, a flush to acknowledge, or the end


class RunLogWriter:
    """Write one rank's share of a run into the folder `path`.

    Rank 0 creates the run and writes its header; the other ranks add parts and wait for nothing.
    Use it from one thread. As a context manager it closes as "finished", as "failed" after an
    exception, as "interrupted" after Ctrl-C or `sys.exit`. The interpreter's exit closes what is
    still open as "interrupted".
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        header: Header,
        rank: int = 0,
        flush_interval_s: float = 2.0,
    ) -> None:
        """Create the run, or join it when `rank` is not 0.

        Raises:
            RunLogError: `path` is a file, holds a run or something else, or cannot be written;
                `rank` is not in the header's world; the header is not JSON data.
        """
        if not 0 <= rank < header.world_size:
            raise RunLogError(f"rank must be in 0..{header.world_size - 1}, got {rank}")
        if not flush_interval_s > 0:
            raise RunLogError(f"flush_interval_s must be above 0, got {flush_interval_s}")
        self.path = Path(path)
        self.rank = rank
        self._header = replace(header, status="running")
        self._flush_interval_s = flush_interval_s
        self._queue: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._parts = _Parts(self.path, rank)
        self._failure: BaseException | None = None
        self._missing = ""
        self._warned = False
        self._closed = False
        self._process = os.getpid()  # a fork inherits the writer and its exit hook, not the thread
        _create(self.path, rank, self._header)
        self._thread = threading.Thread(target=self._work, name="unclamp-runlog", daemon=True)
        self._thread.start()
        atexit.register(self.close, "interrupted")

    @property
    def failure(self) -> BaseException | None:
        """What stopped the log, or None while it works."""
        return self._failure

    def add(self, table: str, columns: Columns | Callable[[], Columns]) -> None:
        """Queue rows for `table`; do nothing once the log has failed.

        Args:
            table: a name in `TABLES`.
            columns: name to values, all of one length; `rank` and nullable columns may be left
                out. Or a function without arguments that returns them: it is called on the
                background thread, and an error in it stops the log and not the caller.

        Raises:
            RunLogError: the table or a column is unknown, lengths differ, a value does not fit
                its column, or the writer is closed.
        """
        self._warn_of_failure()
        if self._failure is not None:
            return
        if self._closed:
            raise RunLogError(f"the run log {self.path} is closed; add rows before close()")
        schema_of(table)
        if isinstance(columns, Mapping):
            rows = to_arrow(table, columns, rank=self.rank)
            self._queue.put((table, lambda: rows))
        else:
            self._queue.put((table, lambda: to_arrow(table, columns(), rank=self.rank)))

    def flush(self) -> None:
        """Block until everything queued so far is on disk, or the log has failed."""
        if self._closed or os.getpid() != self._process:
            return
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self._warn_of_failure()

    def close(self, status: Status = "finished") -> None:
        """Flush, stop, and write `status` into the header; later calls do nothing.

        A log that failed cannot be called finished: its run is closed as "failed".

        Raises:
            RunLogError: there is no such status.
        """
        if status not in get_args(Status):
            raise RunLogError(f"status must be one of {get_args(Status)}, got {status!r}")
        if self._closed or os.getpid() != self._process:
            return
        self._queue.put(None)
        self._thread.join()
        self._closed = True
        atexit.unregister(self.close)
        if self.rank == 0:
            self._close_header(status)
        self._warn_of_failure()

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
            _write_header(self.path, replace(self._header, status=status))
        except OSError as error:
            self._fail(error, f"the status {status!r} in {RUN_FILE}")

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

    def _fail(self, error: BaseException, missing: str) -> None:
        if self._failure is None:
            self._missing = missing
            self._failure = error

    def _work(self) -> None:
        """Buffer rows and write parts, on the thread; after a failure, only answer flushes."""
        message = threading.Event()
        flush_at = time.monotonic() + self._flush_interval_s
        while message is not None:
            message = self._receive(flush_at)
            rows = message if isinstance(message, tuple) else None
            is_due = rows is None or time.monotonic() >= flush_at
            if self._failure is None:
                self._record(rows, is_due=is_due)
            if is_due:
                flush_at = time.monotonic() + self._flush_interval_s
            if isinstance(message, threading.Event):
                message.set()

    def _receive(self, deadline: float) -> _Message:
        try:
            return self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return threading.Event()  # time to flush, and nobody waits for it

    def _record(self, rows: _Rows | None, *, is_due: bool) -> None:
        try:
            if rows is not None:
                table, make = rows
                self._parts.add(table, make())
            if is_due:
                self._parts.write()
        except BaseException as error:
            with suppress(Exception):
                self._parts.write()  # a bad batch need not cost the good ones
            self._fail(error, f"{self._parts.waiting()}everything since {datetime.now():%H:%M:%S}")


class _Parts:
    """One rank's rows that are not on disk yet, and the parts they go to."""

    def __init__(self, path: Path, rank: int) -> None:
        self._path = path
        self._rank = rank
        self._waiting: dict[str, list[pa.Table]] = {table: [] for table in TABLES}
        self._written = dict.fromkeys(TABLES, 0)

    def add(self, table: str, rows: pa.Table) -> None:
        if rows.num_rows:
            self._waiting[table].append(rows)

    def write(self) -> None:
        """Write one part per table that has rows waiting."""
        for table, waiting in self._waiting.items():
            if waiting:
                name = f"part-r{self._rank}-{self._written[table]:06d}.parquet"
                _write_part(self._path / table / name, pa.concat_tables(waiting))
                self._written[table] += 1
                waiting.clear()

    def waiting(self) -> str:
        """Return how many rows wait, per table, as the start of a list in a sentence."""
        counts = {table: sum(map(len, rows)) for table, rows in self._waiting.items()}
        return "".join(f"{count} rows of {table}, " for table, count in counts.items() if count)


def _create(path: Path, rank: int, header: Header) -> None:
    _refuse_unless_free(path, rank)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            _write_header(path, header)
    except OSError as error:
        raise RunLogError(f"cannot create the run {path}: {error}") from error


def _refuse_unless_free(path: Path, rank: int) -> None:
    """Raise unless `path` is absent, empty, or holds only what the other ranks wrote."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunLogError(f"expected a folder for the run, but {path} is a file; name another")
    held = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    own_parts = any(path.glob(f"*/part-r{rank}-*"))
    if own_parts or (rank == 0 and RUN_FILE in held):
        raise RunLogError(f"{path} already holds a run; name a new folder, runs never mix")
    foreign = [name for name in held if name not in {RUN_FILE, *TABLES}]
    if foreign:
        raise RunLogError(
            f"expected a new or empty folder for the run, but {path} holds {foreign[:5]}; "
            "name another folder"
        )


def _write_header(path: Path, header: Header) -> None:
    try:
        text = json.dumps(header.to_dict(), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunLogError(f"the header must be JSON data (no NaN, no Inf): {error}") from error
    _write_atomically(path / RUN_FILE, f"{text}\n".encode())


def _write_part(path: Path, rows: pa.Table) -> None:
    """Write `rows`, with statistics for integer columns only.

    A float column's minimum and maximum leave NaN out, and DuckDB would go by them and skip the
    part that holds the NaN loss it was asked for.
    """
    counts = [column.name for column in rows.schema if pa.types.is_integer(column.type)]
    data = pa.BufferOutputStream()
    pq.write_table(rows, data, compression="zstd", write_statistics=counts)  # type: ignore[arg-type]
    path.parent.mkdir(exist_ok=True)  # not its parents: a run that was removed stays removed
    _write_atomically(path, data.getvalue())


def _write_atomically(path: Path, data: bytes | pa.Buffer) -> None:
    """Make `path` appear with all of `data`, safe from a crash, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
