"""The columns that tell what clamping did to a weight's gradient, recounted with numpy.

Inputs and gradients are integers that FP8 holds exactly, but for those that are planted too large.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import unclamp
from unclamp import Every, Recipe, Recorder, RunLog, Static
from unclamp.analysis import clamped_gradients

MOST = 57344 / 512
COLUMNS = ("grad_error", "grad_cosine", "grad_ratio", "weight_grad_norm")
CLAMPED = {3: [0, 1], 4: [1], 7: [0]}
"""Step to the microsteps that clamp."""


def record(path, **settings):
    """Train two steps' worth of microsteps at a time; return the rows and what was multiplied."""
    layer = nn.Linear(5, 4)
    unclamp.convert(
        layer,
        Recipe(input=Static(scale=1.0), weight=Static(scale=1.0), grad_output=Static(scale=512.0)),
    )
    optimizer = SGD(layer.parameters(), lr=0.0)
    made = {}
    with Recorder(layer, path, **settings) as recorder:
        for step in range(10):
            made[step] = []
            for microstep in range(2):
                generator = np.random.default_rng([step, microstep])
                x, dy = generator.integers(-4, 5, (6, 5)), generator.integers(-3, 4, (6, 4))
                if microstep in CLAMPED.get(step, []):
                    dy[2, 1], dy[4, 3] = 700, -333
                made[step].append((x.astype(float), dy.astype(float)))
                layer(torch.tensor(x).float()).backward(torch.tensor(dy).float())
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss=0.0)
    with RunLog.open(path) as log:
        return log.casts().to_pylist(), made


def truth(pairs):
    """Return the columns: both gradients of the microsteps that clamped, as one long vector."""
    clamped = [(x, dy) for x, dy in pairs if np.abs(dy).max() > MOST]
    computed = np.concatenate([(np.clip(dy, -MOST, MOST).T @ x).ravel() for x, dy in clamped])
    unclamped = np.concatenate([(dy.T @ x).ravel() for x, dy in clamped])
    norms = np.linalg.norm(computed), np.linalg.norm(unclamped)
    return {
        "grad_error": np.linalg.norm(unclamped - computed) / norms[1],
        "grad_cosine": computed @ unclamped / (norms[0] * norms[1]),
        "grad_ratio": norms[0] / norms[1],
        "weight_grad_norm": norms[1],
    }


def columns(row):
    return {name: row[name] for name in COLUMNS}


NOTHING = {"grad_error": 0.0, "grad_cosine": 1.0, "grad_ratio": 1.0, "weight_grad_norm": None}
UNKNOWN = dict.fromkeys(COLUMNS)


@pytest.mark.parametrize("inspect", [Every(6), Every(6, or_clamped=True), Every(1)])
def test_they_are_those_of_the_microsteps_that_clamped(tmp_path, inspect):
    rows, made = record(tmp_path / "run", inspect=inspect)
    for row in rows:
        step = row["step"]
        if row["site"] != 2:
            assert columns(row) == UNKNOWN
        elif step in CLAMPED:
            assert columns(row) == pytest.approx(truth(made[step]), rel=1e-6)
        else:
            assert columns(row) == (NOTHING if inspect.is_due(step) else UNKNOWN)


def test_without_closer_looks_they_are_null(tmp_path):
    rows, _ = record(tmp_path / "run", inspect=None)
    assert any(row["saturated"] for row in rows)
    assert all(columns(row) == UNKNOWN for row in rows)


def test_a_gradient_that_is_not_finite_leaves_them_null(tmp_path):
    layer = nn.Linear(4, 4)
    unclamp.convert(layer, Recipe(grad_output=Static(scale=512.0)))
    optimizer = SGD(layer.parameters(), lr=0.0)
    with Recorder(layer, tmp_path / "run") as recorder:
        for wild in (torch.nan, torch.inf):
            dy = torch.full((3, 4), 500.0)
            dy[0, 0] = wild
            layer(torch.ones(3, 4)).backward(dy)
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    with RunLog.open(tmp_path / "run") as log:
        nan, inf = log.casts(site=2).to_pylist()
        assert clamped_gradients(log).unmeasured == 1
    assert columns(nan) == UNKNOWN
    assert inf["grad_error"] > 0.5  # Inf itself was not clamped: it takes nothing away


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_in_a_compiled_model_an_inf_leaves_them_null(tmp_path):
    layer = nn.Linear(4, 4)
    unclamp.convert(layer, Recipe(grad_output=Static(scale=512.0)))
    optimizer = SGD(layer.parameters(), lr=0.0)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with Recorder(layer, tmp_path / "run") as recorder:
        for first in (torch.inf, 500.0):
            dy = torch.full((3, 4), 500.0)
            dy[0, 0] = first
            run(torch.ones(3, 4)).backward(dy)
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    with RunLog.open(tmp_path / "run") as log:
        inf, finite = log.casts(site=2).to_pylist()
    assert columns(inf) == UNKNOWN
    assert finite["grad_error"] == pytest.approx(1 - 57344 / 512 / 500)


def test_the_analysis_takes_them_from_a_run(tmp_path):
    _, made = record(tmp_path / "run")
    with RunLog.open(tmp_path / "run") as log:
        every, one = clamped_gradients(log), clamped_gradients(log, steps=[4, 5])
    expected = truth([pair for step in CLAMPED for pair in made[step]])
    assert every.change.error == pytest.approx(expected["grad_error"], rel=1e-6)
    assert every.change.cosine == pytest.approx(expected["grad_cosine"], rel=1e-6)
    assert (every.steps, every.casts, one.steps) == (3, 3, 1)
    assert one.change.error == pytest.approx(truth(made[4])["grad_error"], rel=1e-6)
