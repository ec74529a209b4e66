"""Totals over ranks: what several ranks hold alike counts once; maxima are over all of them."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from truths.several_ranks import write_rank
from unclamp.analysis.gradients import clamped_gradients
from unclamp.runlog import RunLog
from unclamp.runlog import windows as windows_module

X, W, G = ("a", "input"), ("a", "weight"), ("a", "grad_output")


def cast(elements: int, saturated: int, amax: float, **more: Any) -> dict[str, Any]:
    counts = {"underflowed": saturated + 1, "nonfinite": 0, "recast": 0, "microsteps": 1}
    error = {"saturated_error": 0.25 if saturated else 0.0}
    return {"elements": elements, "saturated": saturated, "amax": amax, **counts, **error, **more}


def plant(path: Path, *, steps: int = 3) -> None:
    """Write data parallelism over two ranks: half of the tokens each, the same weight."""
    weight = cast(64, 5, 8.0)
    write_rank(path, 0, range(steps), casts={X: cast(30, 2, 3.0), W: weight})
    write_rank(path, 1, range(steps), casts={X: cast(34, 1, 7.0), W: weight}, repeated=[W])


@pytest.mark.parametrize("reads_summaries", [False, True])
def test_totals_of_two_ranks_are_those_of_one_process(
    tmp_path: Path, reads_summaries: bool, monkeypatch: pytest.MonkeyPatch
):
    plant(tmp_path / "two")
    alone = {X: cast(64, 3, 7.0, underflowed=5), W: cast(64, 5, 8.0)}
    write_rank(tmp_path / "one", 0, range(3), world_size=1, casts=alone)
    if reads_summaries:
        monkeypatch.setattr(windows_module, "LONG_STEPS", 1)
    found = []
    for name in ("one", "two"):
        with RunLog.open(tmp_path / name) as log:
            windows = log.windows()
            assert windows.cut.from_summaries == reads_summaries
            found.append(windows)
    one, two = found
    for mine, both in zip(one.totals, two.totals, strict=True):
        for count in ("elements", "saturated", "underflowed", "nonfinite"):
            assert getattr(both, count) == getattr(mine, count)
        assert both.overshoot == mine.overshoot
    assert two.totals[1] == one.totals[1]  # of the weight: rows, casts and errors too
    assert two.totals[0].rows == 2 * one.totals[0].rows  # a cast of its own on each rank


def test_a_log_from_before_has_no_replicated_operands(tmp_path: Path):
    plant(tmp_path)
    for part in tmp_path.glob("sites/*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns("replicated"), part)
    with RunLog.open(tmp_path) as log:
        assert log.sites()["replicated"].to_pylist() == [False] * 4
        assert log.windows().totals[1].elements == 2 * 3 * 64


def test_what_is_known_to_be_replicated_later_holds_from_the_start(tmp_path: Path):
    plant(tmp_path)
    part = next(tmp_path.glob("sites/part-r0-*.parquet"))
    again = pq.read_table(part).to_pylist()
    schema = pq.read_schema(part)
    rows = [row | {"replicated": row["role"] == "weight"} for row in again]
    late = type(pq.read_table(part)).from_pylist(rows, schema)
    pq.write_table(late, part.with_name("part-r0-000007.parquet"))
    with RunLog.open(tmp_path) as log:
        assert log.sites().num_rows == 4
        assert log.sql("SELECT site FROM sites WHERE replicated ORDER BY site")[
            "site"
        ].to_pylist() == [2, 3]


def test_the_rank_of_each_largest_amax_is_the_lowest_that_had_it(tmp_path: Path):
    amaxes = [(1.0, 2.0, float("inf")), (5.0, 2.0, 0.5), (5.0, 2.0, float("nan"))]
    for rank, own in enumerate(amaxes):
        casts = {name: cast(1, 0, amax) for name, amax in zip((X, W, G), own, strict=True)}
        write_rank(tmp_path, rank, [0], world_size=3, casts=casts)
    with RunLog.open(tmp_path) as log:
        found = {row["role"]: row for row in log.amaxes().to_pylist()}
    assert {role: row["amax_rank"] for role, row in found.items()} == {
        "input": 1,
        "weight": 0,
        "grad_output": 1,
    }
    assert {role: row["amax"] for role, row in found.items()} == {
        "input": 5.0,
        "weight": 2.0,
        "grad_output": 0.5,
    }
    assert {row["ranks"] for row in found.values()} == {3}


def test_ranks_are_compared_where_they_hold_the_same_sites_alone(tmp_path: Path):
    """Stages of a pipeline hold different modules; of two that share one, the worse is seen."""
    other = ("b", "input")
    write_rank(tmp_path, 0, range(4), world_size=3, casts={X: cast(8, 0, 100.0)})
    write_rank(tmp_path, 1, range(4), world_size=3, casts={other: cast(8, 0, 224.0)})
    with RunLog.open(tmp_path) as log:
        assert log.overshoots(log.windows().cut) == []
        assert len(log.named_sites()) == 2
    write_rank(tmp_path, 2, range(4), world_size=3, casts={other: cast(8, 3, 896.0)})
    with RunLog.open(tmp_path) as log:
        found = {rank.rank: rank for rank in log.overshoots(log.windows().cut)}
    assert found.keys() == {1, 2}
    assert found[1].cells.tolist() == [1.0] * 4  # scale 2: 224 * 2 / 448
    assert found[2].cells.tolist() == [4.0] * 4
    assert (found[1].led, found[2].led) == (0.0, 1.0)
    assert (found[1].saturated, found[2].saturated) == (0, 12)
    assert found[2].worst.name.fqn == "b"


def test_gradients_of_shards_of_one_weight_add_up_and_their_casts_count_once(tmp_path: Path):
    """Row-wise: one gradient of the output on both ranks, half of the weight's gradient each."""
    casts = []
    for norm in (3.0, 4.0):
        known = {"grad_error": 0.5, "grad_cosine": 1.0, "grad_ratio": 0.5, "weight_grad_norm": norm}
        casts.append({X: cast(4, 0, 1.0), G: cast(4, 1, 1.0, **known)})
    write_rank(tmp_path, 0, [0], casts=casts[0])
    write_rank(tmp_path, 1, [0], casts=casts[1], repeated=[G])
    with RunLog.open(tmp_path) as log:
        found = clamped_gradients(log)
    assert (found.casts, found.unmeasured) == (1, 0)
    assert found.change.unclamped == 25.0  # 3 ** 2 + 4 ** 2
    assert found.change.error == pytest.approx(0.5)


def test_gradients_of_equal_operands_count_once(tmp_path: Path):
    known = {"grad_error": 0.5, "grad_cosine": 1.0, "grad_ratio": 0.5, "weight_grad_norm": 3.0}
    casts = {X: cast(4, 0, 1.0), G: cast(4, 1, 1.0, **known)}
    write_rank(tmp_path, 0, [0], casts=casts)
    write_rank(tmp_path, 1, [0], casts=casts, repeated=[X, G])
    with RunLog.open(tmp_path) as log:
        assert clamped_gradients(log).change.unclamped == 9.0


def test_ranks_are_not_compared_where_casts_are_only_counted(tmp_path: Path):
    counted = ("b.qk", "input")
    for rank, amax in enumerate((224.0, 896.0)):
        casts = {X: cast(8, 0, 100.0 + rank), counted: cast(8, 3, amax)}
        write_rank(tmp_path, rank, range(4), casts=casts, only_counted=[counted])
    with RunLog.open(tmp_path) as log:
        found = log.overshoots(log.windows().cut)
        assert [(rank.saturated, rank.worst.name.fqn) for rank in found] == [(0, X[0])] * 2
        assert [site.fqn for site in log.computed_sites()] == [X[0]]
        assert [site.only_counted for site in log.named_sites()] == [False, True]
