"""Converted layers among the rest of PyTorch: what training loops do, and must not break."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from unclamp import (
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerRow,
    Recipe,
    RecipeError,
    UnsupportedError,
    convert,
    first_and_last,
    switch,
)
from unclamp.formats import E4M3FN
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat
from unclamp.numerics.cast import quantize_plain


def made(recipe: Recipe | None = None, layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    convert(model, recipe or Recipe.uniform(Guarded()))
    return model


def reachable_codes(output: Tensor) -> list[Tensor]:
    """Return float8 tensors that graph nodes hold outside of what checkpointing manages."""
    found, nodes, seen = [], [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        values = list(getattr(node, "__dict__", {}).values())
        while values:
            value = values.pop()
            if (
                isinstance(value, Tensor)
                and value.element_size() == 1
                and value.is_floating_point()
            ):
                found.append(value)
            elif isinstance(value, dict):
                values += value.values()
            elif isinstance(value, tuple | list):
                values += value
        nodes += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("granularity", [None, PerRow()])
def test_nothing_of_the_codes_stays_where_checkpointing_cannot_free_it(granularity):
    scaling = Dynamic() if granularity is None else Dynamic(granularity=granularity)
    model = made(Recipe.uniform(scaling))
    y = checkpoint(model, torch.randn(4, 8, requires_grad=True), use_reentrant=False)
    assert isinstance(y, Tensor)
    assert reachable_codes(y) == []
    assert reachable_codes(model(torch.randn(4, 8))) == []


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_reach_scaling_state(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = nn.Linear(8, 8, dtype=torch.float32)
        convert(model, Recipe(accumulate="hopper"))
        model(torch.randn(4, 8, dtype=torch.float32)).sum().backward()
        SGD(model.parameters(), lr=0.1).step()
        (ledger,) = find_ledgers(model)
        for tensor in (ledger.scale, ledger.amax_history, ledger.block_amax):
            assert tensor.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


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


def test_a_switch_to_rows_between_forward_and_backward_measures_no_wrong_row():
    model = made(Recipe.uniform(Dynamic()), layers=1)
    y = model(torch.randn(4, 8, requires_grad=True))
    switch(model, weight=Delayed(granularity=PerRow()))
    y.sum().backward()
    SGD(model.parameters(), lr=0.0).step()
    assert (find_ledgers(model)[0].history_of(1) == 0).all()


def test_a_second_convert_gives_the_whole_model_one_warm_up():
    model = made(Recipe(), layers=2)
    convert(model, Recipe(warmup_steps=2))  # nothing left to convert: nothing changes
    assert not find_ledgers(model)[0].is_warming
    model.append(nn.Linear(8, 8))
    convert(model, Recipe(warmup_steps=2))
    assert [layer.sites.counts_only for layer in model] == [True] * 3  # pyright: ignore


def test_no_number_is_copied_to_the_device_by_a_cast():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, scale = torch.randn(8, 8), torch.tensor(3.0)
    for settings in ({}, {"power_of_two": True}, {"granularity": PerRow()}, {"guard": True}):
        with Names() as names:
            quantize_plain(x, E4M3FN, None if "granularity" in settings else scale, **settings)  # pyright: ignore[reportArgumentType]
        assert not [name for name in names.seen if "lift_fresh" in name or "item" in name]


def test_first_and_last_match_themselves_and_nothing_below():
    inner = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8))
    report = convert(model, Recipe(), skip=first_and_last(model))
    assert list(report.converted) == ["1.0", "1.1"]


def test_a_scaling_is_no_recipe_and_the_error_says_what_is():
    with pytest.raises(RecipeError, match=r"Recipe\.uniform"):
        convert(nn.Linear(8, 8), Dynamic())  # pyright: ignore[reportArgumentType]


def test_a_frozen_high_precision_weight_needs_no_cast_of_the_gradient():
    recipe = Recipe(weight=HighPrecision(), grad_output=HighPrecision())
    model = made(recipe, layers=1)
    model.requires_grad_(False)
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    assert find_ledgers(model)[0].pending[:, Stat.CASTS].tolist() == [1, 0, 0]
