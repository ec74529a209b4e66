"""The run log: the one place that knows how a run lies on disk.

A run is a folder: `run.json` says what ran, and one sub-folder of Parquet parts per table
says what happened. `RunLogWriter` writes it while training, `RunLog` reads it, then or later.
Neither needs torch. What the numbers mean for training is for `unclamp.analysis`.
"""

from unclamp.runlog.beginning import NUMBER, starting_no_run
from unclamp.runlog.cadence import Cadence, Every
from unclamp.runlog.damage import DamagedPart
from unclamp.runlog.finder import find_runs, is_run, read_header
from unclamp.runlog.header import SCHEMA_VERSION, Attempt, Header, Status
from unclamp.runlog.keeping import Keep, Thinned, kept_words, thinned_words
from unclamp.runlog.ranks import RankEnd, RankOvershoot, RunAttempt
from unclamp.runlog.reader import RunLog
from unclamp.runlog.schema import (
    AUTOPILOT_EVENT,
    COVERAGE_EVENT,
    OUTSIDE_EVENT,
    SUMMARY_STEPS,
    TABLES,
    UNCAST_EVENT,
    VIEWS,
    Columns,
)
from unclamp.runlog.sites import COMPUTED_SQL, PLACES_SQL, SiteInfo, over_ranks
from unclamp.runlog.thinning import Compacted, compact
from unclamp.runlog.windows import Cut, Windows, has_more_casts
from unclamp.runlog.writer import RunLogWriter

__all__ = [
    "AUTOPILOT_EVENT",
    "COMPUTED_SQL",
    "COVERAGE_EVENT",
    "NUMBER",
    "OUTSIDE_EVENT",
    "PLACES_SQL",
    "SCHEMA_VERSION",
    "SUMMARY_STEPS",
    "TABLES",
    "UNCAST_EVENT",
    "VIEWS",
    "Attempt",
    "Cadence",
    "Columns",
    "Compacted",
    "Cut",
    "DamagedPart",
    "Every",
    "Header",
    "Keep",
    "RankEnd",
    "RankOvershoot",
    "RunAttempt",
    "RunLog",
    "RunLogWriter",
    "SiteInfo",
    "Status",
    "Thinned",
    "Windows",
    "compact",
    "find_runs",
    "has_more_casts",
    "is_run",
    "kept_words",
    "over_ranks",
    "read_header",
    "starting_no_run",
    "thinned_words",
]
