"""What training loops do around converted layers, and must not break."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from unclamp import (
    Delayed,
    Guarded,
    Recipe,
    UnsupportedError,
    convert,
    switch,
)
from unclamp.nn import find_ledgers


def made(recipe: Recipe | None = None, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    convert(model, recipe or Recipe.uniform(Guarded()))
    return model


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_optimizer_step_updates_once_a_step():
    model = made()
    optimizer = AdamW(model.parameters(), lr=torch.tensor(1e-3))
    step = torch.compile(optimizer.step, backend="eager")
    (ledger,) = find_ledgers(model)
    for number in range(3):
        model(torch.randn(2, 8)).sum().backward()
        step()
        optimizer.zero_grad()
        assert ledger.updates == number + 1
        assert not ledger.has_pending
    torch._dynamo.reset()


def test_loss_scaling_sees_an_overflow_and_backs_off():
    scales = {}
    for kind in ("plain", "fp8"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
        if kind == "fp8":
            convert(model, Recipe.uniform(Guarded()))
        optimizer = SGD(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        for _ in range(12):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(torch.randn(4, 8)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scales[kind] = scaler.get_scale()
    assert scales["plain"] < 2.0**24
    assert scales["fp8"] < 2.0**24


def test_a_warm_up_that_ends_within_backward_gives_the_plain_gradients():
    recipe = Recipe(weight=Guarded(), smooth=True, warmup_steps=1)
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    model = copy.deepcopy(plain)
    convert(model, recipe)
    for parameter in model.parameters():
        optimizer = SGD([parameter], lr=0.0)
        parameter.register_post_accumulate_grad_hook(lambda _p, o=optimizer: o.step())
    x = torch.randn(4, 8)
    for each in (plain, model):
        each(x).square().sum().backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_optimizers_within_backward_count_one_step_a_step():
    model = made(Recipe(warmup_steps=3), layers=4)
    for parameter in model.parameters():
        optimizer = SGD([parameter], lr=0.01)
        parameter.register_post_accumulate_grad_hook(lambda _p, o=optimizer: o.step())
    (ledger,) = find_ledgers(model)
    for step in range(4):
        assert ledger.is_warming == (step < 3)
        model(torch.randn(2, 8)).sum().backward()
        assert ledger.updates == step + 1


def test_models_are_copied_converted_and_switched_under_inference_mode():
    model, fresh = made(), nn.Linear(8, 8)
    x = torch.randn(2, 8)
    with torch.inference_mode():
        average = copy.deepcopy(model)
        convert(fresh, Recipe())
        switch(model, input=Delayed(history_len=64))
        assert torch.equal(average(x), made()(x))
        fresh(x)
    for each in (model, fresh):
        each(x).sum().backward()
        SGD(each.parameters(), lr=0.1).step()
        assert find_ledgers(each)[0].updates == 1


def test_an_exported_model_infers_and_refuses_to_train():
    model = made()
    x = torch.randn(4, 8)
    model(x).sum().backward()
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
    with pytest.raises(UnsupportedError, match="no backward"):
        exported(x).sum().backward()
