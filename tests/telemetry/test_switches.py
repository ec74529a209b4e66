"""A switch while recording can be joined with the casts it governs."""

import json
from pathlib import Path

import torch
from torch import nn

import unclamp
from unclamp import Dynamic, Recipe, Recorder, RunLog


def test_the_scaling_in_force_at_a_step_is_a_join_away(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8))
    unclamp.convert(model, Recipe())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with Recorder(model, tmp_path / "run") as recorder:
        for step in range(4):
            if step == 2:
                unclamp.switch(model, "1", input=Dynamic())
            model(torch.randn(10, 12)).square().mean().backward()
            optimizer.step()
            recorder.step()
    with RunLog.open(tmp_path / "run") as log:
        (switch,) = log.switches().to_pylist()
        dynamic = log.sql(
            "SELECT casts.step FROM casts JOIN sites USING (site) "
            "JOIN switches w USING (fqn, role) "
            "WHERE casts.step >= w.step AND w.after->>'scaling' = 'dynamic' ORDER BY ALL"
        )
    assert (switch["step"], switch["fqn"], switch["role"]) == (2, "1", "input")
    assert (json.loads(switch["before"])["scaling"], json.loads(switch["after"])["scaling"]) == (
        "delayed",
        "dynamic",
    )
    assert dynamic["step"].to_pylist() == [2, 3]
