"""Which sites a run logs, and under which names: those of the modules that are in the model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import unclamp
from unclamp import Recipe, Recorder, RunLog
from unclamp.names import ROLES


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def train(model: nn.Module, recorder: Recorder, *, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        optimizer.step()
        recorder.step(loss=loss.detach())


def names_in(path: Path) -> list[str]:
    """Return every row of `sites`, by id."""
    with RunLog.open(path) as log:
        rows = log.sql("SELECT fqn, role FROM sites ORDER BY site").to_pydict()
    return [f"{fqn} {role}" for fqn, role in zip(rows["fqn"], rows["role"], strict=True)]


def casts_by_name(path: Path) -> dict[str, int]:
    with RunLog.open(path) as log:
        rows = log.sql(
            "SELECT fqn || ' ' || role AS name, count(*) AS casts FROM casts "
            "JOIN sites USING (rank, site) GROUP BY name"
        ).to_pydict()
        joined, every = sum(rows["casts"]), log.sql("SELECT 1 FROM casts").num_rows
    assert joined == every
    return dict(zip(rows["name"], rows["casts"], strict=True))


@pytest.mark.parametrize("pruned", [0, 2, 4])
def test_a_pruned_model_logs_the_layers_that_are_there(tmp_path: Path, pruned: int) -> None:
    model = nn.Sequential(*block(), *block())
    del model[1]  # Linear, Linear, Linear, ReLU, Linear
    model.insert(1, nn.ReLU())  # Linear, ReLU, Linear, Linear, ReLU, Linear
    unclamp.convert(model, Recipe())
    with Recorder(model, tmp_path / "whole") as recorder:
        train(model, recorder)
    linears = [i for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    del model[linears[pruned // 2]]
    here = [f"{i} {r}" for i, m in enumerate(model) if isinstance(m, nn.Linear) for r in ROLES]
    assert len(here) == 9
    with Recorder(model, tmp_path / "run") as recorder:
        train(model, recorder)
    assert sorted(names_in(tmp_path / "run")) == sorted(here)
    assert casts_by_name(tmp_path / "run") == dict.fromkeys(here, 3)


def test_what_is_pruned_while_a_run_is_recorded_moves_no_id(tmp_path: Path) -> None:
    model = nn.Sequential(*block(), nn.Linear(16, 16))
    unclamp.convert(model, Recipe())
    with Recorder(model, tmp_path / "run") as recorder:
        train(model, recorder)
        del model[2]
        unclamp.nn.find_ledgers(model)
        train(model, recorder)
    counts = casts_by_name(tmp_path / "run")
    assert counts == {f"{fqn} {role}": 3 if fqn == 2 else 6 for fqn in (0, 2, 3) for role in ROLES}


def test_a_layer_that_is_put_back_is_logged_from_then_on(tmp_path: Path) -> None:
    model = nn.Sequential(*block(), nn.Linear(16, 16))
    unclamp.convert(model, Recipe())
    last = model[3]
    del model[3]
    with Recorder(model, tmp_path / "run") as recorder:
        train(model, recorder)
        model.append(last)
        unclamp.nn.find_ledgers(model)
        train(model, recorder)
    counts = casts_by_name(tmp_path / "run")
    assert counts == {f"{fqn} {role}": 3 if fqn == 3 else 6 for fqn in (0, 2, 3) for role in ROLES}


def test_copies_of_one_block_log_eighteen_differently_named_sites(tmp_path: Path) -> None:
    one = block()
    unclamp.convert(one, Recipe())
    stack = nn.Sequential(*[copy.deepcopy(one) for _ in range(3)])
    with Recorder(stack, tmp_path / "run") as recorder:
        train(stack, recorder)
        unclamp.switch(stack[1], "*", input=unclamp.Dynamic())  # names sites within the part
        train(stack, recorder)
    expected = [f"{b}.{layer} {role}" for b in range(3) for layer in (0, 2) for role in ROLES]
    assert names_in(tmp_path / "run") == expected
    assert casts_by_name(tmp_path / "run") == dict.fromkeys(expected, 6)
    with RunLog.open(tmp_path / "run") as log:
        switched = log.sql("SELECT fqn, role FROM switches ORDER BY fqn").to_pydict()
    assert switched == {"fqn": ["1.0", "1.2"], "role": ["input", "input"]}


def test_a_wrapper_changes_no_name_and_a_layer_pruned_under_it_is_gone(tmp_path: Path) -> None:
    model = block()
    unclamp.convert(model, Recipe())
    wrapped = nn.ModuleDict({"module": model})
    del model[2]
    with Recorder(wrapped, tmp_path / "run") as recorder:
        train(model, recorder)
    assert names_in(tmp_path / "run") == [f"0 {role}" for role in ROLES]
