"""The columns that tell what casts did to the loss, recounted with numpy.

The loss is linear in the output of one layer, and all but planted elements are integers that FP8
holds exactly: what the casts change is known.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import unclamp
from unclamp import Every, HighPrecision, Recipe, Recorder, RunLog, Static

CLAMPED = {3: [0, 1], 4: [1]}
"""Step to the microsteps in which two elements are larger than 448."""
ODD = 17.0
"""Halfway between 16 and 18, the numbers of E4M3 beside it: rounded to 16."""
RECIPE = Recipe(input=Static(scale=1.0), weight=Static(scale=1.0), grad_output=HighPrecision())


def record(path, *, loss_scale=None, **settings):
    """Train ten steps of two microsteps; return the rows of the input and the true prices."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-3, 4, (4, 5)))
    weight = layer.weight.detach().double().numpy()
    unclamp.convert(layer, RECIPE)
    optimizer = SGD(layer.parameters(), lr=0.0)
    made = {}
    with Recorder(layer, path, **settings) as recorder:
        for step in range(10):
            made[step] = [0.0, 0.0]
            for microstep in range(2):
                generator = np.random.default_rng([step, microstep])
                x, dy = generator.integers(-4, 5, (6, 5)), generator.integers(-3, 4, (6, 4))
                x = x.astype(float)
                x[0, 0] = ODD
                changed = np.zeros_like(x)
                if microstep in CLAMPED.get(step, []):
                    x[2, 1], x[4, 3] = 700, -600
                    changed[2, 1], changed[4, 3] = 448 - 700, -448 + 600
                slopes = dy.astype(float) @ weight
                made[step][0] += (slopes * changed).sum()
                made[step][1] += slopes[0, 0] * (16 - ODD)
                scaled = torch.tensor(dy).float() * (loss_scale or 1)
                layer(torch.tensor(x).float().requires_grad_()).backward(scaled)
            optimizer.step()
            given: dict[str, Any] = (
                {} if loss_scale is None else {"loss_scale": torch.tensor(float(loss_scale))}
            )
            recorder.step(loss=0.0, **given)
    with RunLog.open(path) as log:
        rows = log.casts().to_pylist()
        return [row for row in rows if row["site"] == 0], made, rows, log.steps().to_pylist()


@pytest.mark.parametrize("inspect", [Every(6), Every(6, or_clamped=True), Every(1)])
@pytest.mark.parametrize("price_rounding", [False, True])
def test_they_are_what_the_planted_elements_did(tmp_path, inspect, price_rounding):
    rows, made, *_ = record(tmp_path / "run", inspect=inspect, price_rounding=price_rounding)
    for row in rows:
        step, clamp = row["step"], row["price_clamp"]
        is_due = inspect.is_due(step)
        assert clamp == (pytest.approx(made[step][0]) if is_due or step in CLAMPED else None)
        is_known = price_rounding and is_due
        assert row["price_rounding"] == (pytest.approx(made[step][1]) if is_known else None)


def test_a_gradient_has_none(tmp_path):
    *_, rows, _ = record(tmp_path / "run", inspect=Every(1), price_rounding=True)
    assert {row["price_clamp"] for row in rows if row["site"] == 2} <= {None}


def test_without_inspection_nothing_is_priced(tmp_path):
    rows, *_ = record(tmp_path / "run", inspect=None, price_rounding=True)
    assert all(row["price_clamp"] is None for row in rows)


def test_a_loss_scale_is_divided_out_and_stays_a_scalar(tmp_path):
    rows, made, _, steps = record(tmp_path / "run", loss_scale=1024)
    for row in rows:
        if row["step"] in CLAMPED:
            assert row["price_clamp"] == pytest.approx(made[row["step"]][0])
    assert dict(steps[0]["scalars"])["loss_scale"] == 1024.0


def test_a_loss_scale_of_zero_tells_of_no_price(tmp_path):
    layer = nn.Linear(5, 4)
    unclamp.convert(layer, RECIPE)
    optimizer = SGD(layer.parameters(), lr=0.0)
    with Recorder(layer, tmp_path / "run", inspect=1) as recorder:
        layer(torch.full((2, 5), 500.0).requires_grad_()).sum().backward()
        optimizer.step()
        recorder.step(loss=0.0, loss_scale=0.0)
    with RunLog.open(tmp_path / "run") as log:
        assert set(log.casts()["price_clamp"].to_pylist()) == {None}
