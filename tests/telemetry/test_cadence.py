"""Cadences: which steps' casts are written, and which get a closer look."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.optim import SGD

import unclamp
from unclamp import Delayed, Every, Recipe, Recorder, RunLog, UnclampWarning
from unclamp.numerics import dequantize, quantize

SPIKE = 13
CLOSER = ("sqnr_db", "range_used", "headroom_bits", "scale_age", "exponents")


def record(path, *, steps=20, microsteps=1, lr=0.0, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    unclamp.convert(model, Recipe(input=Delayed(history_len=4)))
    optimizer = SGD(model.parameters(), lr=lr)
    inputs = []
    with Recorder(model, path, **settings) as recorder:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            for _ in range(microsteps):
                x = torch.rand(6, 8, generator=generator) * (90 if step == SPIKE else 1)
                inputs.append(x)
                model(x).mean().backward()
            optimizer.step()
            recorder.step(loss=0.0)
    with RunLog.open(path) as log:
        return log.casts().to_pylist(), inputs


def steps_of(rows):
    return sorted({row["step"] for row in rows})


def looked_at(rows):
    return [row for row in rows if row["exponents"] is not None]


def test_by_default_every_cast_is_written_and_every_hundredth_step_inspected(tmp_path):
    rows, _ = record(tmp_path / "run", steps=101)
    assert steps_of(rows) == list(range(101))
    assert steps_of(looked_at(rows)) == [0, 100]
    assert len(looked_at(rows)) == 2 * 6


def test_casts_every_n_steps_and_whenever_anything_clamped(tmp_path):
    rows, _ = record(tmp_path / "run", casts=Every(6, or_clamped=True), inspect=None)
    clamped = {row["step"] for row in rows if row["saturated"]}
    assert SPIKE in clamped
    assert steps_of(rows) == sorted({0, 6, 12, 18} | clamped)
    assert len([row for row in rows if row["step"] == SPIKE]) == 6
    sparse, _ = record(tmp_path / "sparse", casts=Every(6))
    assert steps_of(sparse) == [0, 6, 12, 18]


def test_a_closer_look_at_what_clamped_between_the_cadence(tmp_path):
    rows, _ = record(tmp_path / "run", inspect=Every(10, or_clamped=True))
    for row in rows:
        assert (row["exponents"] is not None) == (row["step"] % 10 == 0 or row["saturated"] > 0)
    at_spike = [row for row in looked_at(rows) if row["step"] == SPIKE]
    assert at_spike
    assert all(row["headroom_bits"] < 0 for row in at_spike)


def test_without_inspection_the_columns_are_null(tmp_path):
    rows, _ = record(tmp_path / "run", inspect=None)
    assert all(row[name] is None for row in rows for name in CLOSER)


def test_the_columns_equal_a_recount_from_the_tensors(tmp_path):
    rows, inputs = record(tmp_path / "run", microsteps=2, inspect=Every(1))
    found = [row for row in rows if row["site"] == 0]
    history = []
    for row in found:
        step = row["step"]
        pair = inputs[2 * step : 2 * step + 2]
        scale = torch.tensor(row["scale"]) if step else None  # the first step seeds itself
        casts = [quantize(x, unclamp.E4M3FN, scale) for x in pair]
        signal = sum(float(x.double().square().sum()) for x in pair)
        noise = sum(
            float((x.double() - dequantize(q).double()).square().sum())
            for x, q in zip(pair, casts, strict=True)
        )
        assert row["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-9)
        values = torch.cat(pair).flatten().tolist()
        counts = {}
        for value in values:
            if value:
                exponent = math.frexp(value)[1] - 1
                counts[exponent] = counts.get(exponent, 0) + 1
        assert dict(row["exponents"]) == counts
        assert row["headroom_bits"] == pytest.approx(math.log2(448 / (row["amax"] * row["scale"])))
        assert 0 < row["range_used"] <= 1
        window = history[:4]
        assert row["scale_age"] == (1 + window.index(max(window)) if window else 0)
        history.insert(0, row["amax"])


def test_a_guarded_recast_is_as_new_as_the_tensor(tmp_path):
    model = nn.Linear(4, 4)
    unclamp.convert(model, Recipe(input=unclamp.Guarded()))
    optimizer = SGD(model.parameters(), lr=0.0)
    with Recorder(model, tmp_path / "run", inspect=Every(1)) as recorder:
        for size in (1.0, 1.0, 50.0, 50.0):
            model(torch.full((2, 4), size)).sum().backward()
            optimizer.step()
            recorder.step()
    with RunLog.open(tmp_path / "run") as log:
        rows = log.casts(site=0).to_pylist()
    assert [(row["recast"], row["scale_age"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (0, 1)]


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3"])
def test_a_cadence_that_makes_no_sense_is_refused(steps):
    with pytest.raises(ValueError, match="1 step or more"):
        Every(steps)


def test_a_step_recorded_before_the_optimizer_is_told_of_once(tmp_path):
    model = nn.Linear(4, 4)
    unclamp.convert(model, Recipe())
    optimizer = SGD(model.parameters(), lr=0.0)
    recorder = Recorder(model, tmp_path / "run")
    with pytest.warns(UnclampWarning, match=r"after optimizer\.step") as caught:  # noqa: PT031
        for _ in range(5):
            model(torch.ones(2, 4)).sum().backward()
            recorder.step()
            optimizer.step()
    recorder.close()
    assert len(caught) == 1


def test_a_recorder_made_before_convert_is_told_of(tmp_path):
    model = nn.Linear(4, 4)
    with pytest.warns(UnclampWarning, match="no converted layer"):
        recorder = Recorder(model, tmp_path / "run")
    with recorder:
        unclamp.convert(model, Recipe())
        with pytest.warns(UnclampWarning, match="after unclamp.convert"):
            recorder.step()
        recorder.step()


def test_a_whole_number_is_a_cadence_and_the_header_has_it(tmp_path):
    rows, _ = record(tmp_path / "run", casts=6, inspect=10)
    assert steps_of(rows) == [0, 6, 10, 12, 18]  # what was looked at is written too
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.cadence is not None
        assert asdict(log.header.cadence) == {
            "casts": {"steps": 6, "or_clamped": False},
            "inspect": {"steps": 10, "or_clamped": False},
        }


@pytest.mark.parametrize("wrong", [{"casts": None}, {"casts": 0}, {"inspect": "often"}])
def test_a_wrong_cadence_is_refused_before_anything_is_claimed(tmp_path, wrong):
    with pytest.raises(unclamp.RunLogError, match="1 step or more"):
        Recorder(nn.Linear(4, 4), tmp_path / "run", **wrong)
    Recorder(nn.Linear(4, 4), tmp_path / "run", plain=True).close()


def test_steps_that_nobody_records_take_no_room_and_are_merged(tmp_path):
    model = nn.Linear(4, 4)
    unclamp.convert(model, Recipe())
    optimizer = SGD(model.parameters(), lr=0.0)
    with Recorder(model, tmp_path / "run", inspect=Every(1)) as recorder:
        for _ in range(5):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        recorder.step()
    with RunLog.open(tmp_path / "run") as log:
        (row,) = log.casts(site=0).to_pylist()
    assert row["microsteps"] == 5
    assert sum(count for _, count in row["exponents"]) == 3 * 8  # then looking ended


def test_layers_converted_later_are_recorded_from_then_on(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    unclamp.convert(model, Recipe(), skip=["1"])
    optimizer = SGD(model.parameters(), lr=0.0)
    with Recorder(model, tmp_path / "run", inspect=Every(1)) as recorder:
        for step in range(4):
            if step == 2:
                unclamp.convert(model, Recipe())
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            recorder.step()
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
        assert [s["fqn"] for s in log.sites().to_pylist()] == ["0"] * 3 + ["1"] * 3
        assert [s["step"] for s in log.casts(site=3).to_pylist()] == [2, 3]
