"""What a path holds, found out and read: a trainer's state, events, CSV, JSON, printed text.

The parsing of each format is in `curve_files`, `console_files` and `event_files`. Which column is
the loss is for `series`; the curve is for `curves`.
"""

import re
from pathlib import Path

from unclamp.analysis.console_files import read_console
from unclamp.analysis.curve_files import (
    is_csv,
    is_json,
    is_json_throughout,
    messages,
    read_csv,
    read_json,
    read_metric_file,
)
from unclamp.analysis.event_files import read_event_files
from unclamp.analysis.records import Recorded
from unclamp.analysis.selections import AmbiguousCurveError, Choice
from unclamp.analysis.texts import STANDARD_INPUT, read_text
from unclamp.errors import AnalysisError, did_you_mean
from unclamp.runlog import RunLog, find_runs
from unclamp.written import listed

_SHOWN = 12
_DECIMAL_COMMA = re.compile(r"loss[ :=]{1,3}\d+,\d+", re.IGNORECASE)


def read_source(path: Path, choice: Choice) -> Recorded:
    """Return the columns of a file, or of what a folder holds that is no run.

    Raises:
        AnalysisError: Nothing readable, or several runs in a folder.
    """
    return _read_folder(path, choice) if path.is_dir() else _read_file(path, choice)


def _read_folder(path: Path, choice: Choice) -> Recorded:
    """Read what a folder holds that is no run."""
    states = [path / "trainer_state.json"] if (path / "trainer_state.json").is_file() else []
    checkpoints = {
        int(state.parent.name.rpartition("-")[2]): state
        for state in path.glob("checkpoint-*/trainer_state.json")
        if state.parent.name.rpartition("-")[2].isdigit()
    }
    if states or checkpoints:
        return _read_file(states[0] if states else checkpoints[max(checkpoints)], choice)
    events = sorted({file.parent for file in path.rglob("*tfevents*") if file.is_file()})
    if choice.run is not None and len(events) > 1:
        folders = {str(folder.relative_to(path)): folder for folder in events}
        if choice.run not in folders:
            raise AnalysisError(
                f"{path} has no run {choice.run!r}; it has {_listed(list(folders))}"
                f"{did_you_mean(choice.run, folders)}"
            )
        events = [folders[choice.run]]
    if len(events) > 1:
        raise AmbiguousCurveError(
            f"{path} holds TensorBoard events of several runs; choose one with --run: "
            f"{_listed([str(folder.relative_to(path)) for folder in events])}"
        )
    if events:
        return read_event_files(events[0])
    if (path / "study.json").is_file() or find_runs(path):
        RunLog.open(path)  # raises, and names the runs in it
    raise AnalysisError(
        f"{path} holds no run log, trainer_state.json or TensorBoard events; "
        "give a run's folder, or a CSV or JSON file"
    )


def _read_file(path: Path, choice: Choice) -> Recorded:
    if str(path) != STANDARD_INPUT and not path.exists():
        raise AnalysisError(f"expected a run or a file with a loss curve, but {path} is not there")
    if "tfevents" in path.name:
        return read_event_files(path)
    return read_as_text(read_text(path), path, choice)


def read_as_text(text: str, path: Path, choice: Choice) -> Recorded:
    """Find out what a text is, and read it."""
    if choice.pattern is None:
        if is_json(text) and is_json_throughout(text):
            printed = read_console(messages(text), path, choice)
            return read_json(text, path, choice) if printed is None else printed
        if (metric := read_metric_file(text, path, choice)) is not None:
            return metric
        if not is_json(text) and is_csv(text):
            return read_csv(text, path, choice)
    printed = read_console(messages(text) or text, path, choice)
    if printed is not None:
        return printed
    if (comma := _DECIMAL_COMMA.search(text)) is not None:
        raise AnalysisError(f"expected numbers with a decimal point in {path}, got {comma[0]!r}")
    if is_json(text):
        return read_json(text, path, choice)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if first and not any(divides in first for divides in ",\t;"):
        raise AnalysisError(
            f"{path} is no CSV, which has a first line that names the columns, and no line of it "
            "has a number that is called a loss; say where it stands with --pattern, such as "
            "'(?P<step>\\d+) (?P<loss>\\S+)'"
        )
    return read_csv(text, path, choice)


def _listed(names: list[str]) -> str:
    return listed([repr(name) for name in names], most=_SHOWN)
