"""How a study goes, on stderr: bars on a terminal, a line now and then elsewhere."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from unclamp.study.arms import run_study
from unclamp.study.config import StudyConfig
from unclamp.study.loop import RunPlan
from unclamp.study.messages import Note
from unclamp.study.messages import Progress as Step
from unclamp.study.pool import Interrupted, Listener
from unclamp.written import counted

FIRST_S, EVERY_S = 5.0, 30.0
"""After how much training a line says how long it will take, and how often without a terminal."""


def run_with_progress(
    config: StudyConfig, out: Path, *, jobs: int | None, ray: str | None = None, console: Console
) -> bool:
    """Run a study, show its progress; return False if it was interrupted.

    Args:
        config: As for `run_study`.
        out: Likewise.
        jobs: Likewise.
        ray: Likewise.
        console: Where to show it.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    at_once = jobs or (None if ray else os.cpu_count() or 1)
    display = Display(shown, config, out, jobs=at_once)
    listener = Listener(
        on_start=display.start,
        on_progress=display.progress,
        on_note=display.note,
        on_interrupt=display.interrupt,
    )
    try:
        try:
            run_study(config, out, jobs=jobs, ray=ray, listener=listener)
        finally:
            shown.stop()
    except Interrupted:
        display.interrupted()
        return False
    display.finished()
    return True


class Display:
    """One bar for all steps, one for each run that is training, and lines above them.

    Args:
        bars: Where to show it; without a terminal they are disabled, and lines come instead.
        config: The study.
        out: Its folder.
        jobs: Runs side by side; None where a cluster has as many as it has CPUs.
        clock: Seconds, for the time that is left.
    """

    def __init__(
        self,
        bars: Progress,
        config: StudyConfig,
        out: Path,
        *,
        jobs: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bars, self._config, self._out, self._jobs = bars, config, out, jobs
        self._clock, self._begun = clock, clock()
        self._runs = len(config.scenarios) * len(config.arms) * len(config.seeds)
        self._steps_left = self._runs * config.steps
        self._finished = 0
        self._all: TaskID | None = None
        self._running: dict[str, TaskID] = {}
        self._losses: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._said: set[tuple[str, str]] = set()
        self._first_step: float | None = None
        self._steps_done = self._steps_kept = 0  # those of runs that began again are done twice
        self._next_line = FIRST_S

    def start(self, todo: list[RunPlan], finished: int) -> None:
        """Say what the study is, before its first wave, and count what is finished already."""
        if self._all is None:
            self._bars.start()  # not before: Ctrl-C ends the process until then, bars and all
            self._say(self._heading())
            self._all = self._bars.add_task("all runs", total=self._steps_left, note="steps")
        if finished:
            self._finished += finished
            self._steps_left -= finished * self._config.steps
            # Less to do rather than much done at once, which would pass for speed.
            self._bars.update(self._all, total=self._steps_left + self._steps_kept)
            self._say(f"{counted(finished, 'finished run')} kept as {_are(finished)}")

    def progress(self, step: Step) -> None:
        """Move the bars."""
        if step.status is not None:
            self._end(step)
            return
        if step.label not in self._running:
            added = self._bars.add_task(step.label, total=self._config.steps, note="")
            self._running[step.label] = added
        loss = float("nan") if step.loss is None else step.loss
        self._losses[step.label] = loss
        done = step.step + 1
        self._bars.update(self._running[step.label], completed=done, note=f"loss {loss:.3f}")
        gained = done - self._done.get(step.label, step.step)  # less than none: begun again
        self._done[step.label] = done
        self._steps_kept += gained
        if self._all is not None:
            self._bars.advance(self._all, gained)
        self._steps_left -= gained
        self._tell_time()

    def note(self, note: Note) -> None:
        """Show what a worker says, above the bars; what all of them say, once."""
        key = (note.kind, note.text)
        if note.once and key in self._said:
            return
        self._said.add(key)
        kind = {"": "", "UnclampWarning": "warning"}.get(note.kind, note.kind)
        where = f"({note.label})" if note.label else ""
        start = " ".join(filter(None, (kind, where)))
        self._say(f"{start}: {note.text}" if start else note.text)

    def interrupt(self) -> None:
        """Answer Ctrl-C."""
        self._say("Interrupted: stopping, within 3 seconds; Ctrl-C again stops at once.")

    def interrupted(self) -> None:
        """Say what an interrupted study leaves."""
        self._say(
            f"{self._finished} of {counted(self._runs, 'run')} finished. The same command goes on: "
            "finished runs are kept, unfinished ones start over.\n"
            f"What was recorded is readable: unclamp report {self._out}"
        )

    def finished(self) -> None:
        """Say that all runs are there."""
        self._say(f"all {counted(self._runs, 'run')} finished in {_duration(self._elapsed())}")

    def _heading(self) -> str:
        config = self._config
        parts = ((config.scenarios, "scenario"), (config.arms, "arm"), (config.seeds, "seed"))
        made_of = ", ".join(counted(len(part), what) for part, what in parts)
        jobs = self._jobs
        how = "as Ray tasks" if jobs is None else f"{min(jobs, self._runs)} at a time"
        return (
            f"unclamp study: {counted(self._runs, 'run')} of {counted(config.steps, 'step')} "
            f"({made_of}), {how}, into {self._out}"
        )

    def _end(self, step: Step) -> None:
        task = self._running.pop(step.label, None)
        if task is not None:
            self._bars.remove_task(task)
        if step.status != "finished":
            self._say(f"{step.status}: {step.label}")
            return
        self._finished += 1
        loss = self._losses.get(step.label, float("nan"))
        self._say(
            f"done {self._finished}/{self._runs}: {step.label}, last loss {loss:.3f}{self._left()}"
        )

    def _tell_time(self) -> None:
        """Say how long it will take once that is known; without a terminal, now and again."""
        now = self._clock()
        self._steps_done += 1
        if self._first_step is None:
            self._first_step = now
        if now - self._first_step < self._next_line:
            return
        self._next_line = now - self._first_step + EVERY_S
        if self._bars.disable:
            self._say(f"{counted(self._steps_left, 'step')} to go{self._left()}")

    def _left(self) -> str:
        """Return the time left in words, "" where it is unknown or nothing is left."""
        if self._first_step is None or self._steps_done < 2 or self._steps_left <= 0:
            return ""
        # From the first step on: what came before is imports and compilation.
        speed = (self._steps_done - 1) / max(self._clock() - self._first_step, 1e-9)
        return f"; about {_duration(self._steps_left / speed)} left"

    def _elapsed(self) -> float:
        return self._clock() - self._begun

    def _say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _are(number: int) -> str:
    return "it is" if number == 1 else "they are"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
