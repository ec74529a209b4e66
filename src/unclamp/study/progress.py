"""A study on a terminal: bars with speed and time left, on stderr."""

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

from unclamp.study.arms import Interrupted, run_study
from unclamp.study.arms import Progress as Step
from unclamp.study.config import StudyConfig
from unclamp.study.loop import RunPlan


def run_with_progress(
    config: StudyConfig, out: Path, *, jobs: int | None, console: Console
) -> bool:
    """Run a study, show its progress; return False if it was interrupted."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as bars:
        display = _Display(bars, config)
        try:
            run_study(config, out, jobs=jobs, on_start=display.start, on_progress=display.progress)
        except Interrupted:
            bars.stop()
            console.print(
                f"Interrupted. What was recorded is readable: unclamp report {out}\n"
                "The same command again goes on from here."
            )
            return False
    return True


class _Display:
    """One bar for all steps, and one for each run that is training."""

    def __init__(self, bars: Progress, config: StudyConfig) -> None:
        self._bars = bars
        self._steps = config.steps
        self._total = len(config.scenarios) * len(config.arms) * len(config.seeds) * config.steps
        self._all = bars.add_task("all runs", total=self._total, note="steps")
        self._running: dict[str, TaskID] = {}

    def start(self, todo: list[RunPlan], finished: int) -> None:
        """Count the runs of a wave that are finished already."""
        if finished:
            self._bars.advance(self._all, finished * self._steps)
            self._bars.console.print(f"{finished} finished runs are kept as they are")

    def progress(self, step: Step) -> None:
        """Move the bars."""
        if step.status is not None:
            task = self._running.pop(step.label, None)
            if task is not None:
                self._bars.remove_task(task)
                verb = "done" if step.status == "finished" else step.status
                self._bars.console.print(f"{verb}: {step.label}")
            return
        if step.label not in self._running:
            added = self._bars.add_task(step.label, total=self._steps, note="")
            self._running[step.label] = added
        self._bars.update(
            self._running[step.label], completed=step.step + 1, note=f"loss {step.loss:.3f}"
        )
        self._bars.advance(self._all)
