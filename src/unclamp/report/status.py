"""How a run or a study ended, and what is missing of it, in sentences. Torch-free."""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from unclamp.errors import RunLogError
from unclamp.names import shown
from unclamp.runlog import OUTSIDE_EVENT, UNCAST_EVENT, RunLog, Status, thinned_words
from unclamp.written import counted, listed

QUIET_S = 60.0
"""A run that wrote nothing for so long may have been killed; a flush interval is 2 s."""
ABSENT = "not begun"
_ENDED = {"finished": "finished", "failed": "failed"}
"""How an attempt ended, where that takes no \"was\"."""
OBSERVED = (
    "This run was only observed: nothing was cast in the training. The counts are what FP8 would "
    "have lost, and the loss is that of the training without it."
)

UNCOUNTED = (
    "Only the largest element of each cast is in this log: whether a cast clamped is known, and "
    "how many elements were clamped, underflowed or were not finite is not."
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
    notes += [*attempt_notes(log), *rank_notes(log, is_going_on=_is_going_on(log, now_s))]
    notes += [OBSERVED] if header.observed else []
    return notes + ([UNCOUNTED] if header.counts == "casts" else []) + noted(log)


def attempt_notes(log: RunLog) -> list[str]:
    """Return how a run was begun again; nothing of one that was not."""
    said = []
    for before, attempt in itertools.pairwise(log.attempts):
        where = "" if attempt.first_step is None else f" at step {attempt.first_step:,}"
        ended = _ENDED.get(before.ended, f"was {before.ended}")
        ranks = ""
        if before.world_size != attempt.world_size:
            ranks = f" on {counted(attempt.world_size, 'rank')} in place of {before.world_size}"
        beyond = "what was recorded from there on before counts no more"
        none = "it has recorded nothing yet"
        said.append(
            f"The run {ended}, and was begun again{where}{ranks} ({attempt.created}): "
            f"{none if attempt.first_step is None else beyond}."
        )
    return said


def rank_notes(log: RunLog, *, is_going_on: bool = False) -> list[str]:
    """Return which ranks ended before others, wrote nothing, or never closed their logs.

    Of a run that is going on, ranks are a few steps apart: only one that closed is told of.
    """
    if log.header.world_size == 1:
        return []
    ends = log.ends()
    last = max((end.last_step for end in ends if end.last_step is not None), default=None)
    if last is None:
        return []
    silent = [end.rank for end in ends if end.last_step is None]
    behind: dict[int, list[int]] = {}
    for end in ends:
        is_told = not is_going_on or end.closed is not None
        if end.last_step is not None and end.last_step < last and is_told:
            behind.setdefault(end.last_step, []).append(end.rank)
    notes = []
    if silent and not is_going_on:
        others = [end.rank for end in ends if end.last_step is not None]
        notes.append(
            f"{_ranks(silent)} recorded nothing: the figures are of {_ranks(others).lower()} alone."
        )
    if behind:
        said = [
            f"{_ranks(ranks)} end{'s' if len(ranks) == 1 else ''} at step {step:,}"
            for step, ranks in sorted(behind.items())
        ]
        said[1:] = [f"{each[0].lower()}{each[1:]}" for each in said[1:]]
        rest = sum(end.last_step == last for end in ends)
        whose = "the other" if rest == 1 else "the others"
        notes.append(f"{', '.join(said)}, {whose} at {last:,}.")
    unclosed = [
        end.rank
        for end in ends
        if end.last_step == last and end.tells_of_close and end.closed is None
    ]
    if unclosed and len(unclosed) < len(ends) and not is_going_on:
        notes.append(
            f"{_ranks(unclosed)} never closed {'its' if len(unclosed) == 1 else 'their'} log: the "
            "last seconds may be missing."
        )
    return notes


def _ranks(ranks: Sequence[int]) -> str:
    """Return ranks as the beginning of a sentence; runs of them as a range."""
    groups: list[list[int]] = []
    for rank in ranks:
        if groups and groups[-1][-1] == rank - 1:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    names = [f"{g[0]}-{g[-1]}" if len(g) > 2 else ", ".join(map(str, g)) for g in groups]
    return f"{'Rank' if len(ranks) == 1 else 'Ranks'} {', '.join(names)}"


def noted(log: RunLog) -> list[str]:
    """Return what must stand beside a run's figures: the notes of its header, and what never cast.

    A product that is named in an event, and cast something later on, is not told of.
    """
    said = list(dict.fromkeys(log.header.notes))
    if (thinned := thinned_words(log.header.thinned)) is not None:
        said.append(thinned)
    if outside := _named(_told(log, OUTSIDE_EVENT), "modules"):
        said.append(
            f"Called in the training, and not in the step that the coverage is of: "
            f"{listed([shown(name) for name in outside], most=12)}. The shares leave them out."
        )
    told = _told(log, UNCAST_EVENT)
    trained, frozen, evaluated = (_named(told, key) for key in ("products", "frozen", "evaluated"))
    if not (trained or frozen):
        return said
    # Not of `casts` alone: of a site whose rows were thinned none may be left there.
    cast = log.sql(
        "SELECT DISTINCT fqn FROM sites SEMI JOIN (SELECT site FROM stored_summaries UNION ALL "
        "SELECT site FROM casts_without_summary) USING (site)"
    )
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


def _told(log: RunLog, kind: str) -> list[str]:
    """Return the data of the events of a kind."""
    events = log.sql("SELECT data FROM events WHERE kind = $kind ORDER BY step", kind=kind)
    return events.column(0).to_pylist()


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


def _is_going_on(log: RunLog, now_s: float | None) -> bool:
    if log.header.status != "running":
        return False
    quiet = _quiet_s(log.path, time.time() if now_s is None else now_s)
    return quiet is None or quiet < QUIET_S


def _quiet_s(path: Path, now_s: float) -> float | None:
    """Return for how long nothing was written; None where nothing was."""
    written = []
    for part in path.glob("*/*.parquet"):
        with suppress(FileNotFoundError):  # merged meanwhile
            written.append(part.stat().st_mtime)
    return now_s - max(written) if written else None


def _running(path: Path, now_s: float) -> str:
    quiet = _quiet_s(path, now_s)
    if quiet is None:
        return "The run has begun and nothing is recorded yet; or it was killed before."
    if quiet < QUIET_S:
        return f"The run is going on: last record {ago(quiet)}. Make the page again for more."
    return f"Running or killed: last record {ago(quiet)}. A process that was killed cannot say so."
