"""How a run or a study ended, and what is missing of it, in sentences. Torch-free."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args

from unclamp.errors import RunLogError
from unclamp.names import shown
from unclamp.runlog import UNCAST_EVENT, RunLog, Status
from unclamp.written import counted, listed

QUIET_S = 60.0
"""A run that wrote nothing for so long may have been killed; a flush interval is 2 s."""
ABSENT = "not begun"
OBSERVED = (
    "This run was only observed: nothing was cast in the training. The counts are what FP8 would "
    "have lost, and the loss is that of the training without it."
)


def run_notes(log: RunLog, *, now_s: float | None = None) -> list[str]:
    """Return what a reader must know of a run before its figures; nothing of a whole one.

    Args:
        log: The run.
        now_s: Seconds since 1970; the clock's without it.

    Raises:
        RunLogError: The run is gone.
    """
    header = log.header
    so_far = "The figures are of what was recorded until then."
    notes = {
        "finished": [],
        "interrupted": [f"The run was interrupted. {so_far}"],
        "failed": [f"The run failed. {so_far}"],
        "running": [_running(log.path, time.time() if now_s is None else now_s)],
    }[header.status]
    notes += [
        f"Not all of it is in the log: rank {rank} could not write {what}."
        for rank, what in log.missing.items()
    ]
    notes += [f"{part}." for part in log.damaged]
    return notes + ([OBSERVED] if header.observed else []) + noted(log)


def noted(log: RunLog) -> list[str]:
    """Return what must stand beside a run's figures: the notes of its header, and what never cast.

    A product that is named in an event, and cast something later on, is not told of.
    """
    said = list(dict.fromkeys(log.header.notes))
    events = log.sql("SELECT data FROM events WHERE kind = $kind", kind=UNCAST_EVENT)
    told = events.column(0).to_pylist()
    trained, frozen, evaluated = (_named(told, key) for key in ("products", "frozen", "evaluated"))
    if not (trained or frozen):
        return said
    cast = log.sql("SELECT DISTINCT fqn FROM sites SEMI JOIN casts USING (site)")
    used = {*cast.column(0).to_pylist(), *evaluated}
    if silent := [shown(name) for name in trained if name not in used]:
        its, it = ("its", "it was") if len(silent) == 1 else ("their", "they were")
        said.append(
            f"Converted, and no cast in the log although {it} trained: {listed(silent, most=12)}. "
            f"Something else reads {its} weight, such as a fused loss or a tied layer, or {it} not "
            f"called. What is computed with {its} weight was not in FP8, and is in no figure here."
        )
    if silent := [shown(name) for name in frozen if name not in used]:
        its, it = ("its", "it was") if len(silent) == 1 else ("their", "they were")
        said.append(
            f"Converted, frozen, and not called in the training: {listed(silent, most=12)}. If "
            f"something else reads {its} weight, such as a fused loss or a tied layer, what is "
            "computed with it was not in FP8, and is in no figure here."
        )
    return said


def _named(events: list[str], key: str) -> list[str]:
    """Return the products that events name under a key; none where a user's own has this kind."""
    named = dict[str, None]()
    for data in events:
        try:
            found = json.loads(data)
        except ValueError:
            continue
        names = found.get(key) if isinstance(found, dict) else None
        named |= dict.fromkeys(str(name) for name in names) if isinstance(names, list) else {}
    return list(named)


def damage_notes(runs: Mapping[str, Path]) -> list[str]:
    """Return which parts of a study's runs cannot be read and are left out."""
    notes = []
    for name, path in runs.items():
        with suppress(RunLogError), RunLog.open(path) as log:
            notes += [f"{name}: {part}." for part in log.damaged]
    return notes


def study_notes(status: str, runs: Mapping[str, str]) -> list[str]:
    """Return which runs of a study are missing, unfinished or unreadable; nothing of a whole one.

    Args:
        status: As the study's header says.
        runs: By name, of every run that the study has when it is whole: its status, `ABSENT`, or
            why it cannot be read.
    """
    states = get_args(Status)
    unfinished = [name for name, state in runs.items() if state in states and state != "finished"]
    absent = [name for name, state in runs.items() if state == ABSENT]
    notes = []
    if status != "finished" or absent or unfinished:
        whole = sum(state == "finished" for state in runs.values())
        are = "is" if 1 in (whole, len(runs)) else "are"
        notes.append(
            f"The study is not finished: {whole} of {counted(len(runs), 'run')} {are}. Run the "
            "same `unclamp study` again to train the rest."
        )
    if unfinished:
        notes.append(
            f"Unfinished: {listed(unfinished, most=12)}. Their curves are shown and they are in no "
            "final loss; the counts of an arm are those of its finished runs, if it has any."
        )
    if absent:
        notes.append(f"Not begun: {listed(absent, most=12)}.")
    unreadable = {name: state for name, state in runs.items() if state not in (*states, ABSENT)}
    return notes + [f"{name} cannot be read: {why}." for name, why in unreadable.items()]


def ago(seconds: float) -> str:
    """Return a duration in the unit that a person would use."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _running(path: Path, now_s: float) -> str:
    written = [part.stat().st_mtime for part in path.glob("*/*.parquet")]
    if not written:
        return "The run has begun and nothing is recorded yet; or it was killed before."
    quiet = now_s - max(written)
    if quiet < QUIET_S:
        return f"The run is going on: last record {ago(quiet)}. Make the page again for more."
    return f"Running or killed: last record {ago(quiet)}. A process that was killed cannot say so."
