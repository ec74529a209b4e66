"""The recorder against a recount of what the casts saw."""

import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from torch import nn

import unclamp
from patience import PATIENCE_S
from unclamp import Delayed, Dynamic, Recipe, Recorder, RunLog
from unclamp.errors import RunLogError
from unclamp.formats import get_format
from unclamp.reference import float32, is_saturated, round_to_format
from unclamp.runlog import starting_no_run


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def train(model: nn.Module, recorder: Recorder, *, steps: int = 3, microsteps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for _ in range(microsteps):
            x = torch.randn(10, 12, generator=generator) * (1 + 3 * step)
            loss = model(x).square().mean()
            loss.backward()
        optimizer.step()
        recorder.step(loss=loss, lr=0.05, temperature=2.0)


def keep(seen: list[torch.Tensor]) -> Any:
    return lambda _module, arguments: seen.append(arguments[0].detach())


def test_saturated_counts_equal_a_recount_with_the_scalar_reference(tmp_path: Path) -> None:
    model = tiny()
    unclamp.convert(model, Recipe(input=Delayed(history_len=2)))
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(keep(inputs.setdefault(name, [])))
    with Recorder(model, tmp_path / "run") as recorder:
        train(model, recorder, steps=4)
    fmt = get_format("e4m3fn")
    rows = (
        duckdb.connect()
        .execute(
            f"SELECT step, fqn, saturated, underflowed, elements, scale, saturated_error "
            f"FROM '{tmp_path}/**/casts/*.parquet' "
            f"JOIN '{tmp_path}/**/sites/*.parquet' USING (site) "
            "WHERE role = 'input' ORDER BY step"
        )
        .fetchall()
    )
    assert len(rows) == 8
    for step, fqn, saturated, underflowed, elements, scale, error in rows:
        values = inputs[fqn][step].flatten().tolist()
        scaled = [float32(v * scale) for v in values]
        assert elements == len(values)
        assert saturated == sum(is_saturated(v, fmt) for v in scaled)
        assert underflowed == sum(v != 0 and round_to_format(v, fmt) == 0 for v in scaled)
        removed = sum(
            (abs(v) - fmt.max / scale) ** 2
            for v, s in zip(values, scaled, strict=True)
            if is_saturated(s, fmt)
        )
        assert error == pytest.approx(removed / sum(v * v for v in values), rel=1e-4)
    assert sum(row[2] for row in rows) > 0


def test_scalars_and_sites_are_read_back(tmp_path: Path) -> None:
    model = tiny()
    unclamp.convert(model, Recipe(weight=Dynamic()), skip=["2"])
    with Recorder(model, tmp_path / "run", metadata={"note": 7}) as recorder:
        train(model, recorder)
    with RunLog.open(tmp_path / "run") as log:
        steps, sites = log.steps().to_pydict(), log.sites().to_pylist()
        assert log.header.status == "finished"
        assert log.header.metadata["note"] == 7
        assert log.header.recipe == Recipe(weight=Dynamic()).to_dict()
    assert steps["step"] == [0, 1, 2]
    assert all(math.isfinite(loss) for loss in steps["loss"])
    assert steps["scalars"][0] == [("temperature", 2.0)]
    assert [(s["fqn"], s["role"], s["scaling"]) for s in sites] == [
        ("0", "input", "delayed"),
        ("0", "weight", "dynamic"),
        ("0", "grad_output", "delayed"),
    ]


def test_microsteps_are_merged_in_one_row(tmp_path: Path) -> None:
    model = tiny()
    unclamp.convert(model, Recipe())
    with Recorder(model, tmp_path / "run") as recorder:
        train(model, recorder, steps=2, microsteps=3)
    with RunLog.open(tmp_path / "run") as log:
        casts = log.casts().to_pylist()
    assert len(casts) == 2 * 6
    assert {cast["microsteps"] for cast in casts} == {3}


def test_run_is_readable_while_it_goes_on(tmp_path: Path) -> None:
    model = tiny()
    unclamp.convert(model, Recipe())
    recorder = Recorder(model, tmp_path / "run")
    train(model, recorder, steps=2)
    recorder.flush()
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "running"
        assert log.steps().num_rows == 2
    recorder.close()


def test_recording_changes_no_number(tmp_path: Path) -> None:
    recorded, plain = tiny(), tiny()
    for model in (recorded, plain):
        unclamp.convert(model, Recipe())
    with Recorder(recorded, tmp_path / "recorded") as recorder:
        train(recorded, recorder)
    with Recorder(nn.Identity(), tmp_path / "nothing", plain=True) as recorder:
        train(plain, recorder)
    pairs = zip(recorded.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_exception_leaves_a_failed_and_readable_run(tmp_path: Path) -> None:
    recorder = Recorder(tiny(), tmp_path / "run", plain=True)
    with pytest.raises(ZeroDivisionError), recorder:  # noqa: PT012
        recorder.step(loss=1.0)
        raise ZeroDivisionError
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "failed"
        assert log.steps().num_rows == 1


def test_events_carry_json(tmp_path: Path) -> None:
    with Recorder(tiny(), tmp_path / "run", plain=True) as recorder:
        recorder.event("switch", site="a")
    with RunLog.open(tmp_path / "run") as log:
        (event,) = log.events().to_pylist()
    assert (event["step"], event["kind"], json.loads(event["data"])) == (0, "switch", {"site": "a"})


def test_steps_without_an_optimizer_step_are_warned_about_once(tmp_path: Path) -> None:
    model = tiny()
    unclamp.convert(model, Recipe())
    recorder = Recorder(model, tmp_path / "run")
    with pytest.warns(unclamp.UnclampWarning, match="without an optimizer step") as caught:  # noqa: PT031
        for _ in range(20):
            recorder.step(loss=1.0)
    recorder.close()
    assert len(caught) == 1


def test_an_inf_loss_is_recorded_as_such(tmp_path: Path) -> None:
    with Recorder(tiny(), tmp_path / "run", plain=True) as recorder:
        recorder.step(loss=torch.tensor(float("inf")))
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["loss"].to_pylist() == [math.inf]


def test_sinks_get_every_step_and_a_failing_one_costs_itself(tmp_path: Path) -> None:
    model = tiny()
    unclamp.convert(model, Recipe())
    heard: list[tuple[int, dict[str, float]]] = []

    def keep_numbers(step: int, numbers: dict[str, float]) -> None:
        heard.append((step, numbers))

    def fail(step: int, numbers: dict[str, float]) -> None:
        raise OSError("gone")

    sinks = [keep_numbers, fail]
    recorder = Recorder(model, tmp_path / "run", sinks=sinks)
    with pytest.warns(unclamp.UnclampWarning, match="the sink fail stopped") as caught:  # noqa: PT031
        train(model, recorder, steps=5)
        recorder.close()
    assert len(caught) == 1
    assert [step for step, _ in heard] == list(range(5))
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
        rows = log.sql("SELECT step, sum(saturated) AS n FROM casts GROUP BY step").to_pylist()
    assert {row["step"]: row["n"] for row in rows} == {
        step: numbers["unclamp/saturated"] for step, numbers in heard
    }
    assert all(numbers["temperature"] == 2.0 for _, numbers in heard)


@pytest.mark.parametrize("wrong", [torch.ones(2), "x", [1, 2]])
def test_what_is_no_number_is_refused_at_once_and_the_log_goes_on(
    tmp_path: Path, wrong: Any
) -> None:
    with Recorder(tiny(), tmp_path / "run", plain=True) as recorder:
        recorder.step(loss=1.0)
        with pytest.raises(unclamp.RunLogError, match="expected a number for 'extra'"):
            recorder.step(loss=2.0, extra=wrong)
        recorder.step(loss=3.0)
    with RunLog.open(tmp_path / "run") as log:
        assert (log.header.status, log.steps().num_rows) == ("finished", 2)


@pytest.mark.parametrize("data", [{"x": math.nan}, {"x": torch.ones(1)}])
def test_an_event_that_is_no_json_is_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    with (
        Recorder(tiny(), tmp_path / "run", plain=True) as recorder,
        pytest.raises(unclamp.RunLogError, match="expected JSON data for the event 'odd'"),
    ):
        recorder.event("odd", **data)


def test_a_slow_sink_delays_neither_log_nor_training(tmp_path: Path) -> None:
    go_on = threading.Event()
    heard: list[int] = []

    def wait(step: int, numbers: dict[str, float]) -> None:
        go_on.wait(timeout=PATIENCE_S)
        heard.append(step)

    with Recorder(tiny(), tmp_path / "run", plain=True, sinks=[wait]) as recorder:
        for _ in range(5):
            recorder.step(loss=1.0)
        recorder.flush()
        with RunLog.open(tmp_path / "run") as log:
            assert log.steps().num_rows == 5
        assert heard == []
        go_on.set()
    assert heard == list(range(5))


def test_the_sinks_go_on_when_the_log_has_stopped(tmp_path: Path) -> None:
    heard: list[int] = []
    recorder = Recorder(
        tiny(), tmp_path / "run", plain=True, sinks=[lambda step, numbers: heard.append(step)]
    )
    recorder.step(loss=1.0)
    recorder.flush()
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(unclamp.UnclampWarning, match="the run log .* stopped"):  # noqa: PT031
        recorder.step(loss=1.0)
        recorder.flush()
        recorder.step(loss=1.0)
        recorder.close()
    assert heard == [0, 1, 2]


def test_a_recorder_of_casts_is_closed_twice_without_harm(tmp_path: Path) -> None:
    model = tiny()
    unclamp.convert(model, Recipe())
    with Recorder(model, tmp_path / "run") as recorder:
        train(model, recorder)
        recorder.close("interrupted")
    recorder.close()
    with RunLog.open(tmp_path / "run") as log:
        assert (log.header.status, log.steps().num_rows) == ("interrupted", 3)


def cell(path: Path, **options: Any) -> Recorder:
    """A notebook's cell: it makes all anew, and forgets to close."""
    model = tiny()
    unclamp.convert(model, Recipe())
    recorder = Recorder(model, path, **options)
    train(model, recorder, steps=3)
    return recorder


def test_a_cell_that_records_can_be_run_twice(tmp_path: Path) -> None:
    first = cell(tmp_path / "run", overwrite=True)
    second = cell(tmp_path / "run", overwrite=True)
    with pytest.raises(RunLogError, match="closed"):
        first.step(loss=1.0)
    second.close()
    assert second.path == tmp_path / "run"
    with RunLog.open(second.path) as log:
        assert log.header.status == "finished"
        assert log.steps()["step"].to_pylist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_refused_replacement_leaves_the_live_recorder_open(tmp_path: Path) -> None:
    first = cell(tmp_path / "run")
    (first.path / "mine.txt").write_text("x")
    with pytest.raises(RunLogError, match=r"mine\.txt"):
        cell(tmp_path / "run", overwrite=True)
    (first.path / "mine.txt").unlink()
    with (
        starting_no_run("a replay is being built"),
        pytest.raises(RunLogError, match="no run can begin"),
    ):
        cell(tmp_path / "run", overwrite=True)
    first.step(loss=1.0)
    first.close()
    with RunLog.open(first.path) as log:
        assert (log.header.status, log.steps().num_rows) == ("finished", 4)


def test_a_path_with_a_number_is_numbered(tmp_path: Path) -> None:
    recorders = [cell(tmp_path / "first-{n}") for _ in range(2)]
    for recorder in recorders:
        recorder.close()
    assert [recorder.path.name for recorder in recorders] == ["first-1", "first-2"]
    for recorder in recorders:
        with RunLog.open(recorder.path) as log:
            assert log.steps().num_rows == 3
