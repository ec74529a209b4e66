"""Find runs, tell what a folder is, and read a run's header; what a run holds is for `reader`."""

from __future__ import annotations

import os
from pathlib import Path

from unclamp.errors import RunLogError
from unclamp.runlog.folder import read_json
from unclamp.runlog.header import KIND, RUN_FILE, Header
from unclamp.runlog.located import located, walk
from unclamp.runlog.schema import TABLES
from unclamp.runlog.storage import StorageError
from unclamp.written import listed

STUDY_FILE = "study.json"
MOST_NAMES = 5


def is_run(path: str | os.PathLike[str]) -> bool:
    """Return whether the folder `path` holds a run, of any schema version.

    A path that does not exist, or cannot be read, is not a run.

    Raises:
        StorageError: Object storage did not answer, so that nobody knows.
    """
    try:
        return read_json(located(path) / RUN_FILE).get("kind") == KIND
    except StorageError:
        raise
    except (OSError, ValueError):  # a RunLogError too
        return False


def find_runs(path: str | os.PathLike[str]) -> list[Path]:
    """Return the run folders at or below `path`, sorted; none if it does not exist.

    The inside of a run is not searched, and links to folders are not followed.
    """
    runs = []
    for folder, subfolders, files in walk(located(path)):
        if RUN_FILE in files and is_run(folder):
            runs.append(folder)
            subfolders.clear()
    return sorted(runs)


def read_header(path: Path) -> Header:
    """Return the header of the run `path`.

    Raises:
        RunLogError: `path` does not exist, is a file, is not a run, or is a run that this
            version cannot read.
    """
    if not path.exists():
        raise RunLogError(f"expected a run, but {path} does not exist")
    if not path.is_dir():
        raise RunLogError(f"expected the folder of a run, but {path} is a file")
    if not (path / RUN_FILE).is_file():
        raise RunLogError(_what_it_holds(path))
    try:
        return Header.from_dict(read_json(path / RUN_FILE))
    except (OSError, ValueError) as error:
        raise RunLogError(f"cannot open {path / RUN_FILE}: {error}") from error


def _what_it_holds(path: Path) -> str:
    """Say why `path` is not a run, and what to open in its place."""
    below = listed([str(run) for run in find_runs(path)], most=MOST_NAMES)
    if (path / STUDY_FILE).is_file():
        return (
            f"{path} is a study, not a run: `unclamp report` reads it as a whole; "
            f"as runs, open one of {below or 'those it will hold once it has started'}"
        )
    if below:
        return f"{path} is not a run (it has no {RUN_FILE}); name one of the runs below it: {below}"
    if any(any(path.glob(f"{table}/part-r*")) for table in TABLES):
        return (
            f"{path} lacks the {RUN_FILE} that rank 0 writes: record on rank 0 too, or wait for "
            "it to begin"
        )
    held = listed(sorted(entry.name for entry in path.iterdir()), most=MOST_NAMES)
    return f"{path} is not a run: it has no {RUN_FILE}, it holds {held or 'nothing'}"
