"""Every way to train makes one update a step: by itself, or where it is told; or it is said."""

import gc
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.optimizers import AMAXES, CASES, WIDTH, Case, histories
from torch import nn

import unclamp
from unclamp import Delayed, Recipe, Recorder, UnclampWarning
from unclamp.nn import find_ledgers

FOLLOWED = [case for case in CASES if case.is_followed and case.library is None]
UNSEEN = [case for case in CASES if not case.is_followed and case.library is None]
NEWEST_FIRST = [16.0, 8.0, 4.0, 2.0, 1.0]


def name(case: Case) -> str:
    return case.name


def made() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    unclamp.convert(layer, Recipe.uniform(Delayed(history_len=16)))
    return layer


def train(case: Case, layer: nn.Linear, *, steps: int) -> None:
    step = case.make(layer)
    for number in range(steps):
        x = torch.full((4, WIDTH), 1.0 + number)
        step(lambda x=x: layer(x).square().mean())


@pytest.mark.parametrize("case", FOLLOWED, ids=name)
@pytest.mark.parametrize("tells", [False, True])
def test_what_is_followed_makes_one_update_a_step_and_a_call_beside_it_none(
    case: Case, tells: bool
) -> None:
    assert list(reversed(AMAXES)) == NEWEST_FIRST
    assert histories(case, tells=tells) == NEWEST_FIRST


@pytest.mark.parametrize("case", UNSEEN, ids=name)
def test_what_no_hook_sees_makes_one_update_a_step_where_it_is_told(case: Case) -> None:
    assert histories(case, tells=True) == NEWEST_FIRST


@pytest.mark.parametrize("case", UNSEEN, ids=name)
def test_what_no_hook_sees_is_said_once_without_a_recorder(case: Case) -> None:
    layer = made()
    with pytest.warns(UnclampWarning) as caught:
        train(case, layer, steps=40)
    (warning,) = caught
    text = str(warning.message)
    assert "unclamp.step(model)" in text
    reason = {
        "float32 copies without a link": "the optimizer AdamW holds other tensors",
        "copies on the host, an optimizer each": "the optimizer AdamW holds other tensors",
        "a flat copy without a link": "the optimizer AdamW holds other tensors",
        "a frozen model behind a trained probe": "its weights are frozen, and what trains by AdamW",
    }.get(case.name, "its weights change without a step of a torch.optim optimizer")
    assert reason in text


def test_float32_copies_of_a_compiled_model_are_said_too() -> None:
    layer = made()
    compiled: Any = torch.compile(layer, backend="aot_eager")
    step = next(case for case in UNSEEN if "without a link" in case.name).make(layer)
    with pytest.warns(UnclampWarning, match="AdamW holds other tensors") as caught:  # noqa: PT031
        for number in range(20):
            x = torch.full((4, WIDTH), 1.0 + number)
            step(lambda x=x: compiled(x).square().mean())
    assert len(caught) == 1


def test_steps_of_another_models_optimizer_are_no_sign_while_gradients_accumulate() -> None:
    layer, other = made(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            accumulate(layer, 1)
            other(torch.ones(1, 4)).sum().backward()
            optimizer.step()
    assert find_ledgers(layer)[0].updates == 0


@pytest.mark.parametrize("case", UNSEEN, ids=name)
def test_a_recorder_updates_where_nothing_else_does(case: Case, tmp_path: Path) -> None:
    layer = made()
    (ledger,) = find_ledgers(layer)
    step = case.make(layer)
    with Recorder(layer, tmp_path / "run") as recorder:
        for amax in AMAXES:
            x = torch.full((4, WIDTH), amax)
            step(lambda x=x: layer(x).square().mean())
            recorder.step()
    assert ledger.history_of(0)[:6].tolist() == [*NEWEST_FIRST, 0.0]


def test_a_recorder_updates_nothing_in_a_step_that_a_gradient_scaler_skipped(
    tmp_path: Path,
) -> None:
    layer = made()
    (ledger,) = find_ledgers(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with Recorder(layer, tmp_path / "run") as recorder:
        for number, overflows in enumerate((True, True, False)):
            scaler.scale(layer(torch.full((4, WIDTH), 1.0 + number)).sum()).backward()
            if overflows:
                assert layer.weight.grad is not None
                layer.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            recorder.step()
            assert ledger.updates == int(not overflows)
    # What the skipped steps saw waited: 3 is the largest of all three.
    assert ledger.history_of(0)[:2].tolist() == [3.0, 0.0]


def test_a_fused_optimizer_that_a_gradient_scaler_skips_updates_nothing() -> None:
    layer = made()
    (ledger,) = find_ledgers(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflows, updates in ((False, 1), (True, 1), (False, 2)):
        scaler.scale(layer(torch.ones(4, WIDTH)).sum()).backward()
        if overflows:
            assert layer.weight.grad is not None
            layer.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert ledger.updates == updates


# ---- what must not be taken for a step -----------------------------------------------------


def accumulate(layer: nn.Module, microsteps: int, *, frees: bool = False) -> None:
    for _ in range(microsteps):
        layer(torch.ones(2, WIDTH)).sum().backward()
        if frees:  # as Megatron-LM, which adds gradients up elsewhere
            layer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("frees", [False, True])
def test_gradient_accumulation_is_no_sign_of_an_unseen_step(frees: bool) -> None:
    layer = made()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            accumulate(layer, 64, frees=frees)
            if frees:
                accumulate(layer, 1)
            optimizer.step()
            optimizer.zero_grad()
    assert find_ledgers(layer)[0].updates == 3


def test_weights_edited_between_microsteps_are_no_sign() -> None:
    """Weight noise, a norm that is kept, SAM in each microstep: the step is still to come."""
    model = nn.Linear(16, 16)
    unclamp.convert(model, unclamp.Recipe())
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for _ in range(8):
                with torch.no_grad():
                    model.weight.clamp_(-1, 1)
                model(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_forwards_without_backward_between_steps_are_no_sign() -> None:
    layer = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1100):
            layer(torch.ones(1, WIDTH))


def test_a_perturbation_and_a_step_make_one_update_and_no_warning() -> None:
    """As sharpness-aware minimisation does: the weights change within a step."""
    layer = made()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            accumulate(layer, 1)
            with torch.no_grad():
                layer.weight.add_(0.01)
            accumulate(layer, 1)
            with torch.no_grad():
                layer.weight.sub_(0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert find_ledgers(layer)[0].updates == 6


# ---- what is remembered --------------------------------------------------------------------


def test_an_optimizer_that_matched_once_is_remembered_where_parameters_change_identity() -> None:
    """As FSDP2 does, which registers whole parameters in place of its shards to compute."""
    layer = made()
    (ledger,) = find_ledgers(layer)
    sharded, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert sharded is not None
    assert bias is not None
    whole = nn.Parameter(sharded.detach().clone())
    optimizer = torch.optim.SGD([sharded], lr=0.1)
    for number in range(4):
        accumulate(layer, 1)
        if number:  # unshard(); step(); reshard()
            layer._parameters.update(weight=whole, bias=nn.Parameter(bias.detach().clone()))
        optimizer.step()
        layer._parameters.update(weight=sharded, bias=bias)
    assert ledger.updates == 4


def test_optimizers_are_remembered_weakly() -> None:
    layer = made()
    (ledger,) = find_ledgers(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    accumulate(layer, 1)
    optimizer.step()
    assert ledger.clock.holders
    del optimizer
    gc.collect()
    assert not ledger.clock.holders


def test_an_optimizer_that_steps_no_more_loses_its_hold() -> None:
    layer = made()
    (ledger,) = find_ledgers(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    accumulate(layer, 1)
    optimizer.step()
    for _ in range(103):
        accumulate(layer, 1)
        unclamp.step(layer)
    assert optimizer is not None
    assert ledger.updates == 4  # its own, and those of the last three calls


# ---- unclamp.step --------------------------------------------------------------------------


def test_a_step_that_is_told_twice_is_one() -> None:
    layer = made()
    (ledger,) = find_ledgers(layer)
    unclamp.step(layer)
    assert ledger.updates == 0
    accumulate(layer, 3)
    unclamp.step(layer)
    unclamp.step(layer)
    assert ledger.updates == 1


def test_a_part_can_be_told_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    unclamp.convert(model, Recipe.uniform(Delayed(history_len=4)))
    (ledger,) = find_ledgers(model)
    with torch.no_grad():
        model[0].get_parameter("weight").copy_(torch.eye(4))
        model[0].get_parameter("bias").zero_()
    for amax in (1.0, 3.0):
        model(torch.full((2, 4), amax)).sum().backward()
        unclamp.step(model[1])
    assert ledger.history_of(0).tolist() == [0, 0, 0, 0]
    assert ledger.history_of(3).tolist() == [3, 1, 0, 0]
    unclamp.step(model)
    assert ledger.history_of(0).tolist() == [3, 0, 0, 0]
    assert ledger.history_of(3).tolist() == [3, 1, 0, 0]


def test_a_step_of_no_module_is_refused() -> None:
    with pytest.raises(unclamp.ConvertError, match=r"expected a module for unclamp\.step"):
        unclamp.step(torch.optim.SGD([torch.ones(1, requires_grad=True)]))  # pyright: ignore


FSDP2 = """
import sys, warnings
import torch, torch.distributed as dist, unclamp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from unclamp.nn import find_ledgers

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
warnings.filterwarnings("error", category=unclamp.UnclampWarning)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
unclamp.convert(model, unclamp.Recipe.uniform(unclamp.Delayed(history_len=8)))
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(6):
    model(torch.full((2, 8), 1.0 + step)).square().mean().backward()
    model.unshard()
    optimizer.step()
    optimizer.zero_grad()
    model.reshard()
(ledger,) = find_ledgers(model)
print(ledger.updates, ledger.history_of(0).tolist())
"""


def test_fsdp2_that_steps_between_unshard_and_reshard_is_followed(tmp_path: Path) -> None:
    """The optimizer holds the shards, and the model the whole parameters, at every step."""
    done = subprocess.run(
        [sys.executable, "-c", FSDP2, str(tmp_path / "store")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "6 [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]\n", done.stderr


def test_another_optimizer_may_hold_what_has_no_memory_of_its_own() -> None:
    layer, optimizer = nn.Linear(4, 3), None
    unclamp.convert(layer, unclamp.Recipe())
    layer(torch.ones(2, 4)).sum().backward()
    sparse = nn.Parameter(torch.eye(4).to_sparse())
    lazy = nn.LazyLinear(3)
    plain = nn.Parameter(torch.zeros(3))
    plain.grad = torch.ones(3)
    optimizer = torch.optim.SGD([sparse, plain, *lazy.parameters()], lr=0.1)
    optimizer.step()
    assert find_ledgers(layer)[0].updates == 0
    torch.optim.SGD([sparse, layer.weight], lr=0.1).step()
    assert find_ledgers(layer)[0].updates == 1
