"""The run log: the one place that knows how a run lies on disk.

A run is a folder: `run.json` says what ran, and one sub-folder of Parquet parts per table
says what happened. `RunLogWriter` writes it while training, `RunLog` reads it, then or later.
Neither needs torch. What the numbers mean for training is for `unclamp.analysis`.
"""

from unclamp.runlog.reader import RunLog, find_runs, is_run
from unclamp.runlog.schema import SCHEMA_VERSION, TABLES, Columns, Header, Status
from unclamp.runlog.writer import RunLogWriter

__all__ = [
    "SCHEMA_VERSION",
    "TABLES",
    "Columns",
    "Header",
    "RunLog",
    "RunLogWriter",
    "Status",
    "find_runs",
    "is_run",
]
