"""One snapshot of many that cannot be read is left out, and a note says so."""

from functools import partial
from pathlib import Path

import pytest

from truths.trainings import Case, record
from unclamp.errors import ReplayError
from unclamp.explain import Limits, explain_spike
from unclamp.explain.store import FACTS_FILE, find_snapshots

CASE = Case()
FEW = Limits(replays=4)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 0}', '{"schema_ver'])
def test_an_unreadable_snapshot_among_others_is_left_out_with_a_note(
    text: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    record(CASE, run)
    oldest, *others = find_snapshots(run)
    assert others
    (oldest / FACTS_FILE).write_text(text)
    found = explain_spike(run, build=partial(CASE.build), step=CASE.step, limits=FEW)
    assert found.snapshot_step in {int(path.name.split("-")[1]) for path in others}
    (note,) = [note for note in found.notes if "A snapshot was left out" in note]
    assert oldest.name in note


def test_where_none_can_be_read_the_reason_is_the_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record(CASE, run)
    for path in find_snapshots(run):
        (path / FACTS_FILE).write_text("[]")
    with pytest.raises(ReplayError, match="is no snapshot of unclamp"):
        explain_spike(run, build=partial(CASE.build), step=CASE.step, limits=FEW)
