"""A log that is thinned loses no clamp and no total, whatever happens meanwhile."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from truths.rows import merge_early, parts_of, step, summarise
from typed import unclamp
from unclamp.analysis.association import associate
from unclamp.analysis.compaction import compact_run, steps_of_interest
from unclamp.analysis.prices import cast_prices
from unclamp.analysis.whatif import evaluate, parse_policy
from unclamp.errors import RunLogError, UnclampWarning
from unclamp.runlog import Header, Keep, RunLog, RunLogWriter, compact, thinning
from unclamp.runlog.levels import remove_levels

SITES, STEPS, A_FLUSH = 5, 400, 10
KEEP = Keep(recent=60, every=16, near=5)
NEAR = (150, 301)
FORMAT_MAX = 448.0
SUMS = ("amax_mean", "saturated_error_sum", "sqnr_db_mean")


def casts(steps: range, *, seed: int, ids: range, clamps: float = 0.02) -> dict[str, Any]:
    """Return rows in which every reason to stay occurs, each alone."""
    rows = len(steps) * len(ids)
    generator = np.random.default_rng(seed)
    draw = generator.random(rows)
    is_clamped, overshoots = draw < clamps, (draw > 0.05) & (draw < 0.06)
    looked = (draw > 0.07) & (draw < 0.08)
    amax = np.where(is_clamped | overshoots, 500.0, generator.uniform(1, 400, rows))
    number = np.repeat(np.array(steps, dtype=np.int64), len(ids))
    return {
        "step": number,
        "site": np.tile(np.array(ids, dtype=np.int32), len(steps)),
        "amax": amax.astype(np.float32),
        "scale": np.ones(rows, dtype=np.float32),
        "elements": np.full(rows, 1000),
        "saturated": is_clamped * generator.integers(1, 9, rows),
        "underflowed": generator.integers(0, 9, rows),
        "nonfinite": ((draw > 0.1) & (draw < 0.11)).astype(np.int64),
        "recast": ((draw > 0.12) & (draw < 0.13)).astype(np.int64),
        "saturated_error": is_clamped * generator.random(rows),
        "clamped": is_clamped,
        "microsteps": np.ones(rows, dtype=np.int32),
        "sqnr_db": [30.0 + x if look else None for x, look in zip(draw, looked, strict=True)],
        "sqnr_row_median_db": [29.0 if look else None for look in looked],
        "range_used": [0.5 if look else None for look in looked],
        "price_clamp": np.where(is_clamped, generator.random(rows) - 0.3, 0.0),
    }


def write(
    path: Path, *, rank: int = 0, world_size: int = 1, steps: range = range(STEPS), **more: Any
) -> Path:
    """Write a rank of a run; site n of every rank has the same name."""
    header = Header(unclamp_version="0", world_size=world_size, run_id=more.pop("run_id", "one"))
    clamps, status = more.pop("clamps", 0.02), more.pop("status", "finished")
    with RunLogWriter(path, header=header, rank=rank, flush_interval_s=1e9, **more) as writer:
        first = writer.first_site
        ids = range(first + rank, first + rank + SITES * world_size, world_size)
        roles = ["input", "weight", "grad_output", "input", "weight"]
        fqns = ["a", "a", "a", "b", "b"]
        same = {"format": "e4m3fn", "scaling": "delayed", "format_max": FORMAT_MAX}
        writer.add(
            "sites",
            {"site": list(ids), "fqn": fqns, "role": roles}
            | {name: [value] * SITES for name, value in same.items()},
        )
        for number in range(steps.start, steps.stop, A_FLUSH):
            group = range(number, min(number + A_FLUSH, steps.stop))
            for one in group:
                writer.add("steps", step(one) | {"loss": [2.0 + 0.01 * math.sin(one)]})
            seed = 1000 * rank + number
            writer.add("casts", casts(group, seed=seed, ids=ids, clamps=clamps))
            writer.flush()
        writer.close(status)
    return path


def stays(row: dict[str, Any], *, last: int = STEPS - 1, keep: Keep = KEEP) -> bool:
    """Say by the rule's words whether a row stays."""
    number = row["step"]
    return (
        number > last - keep.recent
        or number % keep.every == 0
        or any(abs(number - step) <= keep.near for step in NEAR)
        or row["saturated"] > 0
        or row["nonfinite"] > 0
        or row["recast"] > 0
        or row["amax"] * row["scale"] > FORMAT_MAX
        or row["sqnr_db"] is not None
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    with RunLog.open(path) as log:
        return log.casts().to_pylist()


def assert_totals_are_those_of(path: Path, before: list[dict[str, Any]]) -> None:
    """Compare summaries and windows with plain sums over the rows that there were."""
    expected = summarise(before)
    with RunLog.open(path) as log:
        found = log.summaries().to_pylist()
        windows = log.windows(most=7)
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        for name in SUMS:
            value, exact = row.pop(name), wanted.pop(name)
            assert value == (exact if exact is None else pytest.approx(exact, rel=1e-9))
        assert row == wanted
    assert sum(each.rows for each in windows.totals) == len(before)
    assert sum(each.saturated for each in windows.totals) == sum(r["saturated"] for r in before)
    assert sum(each.elements for each in windows.totals) == sum(r["elements"] for r in before)


@pytest.mark.parametrize("fan_in", [3, 16])
@pytest.mark.parametrize("full_rows", [120, 1_000_000])
def test_what_stays_is_what_the_rule_says_bit_for_bit_and_totals_are_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fan_in: int, full_rows: int
):
    merge_early(monkeypatch, fan_in=fan_in, full_rows=full_rows)
    monkeypatch.setattr(thinning, "FULL_ROWS", full_rows)
    run = write(tmp_path / "run")
    before = rows_of(run)
    tried = compact(run, KEEP, near=NEAR, is_tried=True)
    assert rows_of(run) == before
    found = compact(run, KEEP, near=NEAR)
    expected = [row for row in before if stays(row)]
    assert rows_of(run) == expected
    assert len(expected) < 0.5 * len(before)
    assert (found.rows, found.kept) == (len(before), len(expected)) == (tried.rows, tried.kept)
    assert found.steps == len({r["step"] for r in before} - {r["step"] for r in expected})
    assert 0 < found.freed < found.bytes_before
    assert found.parts_after == len(parts_of(run, "casts"))
    assert_totals_are_those_of(run, before)
    remove_levels(run)
    assert_totals_are_those_of(run, before)
    with RunLog.open(run) as log:
        (thinned,) = log.header.thinned
        assert (thinned.keep, thinned.before) == (KEEP, STEPS - KEEP.recent)
        assert thinned.rows == len(before) - len(expected)


def test_a_log_that_was_interrupted_in_small_parts_is_merged_and_loses_nothing(tmp_path: Path):
    write(tmp_path, steps=range(50), status="interrupted")
    before = rows_of(tmp_path)
    assert len(parts_of(tmp_path, "casts")) == 5
    found = compact(tmp_path, None)
    assert (found.parts_before, found.parts_after) == (5, 1)
    assert rows_of(tmp_path) == before
    assert parts_of(tmp_path, "casts") == ["part-r0-000000-000004.parquet"]
    assert_totals_are_those_of(tmp_path, before)
    with RunLog.open(tmp_path) as log:
        assert log.header.thinned == []


def test_ranks_keep_what_clamped_on_any_of_them_so_that_prices_are_the_same(tmp_path: Path):
    run = tmp_path / "run"
    for rank, clamps in ((0, 0.0), (1, 0.05)):
        write(run, rank=rank, world_size=2, clamps=clamps)
    before = rows_of(run)
    clamped = {(row["site"] // 2, row["step"]) for row in before if row["saturated"]}
    with RunLog.open(run) as log:
        prices = cast_prices(log)
    compact(run, KEEP, near=NEAR)
    expected = [r for r in before if stays(r) or (r["site"] // 2, r["step"]) in clamped]
    assert rows_of(run) == expected
    assert any(not stays(row) for row in expected)
    with RunLog.open(run) as log:
        assert cast_prices(log) == prices
    assert prices.sites
    assert_totals_are_those_of(run, before)


def test_of_a_run_that_was_begun_again_the_rows_that_count_are_thinned(tmp_path: Path):
    run = tmp_path / "run"
    write(run, steps=range(290))
    write(run, steps=range(230, STEPS), run_id="two", resume=True)
    before = rows_of(run)
    assert len(before) == STEPS * SITES
    compact(run, KEEP, near=NEAR)
    after = rows_of(run)
    # From the first step of its last window on an attempt's rows are summed up anew.
    expected = [row for row in before if stays(row) or 200 <= row["step"] < 230]
    assert after == expected
    assert_totals_are_those_of(run, before)


def test_a_run_goes_on_after_it_was_thinned_and_the_header_still_says_so(tmp_path: Path):
    run = write(tmp_path / "run", steps=range(300))
    before = rows_of(run)
    keep = Keep(recent=60, every=16, near=0)
    compact(run, keep)
    write(run, steps=range(300, STEPS), run_id="two", resume=True)
    with RunLog.open(run) as log:
        assert [thinned.keep for thinned in log.header.thinned] == [keep]
        added = log.sql("SELECT * FROM casts WHERE step >= 300").num_rows
    assert added == 100 * SITES
    compact(run, keep)
    with RunLog.open(run) as log:
        assert len(log.header.thinned) == 2
        assert log.sql("SELECT sum(steps) AS n FROM summaries")["n"].to_pylist() == [STEPS * SITES]
    assert {r["step"] for r in before if r["saturated"]} <= {r["step"] for r in rows_of(run)}


def test_a_second_time_changes_nothing_and_a_stricter_rule_thins_further(tmp_path: Path):
    run = write(tmp_path / "run")
    before = rows_of(run)
    compact(run, KEEP, near=NEAR)
    parts, once = parts_of(run, "casts"), rows_of(run)
    again = compact(run, KEEP, near=NEAR)
    assert (parts_of(run, "casts"), rows_of(run)) == (parts, once)
    assert (again.rows, again.kept) == (len(once), len(once))
    stricter = Keep(recent=10, every=64, near=5)
    compact(run, stricter, near=NEAR)
    expected = [row for row in once if stays(row, keep=stricter)]
    assert rows_of(run) == expected
    assert len(expected) < len(once)
    assert_totals_are_those_of(run, before)
    with RunLog.open(run) as log:
        assert [thinned.keep for thinned in log.header.thinned] == [KEEP, stricter]


def test_a_step_that_was_recorded_twice_keeps_both_so_that_the_last_one_counts(tmp_path: Path):
    header = Header(unclamp_version="0")
    with RunLogWriter(tmp_path, header=header) as writer:
        for number in (*range(30), 7, *range(30, 50)):
            writer.add("steps", step(number))
            writer.add("casts", casts(range(number, number + 1), seed=number, ids=range(3)))
    before = rows_of(tmp_path)
    compact(tmp_path, Keep(recent=5, every=40, near=0))
    assert [r for r in rows_of(tmp_path) if r["step"] == 7] == [r for r in before if r["step"] == 7]
    assert len([r for r in before if r["step"] == 7]) == 6


# ---- what happens meanwhile --------------------------------------------------------------------


def test_an_error_while_new_parts_are_written_leaves_the_old_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = write(tmp_path / "run")
    before, files = rows_of(run), sorted(run.rglob("*"))

    def fail(path: Path, *rows: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(thinning, "write_part", fail)
    with pytest.raises(RunLogError, match=r"cannot be compacted: .*no space left"):
        compact(run, KEEP, near=NEAR)
    assert sorted(run.rglob("*")) == files
    assert rows_of(run) == before


@pytest.mark.parametrize("moves", range(4))
def test_a_crash_while_parts_are_moved_leaves_a_log_that_the_next_call_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
):
    merge_early(monkeypatch, full_rows=400)
    monkeypatch.setattr(thinning, "FULL_ROWS", 200)
    run = write(tmp_path / "run")
    before = rows_of(run)
    expected = [row for row in before if stays(row)]
    left, replace = [moves], Path.replace

    def stop(self: Path, target: Any) -> Any:
        if thinning.READY in str(self):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            compact(run, KEEP, near=NEAR)
    assert_totals_are_those_of(run, before)
    between = [tuple(row.items()) for row in map(_hashable, rows_of(run))]
    assert {tuple(_hashable(row).items()) for row in expected} <= set(between)
    assert len(between) == len(set(between)) <= len(before)
    compact(run, KEEP, near=NEAR)
    assert rows_of(run) == expected
    assert_totals_are_those_of(run, before)
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".comp")) == []
    with RunLog.open(run) as log:
        assert len(log.header.thinned) == 1
        assert not log.damaged


def test_a_crash_while_what_was_moved_is_cleared_away_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = write(tmp_path / "run")
    before, remove = rows_of(run), shutil.rmtree

    def stop(path: Path, **more: Any) -> None:
        if path.name == thinning.READY:
            (path / "thinned.json").unlink()
            raise KeyboardInterrupt
        remove(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            compact(run, KEEP, near=NEAR)
    compact(run, KEEP, near=NEAR)
    assert rows_of(run) == [row for row in before if stays(row)]
    assert_totals_are_those_of(run, before)
    assert not (run / thinning.READY).exists()
    with RunLog.open(run) as log:
        assert len(log.header.thinned) == 1


def _hashable(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not isinstance(value, list)}


def test_what_a_killed_compaction_left_is_cleared_and_a_living_one_is_waited_for(tmp_path: Path):
    run = write(tmp_path / "run")
    before = rows_of(run)
    staging = run / thinning.STAGING
    (staging / "casts").mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = '{{"process": {}, "host": "{}"}}'
    (staging / "owner.json").write_text(owner.format(os.getpid(), socket.gethostname()))
    with pytest.raises(RunLogError, match=r"is being compacted by process \d+: wait for its end"):
        compact(run, KEEP, near=NEAR)
    (staging / "owner.json").write_text(owner.format(1, "elsewhere"))
    with pytest.raises(RunLogError, match=r"on elsewhere, or was .*: if it has ended, remove"):
        compact(run, KEEP, near=NEAR)
    assert rows_of(run) == before
    (staging / "owner.json").write_text(owner.format(ended.pid, socket.gethostname()))
    compact(run, KEEP, near=NEAR)
    assert rows_of(run) == [row for row in before if stays(row)]
    assert not staging.exists()


def test_a_run_that_is_being_written_is_refused(tmp_path: Path):
    with RunLogWriter(tmp_path, header=Header(unclamp_version="0")) as writer:
        writer.add("casts", casts(range(3), seed=0, ids=range(3)))
        writer.flush()
        with pytest.raises(RunLogError, match=r"cannot be compacted, rank 0 .*being written by"):
            compact(tmp_path, KEEP)
    compact(tmp_path, KEEP)


def test_a_reader_that_was_open_before_sees_the_new_log(tmp_path: Path):
    run = write(tmp_path / "run")
    with RunLog.open(run) as log:
        before = log.casts().to_pylist()
        compact(run, KEEP, near=NEAR)
        assert log.casts().to_pylist() == [row for row in before if stays(row)]


def test_a_damaged_part_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    merge_early(monkeypatch, full_rows=400)
    run = write(tmp_path / "run")
    damaged = run / "casts" / parts_of(run, "casts")[0]
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    compact(run, KEEP, near=NEAR)
    assert damaged.exists()
    with RunLog.open(run) as log:
        assert [part.path for part in log.damaged] == [damaged]
        assert log.header.thinned


# ---- what readers say --------------------------------------------------------------------------


def with_spikes(path: Path) -> tuple[Path, tuple[int, ...]]:
    """Write a run whose first site clamps at each of its spikes."""
    onsets, steps = (60, 101, 163, 222, 287, 350), np.arange(STEPS)
    loss = 2 + 0.02 * np.random.default_rng(0).standard_normal(STEPS)
    loss[list(onsets)] *= 2
    with RunLogWriter(path, header=Header(unclamp_version="0")) as writer:
        writer.add("steps", {"step": steps, "time_s": steps * 1.0, "loss": loss})
        names = {"fqn": ["a", "b", "b"], "role": ["input", "input", "weight"]}
        same = {"format": "e4m3fn", "scaling": "delayed", "format_max": FORMAT_MAX}
        more = {name: [value] * 3 for name, value in same.items()}
        writer.add("sites", {"site": [0, 1, 2], **names, **more})
        rows = casts(range(STEPS), seed=1, ids=range(3), clamps=0.05)
        at = (rows["site"] == 0) & np.isin(rows["step"], onsets)
        rows |= {"clamped": rows["clamped"] | at, "saturated": rows["saturated"] + at}
        writer.add("casts", rows | {"saturated_error": rows["saturated_error"] + 0.1 * at})
        writer.add("events", {"step": [200], "kind": ["mine"], "data": ["{}"]})
    return path, onsets


def test_associate_gives_the_same_answer_and_says_that_steps_are_thinned(tmp_path: Path):
    run, onsets = with_spikes(tmp_path)
    with RunLog.open(run) as log:
        before = associate(log)
    compact_run(run, Keep(recent=20, every=50, near=2))
    with RunLog.open(run) as log:
        after = associate(log)
        whole = log.sql(
            "SELECT step FROM casts GROUP BY step HAVING count(*) = 3 ORDER BY step"
        ).column(0)
    assert (after.verdict, after.sites) == (before.verdict, before.sites)
    assert before.sites
    said = [text for text in after.sentences if "thinned" in text]
    assert len(said) == 1
    assert "before step 380" in said[0]
    assert "one step in 50" in said[0]
    near = {s + d for s in (*onsets, 200) for d in (-2, -1, 0, 1, 2)}
    assert near | set(range(380, 400)) | set(range(0, 400, 50)) <= set(whole.to_pylist())
    assert steps_of_interest(run) == sorted({*onsets, 200})


def test_whatif_says_that_steps_are_thinned(tmp_path: Path):
    run, _ = with_spikes(tmp_path)
    compact_run(run, Keep(recent=20, every=50, near=2))
    with RunLog.open(run) as log:
        limits = evaluate(log, [parse_policy("delayed")]).limits
    assert sum("thinned" in text and "overstated" in text for text in limits) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["evry=3"], "did you mean 'every'"),
        (["every=3", "every=4"], "expected every=N once at most, got every=3 and every=4$"),
        (["every=0"], "every of at least 1, got recent=100000, every=0, near=100"),
        (["recent"], "expected a whole number of steps, such as recent=100000, got 'recent'"),
        (["recent=-1"], "expected a whole number"),
    ],
)
def test_a_rule_that_is_none_is_refused(texts: list[str], message: str):
    with pytest.raises(RunLogError, match=message):
        Keep.parse(texts)


def test_clamped_rows_come_first_and_have_row_groups_of_their_own(tmp_path: Path):
    run = write(tmp_path / "run")
    (part,) = parts_of(run, "casts")
    metadata = pq.ParquetFile(run / "casts" / part).metadata
    place = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index("saturated")
    groups = [metadata.row_group(i).column(place) for i in range(metadata.num_row_groups)]
    assert [(g.statistics.min > 0, g.statistics.max > 0) for g in groups] == [
        (True, True),
        (False, False),
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("lose", [Path.unlink, truncate], ids=["deleted", "truncated"])
def test_a_lost_summary_of_a_thinned_part_is_told_as_damage(
    lose: Callable[[Path], object], tmp_path: Path
):
    run = write(tmp_path / "run")
    planted = unclamp("compact", run, "--keep", "recent=60", "--keep", "near=5")
    assert planted.returncode == 0, planted.stderr
    (summary,) = (path for path in (run / "summaries").glob("*-t1.parquet"))
    with RunLog.open(run) as log:
        assert log.damaged == []
        rows = log.sql("SELECT sum(steps) AS n FROM summaries")["n"][0].as_py()
        left = log.casts().num_rows
    assert rows > left
    lose(summary)
    said = (
        rf"summaries/{summary.name} is (missing|damaged): it alone told of the rows of casts that "
        r"were thinned, so totals of the steps 0 to 399 are of the rows that are left"
    )
    with RunLog.open(run) as log:
        with pytest.warns(UnclampWarning, match=said):
            assert log.sql("SELECT sum(steps) AS n FROM summaries")["n"][0].as_py() == left
        (damage,) = log.damaged
    assert re.fullmatch(said, str(damage))
    assert (damage.path, damage.first_step, damage.last_step) == (summary, 0, 399)
    assert damage.is_gone == (lose is Path.unlink)
    page = unclamp("report", run, "--json")
    assert any(re.match(said, note) for note in json.loads(page.stdout)["notes"])
    assert re.search(said, (run / "report.html").read_text())


def test_whatif_warns_of_a_lost_summary_of_a_thinned_part(tmp_path: Path):
    run = write(tmp_path / "run")
    unclamp("compact", run, "--keep", "recent=60", "--keep", "near=5")
    for summary in (run / "summaries").glob("*-t1.parquet"):
        summary.unlink()
    answer = unclamp("whatif", run, "--policy", "delayed(4)")
    assert answer.returncode == 0
    assert "so totals of the steps 0 to 399 are of the rows that are left" in answer.stderr
