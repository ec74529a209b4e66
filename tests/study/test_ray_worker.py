"""What a machine of a cluster must have in common with the study's own; no cluster is needed."""

from dataclasses import replace
from pathlib import Path

import pytest

from truths.runs import write_planted
from unclamp.errors import StudyError
from unclamp.runlog import RunLog
from unclamp.study.config import StudyConfig, default_toml
from unclamp.study.loop import RunPlan
from unclamp.study.messages import Note
from unclamp.study.ray_channel import Channel
from unclamp.study.ray_worker import Ended, Home, _compare
from unclamp.study.worker import Speaker


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    study = StudyConfig.from_toml(default_toml())
    path = tmp_path / "text" / "hp" / "seed-0"
    return RunPlan(config=study, scenario="text", arm="hp", seed=0, recipe=None, path=path)


def test_a_machine_like_the_studys_says_nothing(plan: RunPlan, tmp_path: Path) -> None:
    said: list[object] = []
    _compare(plan, Home.of(plan, tmp_path), Speaker(said.append))
    assert said == []


def test_another_version_or_text_is_refused(plan: RunPlan, tmp_path: Path) -> None:
    home = Home.of(plan, tmp_path)
    older = replace(home, versions=home.versions | {"torch": "1.0"})
    with pytest.raises(StudyError, match=r"expected torch 1\.0 on all machines.*install the same"):
        _compare(plan, older, Speaker(lambda message: None))
    with pytest.raises(StudyError, match="reads another text"):
        _compare(plan, replace(home, text="other"), Speaker(lambda message: None))


def test_another_processor_is_told(plan: RunPlan, tmp_path: Path) -> None:
    said: list[object] = []
    home = replace(Home.of(plan, tmp_path), processor="ABACUS")
    _compare(plan, home, Speaker(said.append))
    (note,) = said
    assert isinstance(note, Note)
    assert note.once
    assert "the study's machine with ABACUS" in note.text


def test_files_that_come_back_are_the_run(tmp_path: Path) -> None:
    write_planted(tmp_path / "there", steps=60)
    files = {
        str(file.relative_to(tmp_path / "there")): file.read_bytes()
        for file in (tmp_path / "there").rglob("*")
        if file.is_file()
    }
    Ended(status="finished", files=files).save(tmp_path / "here")
    with RunLog.open(tmp_path / "here") as here, RunLog.open(tmp_path / "there") as there:
        assert here.steps().equals(there.steps())
        assert here.header == there.header


def test_the_channel_keeps_order_and_tells_all_to_stop() -> None:
    channel = Channel()
    first, second = Note(text="1"), Note(text="2")
    assert not channel.tell(None)
    assert not channel.tell(first)
    channel.stop()
    assert channel.tell(second)
    assert channel.take() == [first, second]
    assert channel.take() == []
