"""What a study says while it runs: lines that a reader can trust, each once."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.pool import Note, Progress
from unclamp.study.progress import Display


class Told:
    """A display without a terminal, with a clock that is set by hand."""

    def __init__(self, **changes: object) -> None:
        self.now = 0.0
        self._file = io.StringIO()
        console = Console(file=self._file, width=40)
        data = StudyConfig.from_toml(default_toml()).to_dict() | changes
        config = StudyConfig.from_dict(data)
        bars = Bars(console=console, disable=True)
        self.display = Display(bars, config, Path("there"), jobs=2, clock=lambda: self.now)

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


def small() -> Told:
    """Two runs of 40 steps."""
    return Told(scenarios=["outlier"], seeds=[0, 1], steps=40, arms={"hp": {}})


def test_it_begins_with_what_it_is_on_one_line_however_narrow() -> None:
    told = Told(seeds=[3, 4, 5, 6])
    told.display.start([], 0)
    told.display.start([], 0)  # the second wave
    assert told.lines == [
        "unclamp study: 56 runs of 110 steps (2 scenarios, 7 arms, 4 seeds), "
        "2 at a time, into there"
    ]


def test_runs_that_are_finished_already_are_counted() -> None:
    told = small()
    told.display.start([], 1)
    told.display.progress(Progress(label="b", step=39, loss=1.0))
    told.display.progress(Progress(label="b", step=40, status="finished"))
    assert told.lines[1:] == [
        "1 finished run kept as it is",
        "done 2/2: b, last loss 1.000",
    ]


def test_the_time_left_is_told_from_steps_and_not_from_imports() -> None:
    told = small()
    told.now = 100.0  # imports
    told.display.start([], 0)
    for step in range(40):  # a step a second, so that the other 40 take 40 s
        told.now += 1
        told.display.progress(Progress(label="a", step=step, loss=2.5))
    told.display.progress(Progress(label="a", step=40, status="finished"))
    assert told.lines[1:] == [
        "74 steps to go; about 74 s left",
        "44 steps to go; about 44 s left",
        "done 1/2: a, last loss 2.500; about 40 s left",
    ]


def test_steps_of_a_run_that_begins_again_are_to_do_again() -> None:
    told = small()
    told.display.start([], 0)
    for step in [*range(20), *range(40)]:  # a step a second; of 80, 40 are left in the end
        told.now += 1
        told.display.progress(Progress(label="a", step=step, loss=2.5))
    told.display.progress(Progress(label="a", step=40, status="finished"))
    assert told.lines[1:] == [
        "74 steps to go; about 74 s left",
        "64 steps to go; about 64 s left",
        "done 1/2: a, last loss 2.500; about 40 s left",
    ]


def test_on_a_cluster_nobody_knows_how_many_run_at_a_time() -> None:
    config = StudyConfig.from_toml(default_toml())
    file = io.StringIO()
    bars = Bars(console=Console(file=file, width=400), disable=True)
    Display(bars, config, Path("there"), jobs=None).start([], 0)
    assert "3 seeds), as Ray tasks, into there" in file.getvalue()


def test_what_all_runs_say_is_shown_once_with_the_first_that_said_it() -> None:
    told = small()
    for label in ("a", "b"):
        warning = Note(text="nothing matched", label=label, kind="UnclampWarning", once=True)
        told.display.note(warning)
        told.display.note(Note(text="unclamp: compiling", once=True))
        told.display.note(Note(text="[bold]a line[/] of some library", label=label))
        told.display.note(Note(text="old", label=label, kind="FutureWarning", once=True))
    assert told.lines == [
        "warning (a): nothing matched",
        "unclamp: compiling",
        "(a): [bold]a line[/] of some library",
        "FutureWarning (a): old",
        "(b): [bold]a line[/] of some library",
    ]


@pytest.mark.parametrize(("seconds", "words"), [(0.1, "1 s"), (89, "89 s"), (240, "4 min")])
def test_how_long_it_took_ends_it(seconds: float, words: str) -> None:
    told = small()
    told.now = seconds
    told.display.finished()
    assert told.lines == [f"all 2 runs finished in {words}"]
