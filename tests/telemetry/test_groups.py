"""The kind of a step's batch: what may be given, and where it goes."""

from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import unclamp
from unclamp import Recipe, Recorder, RunLog
from unclamp.errors import RunLogError
from unclamp.runlog import Columns, Header, RunLogWriter
from unclamp.telemetry.sinks import summarise


def recorded(path: Path, groups: list[str | None], *, sinks: tuple[Any, ...] = ()) -> Path:
    with Recorder(nn.Linear(4, 4), path, plain=True, sinks=sinks) as recorder:
        for i, group in enumerate(groups):
            recorder.step(loss=2.0 + i, group=group)
    return path


def test_the_group_of_a_step_is_in_its_row(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run", ["text", None, "answers", "Fragen & Antworten"])
    with RunLog.open(path) as log:
        assert log.steps()["group"].to_pylist() == ["text", None, "answers", "Fragen & Antworten"]


def test_a_step_without_a_group_has_none(tmp_path: Path) -> None:
    with Recorder(nn.Linear(4, 4), tmp_path / "run", plain=True) as recorder:
        recorder.step(loss=2.0)
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["group"].to_pylist() == [None]


@pytest.mark.parametrize("group", [2.5, b"text", ["text"], torch.ones((), dtype=torch.int64)])
def test_a_group_that_is_no_name_is_an_error_that_loses_nothing(tmp_path: Path, group: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    unclamp.convert(model, Recipe())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, tmp_path / "run") as recorder:
        loss = model(torch.ones(4, 16)).square().mean()
        loss.backward()
        optimizer.step()
        with pytest.raises(RunLogError, match=r"a str, an int, .*, got .*; nothing is recorded"):
            recorder.step(loss=loss, group=group)
        recorder.step(loss=loss, group="text")
    with RunLog.open(tmp_path / "run") as log:
        (row,) = log.steps().to_pylist()
        assert (row["step"], row["group"]) == (0, "text")
        assert log.casts().num_rows == 3


class Source(Enum):
    TEXT = 1


class Task(str, Enum):  # noqa: UP042  # as before Python 3.11
    CODE = "code"


class Kind(StrEnum):
    ANSWERS = "answers"


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (3, "3"),
        (-1, "-1"),
        (True, "True"),
        (Source.TEXT, "Source.TEXT"),
        (Task.CODE, "code"),
        (Kind.ANSWERS, "answers"),
    ],
)
def test_a_number_and_a_member_of_an_enum_are_names(tmp_path: Path, group: Any, name: str) -> None:
    path = recorded(tmp_path / "run", [group, None, group])
    with RunLog.open(path) as log:
        assert log.steps()["group"].to_pylist() == [name, None, name]


@pytest.mark.parametrize("group", ["", "  ", "two\nlines", "bell\a", "x" * 81])
def test_a_group_that_cannot_stand_in_a_legend_is_refused(tmp_path: Path, group: str) -> None:
    with Recorder(nn.Linear(4, 4), tmp_path / "run", plain=True) as recorder:
        with pytest.raises(RunLogError, match="1 to 80 printable characters"):
            recorder.step(loss=1.0, group=group)
        recorder.step(loss=2.0)
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["loss"].to_pylist() == [2.0]


def test_the_group_belongs_to_the_step_and_not_to_its_microsteps(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    unclamp.convert(model, Recipe())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, tmp_path / "run") as recorder:
        for _ in range(2):
            model(torch.ones(4, 16)).square().mean().backward()
        optimizer.step()
        recorder.step(loss=1.0, group="text+answers")
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["group"].to_pylist() == ["text+answers"]
        assert log.casts()["microsteps"].to_pylist() == [2, 2, 2]


def test_sinks_get_the_loss_under_the_name_of_its_group(tmp_path: Path) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    recorded(
        tmp_path / "run",
        ["text", None, "answers"],
        sinks=(lambda step, numbers: sent.append((step, numbers)),),
    )
    own = [{n: v for n, v in numbers.items() if n.startswith("loss")} for _, numbers in sent]
    assert own == [{"loss": 2.0, "loss/text": 2.0}, {"loss": 3.0}, {"loss": 4.0, "loss/answers": 4}]


def test_a_scalar_of_the_users_own_name_is_not_overwritten() -> None:
    steps: Columns = {
        "step": [7], "loss": [2.0], "group": ["text"], "scalars": [[("loss/text", 5.0)]],
    }  # fmt: skip
    assert summarise({}, steps, None) == {"loss": 2.0, "loss/text": 5.0}


def test_a_group_without_a_loss_sends_nothing_of_its_own() -> None:
    steps: Columns = {"step": [7], "loss": [None], "lr": [0.1], "group": ["text"]}
    assert summarise({}, steps, None) == {"lr": 0.1}


def test_a_log_from_before_there_were_groups_has_none(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="0.1.0")) as writer:
        writer.add("steps", {"step": [0, 1], "loss": [1.0, 2.0], "time_s": [0.0, 1.0]})
    (part,) = (tmp_path / "run" / "steps").glob("*.parquet")
    old = pq.read_table(part).drop_columns(["group"])
    pq.write_table(old, part)
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["group"].to_pylist() == [None, None]


def test_a_negative_step_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    unclamp.convert(model, unclamp.Recipe())
    with unclamp.Recorder(model, tmp_path / "run") as recorder:
        recorder.step(loss=1.0)
        with pytest.raises(RunLogError, match="0 or above, got -3"):
            recorder.step(-3, loss=1.0)
        recorder.step(loss=2.0)
    with RunLog.open(tmp_path / "run") as log:
        assert log.sql("SELECT step FROM steps ORDER BY step").column(0).to_pylist() == [0, 1]
