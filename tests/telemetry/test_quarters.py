"""The logged quarters of the highest octaves: a recount of the tensors, and logs without them."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.optim import SGD

import unclamp
from unclamp import Every, Recipe, Recorder, RunLog
from unclamp.analysis.whatif import evaluate, parse_policy


def record(path, scale=1.0):
    """Return the casts of a run of one layer, and its inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    unclamp.convert(model, Recipe.uniform("dynamic"))
    optimizer = SGD(model.parameters(), lr=0.0)
    inputs = []
    with Recorder(model, path, inspect=Every(1)) as recorder:
        for _ in range(4):
            inputs.append(torch.randn(32, 16) ** 3 * scale)
            model(inputs[-1]).mean().backward()
            optimizer.step()
            recorder.step(loss=0.0)
    with RunLog.open(path) as log:
        return log.sql(
            "SELECT * FROM casts JOIN (SELECT site, role FROM sites) USING (site) ORDER BY step"
        ).to_pylist(), inputs


def recount(x):
    """Return elements and mean by quarter, of the six highest octaves."""
    size = x.abs().flatten().double().numpy()
    mantissa, exponent = np.frexp(size[size > 0])
    keys = 4 * (exponent - 1) + np.floor(8 * mantissa).astype(int) - 4
    found = {}
    for key in np.unique(keys[exponent > exponent.max() - 6]).tolist():
        inside = size[size > 0][keys == key]
        found[key] = {"elements": len(inside), "mean": pytest.approx(inside.mean(), rel=1e-6)}
    return found


@pytest.mark.parametrize("scale", [1.0, 2.0**-50, 2.0**50])
def test_quarters_are_those_of_the_tensor(tmp_path, scale):
    rows, inputs = record(tmp_path / "run", scale)
    logged = [dict(row["quarters"]) for row in rows if row["role"] == "input"]
    assert logged == [recount(x) for x in inputs]


def test_a_tensor_beyond_the_counted_octaves_has_none(tmp_path):
    rows, _ = record(tmp_path / "run", 2.0**-80)
    inputs = [row for row in rows if row["role"] == "input"]
    assert [row["quarters"] for row in inputs] == [None] * 4
    assert all(row["exponents"] for row in inputs)


def test_a_log_from_before_quarters_is_read_and_is_less_certain(tmp_path):
    record(tmp_path / "run")
    policy = [parse_policy("static(scale=400)")]
    with RunLog.open(tmp_path / "run") as log:
        new = evaluate(log, policy).outcomes[0].lost
    for part in (tmp_path / "run" / "casts").glob("*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns("quarters"), part)
    with RunLog.open(tmp_path / "run") as log:
        assert log.sql("SELECT count(quarters) AS n FROM casts").to_pylist() == [{"n": 0}]
        old = evaluate(log, policy).outcomes[0].lost
    assert old is not None
    assert new is not None
    assert old.casts == new.casts
    for name in ("clamped", "clamp_error"):
        less, more = getattr(old, name), getattr(new, name)
        assert less.low <= more.low <= more.value <= more.high <= less.high
        assert more.high - more.low < 0.5 * (less.high - less.low)
