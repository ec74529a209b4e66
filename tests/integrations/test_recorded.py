"""What the integrations of all trainers share, driven by hand."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import unclamp
from unclamp.integrations.recorded import (
    SCALING_STATE_FILE,
    Framework,
    Recorded,
    Recording,
    load_scaling_state,
    not_installed,
    save_scaling_state,
    status_of,
)

BY_HAND = Framework(name="by hand", version="1", accumulation=2, precision="no")


def training(run: Path | None, **asked: Any) -> tuple[Recorded, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    recorded = Recorded(model, run, recipe=unclamp.Recipe(), recording=Recording(**asked))
    return recorded, torch.optim.SGD(model.parameters(), lr=0.1)


def step(recorded: Recorded, optimizer: torch.optim.Optimizer, number: int) -> float:
    """Make a step of two micro-batches and return the sum of their losses in float32."""
    total = torch.zeros(())
    for _ in range(2):
        loss = recorded.model(torch.randn(4, 8)).square().mean() / 2
        loss.backward()
        recorded.micro(loss)
        total += loss.detach()
    recorded.grad_norm(torch.tensor(float(number)))
    optimizer.step()
    optimizer.zero_grad()
    recorded.step(number, lr=0.1, scalars={"rewards/chosen": 2.0})
    return total.item()


def rows(run: Path) -> list[dict[str, Any]]:
    with unclamp.RunLog.open(run) as log:
        return log.sql("SELECT step, loss, grad_norm, lr FROM steps ORDER BY step").to_pylist()


def test_sums_of_micro_batches_are_recorded_under_the_trainers_numbers(tmp_path: Path) -> None:
    recorded, optimizer = training(tmp_path / "run", metadata={"mine": 1})
    recorded.begin(BY_HAND, resumes=False)
    with recorded.closing():
        losses = [step(recorded, optimizer, number) for number in (1, 2, 3)]
        recorded.micro(math.nan)
        recorded.micro(1.0)
        recorded.step(4)
        recorded.evaluation(4, {"eval_loss": math.nan, "worst": -math.inf, "note": "x", "n": [1]})
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["loss"] for row in found[:3]] == losses
    assert math.isnan(found[3]["loss"])
    assert [row["grad_norm"] for row in found] == [1.0, 2.0, 3.0, None]
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
        assert log.header.metadata == {
            **{"framework": "by hand", "framework_version": "1", "world_size": 1},
            **{"accumulation": 2, "precision": "no", "mine": 1},
        }
        (event,) = log.sql("SELECT step, data FROM events WHERE kind = 'evaluation'").to_pylist()
    assert event["step"] == 4
    assert json.loads(event["data"])["metrics"] == {
        **{"eval_loss": "nan", "worst": "-inf", "note": "x", "n": [1]}
    }


def test_a_resumed_training_goes_on_in_the_folder_and_a_new_one_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recorded, optimizer = training(run)
    recorded.begin(BY_HAND, resumes=False)
    first = [step(recorded, optimizer, number) for number in (1, 2)]
    recorded.end("failed")
    with pytest.raises(unclamp.RunLogError, match="resume it from its last checkpoint"):
        recorded.check(resumes=False)
    with pytest.raises(unclamp.RunLogError, match=r'overwrite=True .*"overwrite": True'):
        recorded.begin(BY_HAND, resumes=False)
    recorded.begin(BY_HAND, resumes=True)
    second = step(recorded, optimizer, 2)
    recorded.end()
    assert [row["loss"] for row in rows(run)] == [first[0], second]


def test_a_misspelt_word_of_the_recording_is_named() -> None:
    with pytest.raises(TypeError, match=r"no argument 'inspct'.*did you mean 'inspect'"):
        Recording(**cast(Any, {"inspct": 10}))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "peft is not installed: pip"),
        (ModuleNotFoundError("Could not import module 'Trainer'."), "import module 'Trainer': pip"),
    ],
    ids=["named", "by-hand"],
)
def test_a_missing_package_is_named(error: ModuleNotFoundError, said: str) -> None:
    assert said in str(not_installed(error, "hf"))


def test_a_resumed_training_names_its_folder(tmp_path: Path) -> None:
    recorded, _ = training(tmp_path / "run-{n}")
    with pytest.raises(unclamp.RunLogError, match="name the folder"):
        recorded.check(resumes=True)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(0), None)],
    ids=["error", "ctrl-c", "exit"],
)
def test_an_exception_closes_the_run_and_stays_what_it_was(
    tmp_path: Path, error: BaseException, status: str | None
) -> None:
    recorded, optimizer = training(tmp_path / "run")
    recorded.begin(BY_HAND, resumes=False)
    step(recorded, optimizer, 1)
    with pytest.raises(type(error)) as raised, recorded.closing():
        raise error
    assert raised.value is error
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.header.status == (status or "interrupted") == status_of(error)


def test_without_a_folder_nothing_is_recorded() -> None:
    recorded, optimizer = training(None)
    recorded.begin(BY_HAND, resumes=False)
    step(recorded, optimizer, 1)
    recorded.evaluation(1, {"loss": 1.0})
    recorded.end()


def test_scaling_state_lies_beside_a_checkpoint(tmp_path: Path) -> None:
    recorded, optimizer = training(None)
    for number in (1, 2):
        step(recorded, optimizer, number)
    save_scaling_state(recorded.model, tmp_path)
    other, _ = training(None)
    other.model.load_state_dict(unclamp.weights_only(recorded.model.state_dict()), strict=False)
    load_scaling_state(other.model, tmp_path)
    for (name, value), (_, back) in zip(
        recorded.model.state_dict().items(), other.model.state_dict().items(), strict=True
    ):
        assert torch.equal(value, back), name
    (tmp_path / SCALING_STATE_FILE).unlink()
    with pytest.warns(unclamp.UnclampWarning, match="start anew"):
        load_scaling_state(other.model, tmp_path)


def test_layers_that_a_checkpoint_has_nothing_of_are_named(tmp_path: Path) -> None:
    recorded, optimizer = training(None)
    step(recorded, optimizer, 1)
    save_scaling_state(recorded.model, tmp_path)
    more = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    unclamp.convert(more, unclamp.Recipe(), skip=["2"])
    with pytest.warns(unclamp.UnclampWarning, match="no scaling state of 3, so that"):
        load_scaling_state(more, tmp_path)
    found = unclamp.ScalingState(more).state_dict()
    for key, value in unclamp.ScalingState(recorded.model).state_dict().items():
        assert key.endswith("updates") or torch.equal(found[key], value), key
    assert not found["3.unclamp_input_amax_history"].any()


def test_a_missing_package_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("unclamp.integrations.t")]:
        monkeypatch.delitem(sys.modules, name)
    for package in ("transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(unclamp.UnsupportedError, match=r"pip install .unclamp\[hf\]"):
        importlib.import_module("unclamp.integrations.transformers")


def test_a_run_that_ended_before_its_first_step_is_replaced(tmp_path: Path) -> None:
    recorded, _ = training(tmp_path / "run")
    recorded.begin(BY_HAND, resumes=False)
    with pytest.raises(ValueError, match="no batch"), recorded.closing():
        raise ValueError("no batch")
    recorded, optimizer = training(tmp_path / "run")
    recorded.begin(BY_HAND, resumes=False)
    with recorded.closing():
        loss = step(recorded, optimizer, 1)
    assert [row["loss"] for row in rows(tmp_path / "run")] == [pytest.approx(loss)]
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "finished"
