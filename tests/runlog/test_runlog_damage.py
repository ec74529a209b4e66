"""A part that cannot be read costs its own rows: it is named, and the rest stays readable."""

import errno
from pathlib import Path

import pyarrow as pa
import pytest

from truths.runs import write_planted
from unclamp.analysis import associate, read_curve
from unclamp.errors import RunLogError, UnclampWarning
from unclamp.report.view import build_view
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.runlog.damage import find_damaged, is_damaged


def write(path: Path, *, ranks: int = 1) -> Path:
    """Write five parts of two steps each, not merged."""
    for rank in range(ranks):
        header = Header(unclamp_version="0", world_size=ranks, run_id="one")
        writer = RunLogWriter(path, header=header, rank=rank)
        for step in range(10):
            writer.add("steps", {"step": [step], "time_s": [float(step)], "loss": [1.0 + step]})
            if step % 2:
                writer.flush()
        writer.close("interrupted")
    return path


def part(run: Path, number: int, *, rank: int = 0) -> Path:
    return run / "steps" / f"part-r{rank}-{number:06d}.parquet"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_rows(path: Path) -> None:
    """Overwrite the pages, and leave the footer, which knows rows and steps."""
    data = bytearray(path.read_bytes())
    footer = int.from_bytes(data[-8:-4], "little") + 8
    data[4:-footer] = b"\xff" * (len(data) - footer - 4)
    path.write_bytes(bytes(data))


def steps_of(run: Path) -> list[int]:
    with RunLog.open(run) as log:
        return log.steps()["step"].to_pylist()


@pytest.mark.parametrize("break_it", [cut, empty, spoil_rows])
def test_the_rest_is_read_and_the_part_is_named_with_its_steps(break_it, tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    break_it(part(run, 2))
    with pytest.warns(UnclampWarning, match=r"steps/part-r0-000002\.parquet is damaged"):
        assert steps_of(run) == [0, 1, 2, 3, 6, 7, 8, 9]
    with RunLog.open(run) as log:
        (damage,) = log.damaged
    assert (damage.path, damage.table) == (part(run, 2), "steps")
    assert (damage.first_step, damage.last_step) == (4, 5)
    assert damage.rows == (2 if break_it is spoil_rows else None)
    assert "of the steps 4 to 5 are missing" in str(damage)


@pytest.mark.parametrize(
    ("number", "said"), [(0, "of steps up to 1 are"), (4, "of steps from 8 on are")]
)
def test_at_an_end_of_the_run_one_bound_is_known(number: int, said: str, tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    cut(part(run, number))
    with RunLog.open(run) as log:
        assert said in str(log.damaged[0])


def test_where_nothing_is_left_nothing_is_known_of_the_steps(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    for number in range(5):
        empty(part(run, number))
    with RunLog.open(run) as log:
        assert [d.path.name for d in log.damaged] == [part(run, n).name for n in range(5)]
        assert "of steps that are not known" in str(log.damaged[0])
        assert log.steps().num_rows == 0


def test_neighbours_are_those_of_the_same_rank(tmp_path: Path) -> None:
    run = write(tmp_path / "run", ranks=2)
    cut(part(run, 0, rank=1))
    with RunLog.open(run) as log:
        (damage,) = log.damaged
    assert (damage.first_step, damage.last_step) == (None, 1)


def test_it_is_told_of_once_and_a_part_that_was_mended_counts_again(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    whole = part(run, 2).read_bytes()
    cut(part(run, 2))
    log = RunLog.open(run)
    with pytest.warns(UnclampWarning):
        log.steps()
    assert log.steps().num_rows == len(steps_of(run)) == 8
    part(run, 2).write_bytes(whole)
    assert log.damaged == []
    assert log.steps()["step"].to_pylist() == list(range(10))
    log.close()


def test_a_query_that_is_wrong_is_an_error_as_before(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    cut(part(run, 2))
    with RunLog.open(run) as log, pytest.raises(RunLogError, match="no_such_column"):
        log.sql("SELECT no_such_column FROM steps")


def test_a_damaged_summary_is_made_again_from_its_casts(tmp_path: Path) -> None:
    run = write_planted(tmp_path / "run", steps=300)
    with RunLog.open(run) as log:
        expected = log.summaries().to_pylist()
    (summary,) = (run / "summaries").glob("*.parquet")
    cut(summary)
    with RunLog.open(run) as log:
        with pytest.warns(UnclampWarning, match="summaries/"):
            found = log.summaries().to_pylist()
        assert log.damaged == []
    assert [(r["first_step"], r["site"], r["saturated"]) for r in found] == [
        (r["first_step"], r["site"], r["saturated"]) for r in expected
    ]


def test_report_spikes_and_associate_read_the_rest(tmp_path: Path) -> None:
    run = write_planted(tmp_path / "run", steps=60)
    (casts,) = (run / "casts").glob("*.parquet")
    cut(casts)
    with pytest.warns(UnclampWarning, match="casts/"):
        view = build_view(run)
    (note,) = (note for note in view.notes if "damaged" in note)
    assert note.startswith(f"casts/{casts.name} is damaged and left out")
    curve = read_curve(run)
    assert len(curve.steps) == 60
    with RunLog.open(run) as log:
        assert associate(log).verdict == "cannot tell"


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError(),
                                   pa.ArrowMemoryError()])  # fmt: skip
def test_a_lack_of_files_or_memory_is_no_damage(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(paths: object) -> None:
        raise error

    (tmp_path / "part").write_bytes(b"")
    monkeypatch.setattr("unclamp.runlog.damage.read_parts", fail)
    assert find_damaged([tmp_path / "part"]) == {}
    assert not is_damaged(tmp_path / "part")
