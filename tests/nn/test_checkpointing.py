"""Activation checkpointing counts each cast once, changes no bit and frees the codes."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from unclamp import (
    Delayed,
    Dynamic,
    PerRow,
    Recipe,
    convert,
)
from unclamp.nn import Ledger, find_ledgers
from unclamp.numerics import Stat

WEIGHT = 1


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.use_reentrant))


def trained(use_reentrant: bool | None, frozen: bool) -> tuple[list[Tensor], nn.Module]:
    """Return all gradients of three steps, and the model with a fourth backward pending."""
    model = Checkpointed(use_reentrant)
    model.block[0].requires_grad_(not frozen)
    convert(model, Recipe.uniform(Delayed(history_len=2)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    grads = []
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(5, 4).mul_(step + 1).requires_grad_()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        grads += [t.grad.clone() for t in (x, *model.parameters()) if t.grad is not None]
        if step < 3:
            optimizer.step()
    return grads, model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_once_and_changes_no_gradient(use_reentrant, frozen):
    grads, model = trained(use_reentrant, frozen)
    expected, plain = trained(None, frozen)
    ledger, other = find_ledgers(model)[0], find_ledgers(plain)[0]
    assert len(grads) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    assert ledger.updates == other.updates == 3
    assert ledger.pending[WEIGHT, Stat.CASTS] == 1
    assert ledger.pending[:, Stat.CASTS].tolist() == [1] * 9
    for name in ("pending", "scale", "amax_history"):
        assert torch.equal(getattr(ledger, name), getattr(other, name))


def test_checkpointing_a_frozen_bottom_layer_counts_it_once():
    model = Checkpointed(use_reentrant=False)
    model.block[0].requires_grad_(False)
    convert(model, Recipe())
    model(torch.randn(5, 4)).sum().backward()
    casts = find_ledgers(model)[0].pending[:, Stat.CASTS].tolist()
    assert casts == [1, 1, 0, 1, 1, 1, 1, 1, 1]


def state(ledger: Ledger) -> list[Tensor]:
    return [ledger.amax_history.clone(), ledger.scale.clone(), ledger.pending.clone()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def blocks(scaling: Delayed | Dynamic) -> nn.ModuleList:
    torch.manual_seed(3)
    model = nn.ModuleList(
        nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.GELU(), nn.Linear(9, 6))
        for _ in range(2)
    )
    convert(model, Recipe.uniform(scaling))
    return model


def gradients(model: nn.ModuleList, call: Callable[..., Tensor]) -> list[Tensor]:
    """Train three steps of two microsteps; return every gradient of every microstep."""
    optimizer = SGD(model.parameters(), lr=0.1)
    grads = []
    torch.manual_seed(5)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            leaf = x = torch.randn(5, 6, requires_grad=True)
            for block in model:
                x = call(block, x)
            x.square().sum().backward()
            held = [leaf.grad, *(p.grad for p in model.parameters())]
            grads += [g.clone() for g in held if g is not None]
        optimizer.step()
    return grads


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("scaling", [Delayed(history_len=2), Dynamic()])
def test_checkpointing_over_steps_microsteps_and_dropout_changes_no_bit(
    scaling: Delayed | Dynamic, use_reentrant: bool
) -> None:
    seen: list[Tensor] = []
    plain, model = blocks(scaling), blocks(scaling)
    for ledger in (*find_ledgers(plain), *find_ledgers(model)):
        ledger.subscribe(lambda update: seen.append(update.stats))
    expected = gradients(plain, lambda block, x: block(x))
    got = gradients(
        model, lambda block, x: cast(Tensor, checkpoint(block, x, use_reentrant=use_reentrant))
    )
    assert len(got) == 54
    assert same(got, expected)
    assert same(state(find_ledgers(model)[0]), state(find_ledgers(plain)[0]))
    assert len(seen) == 6
    assert same(seen[:3], seen[3:])
    assert all((stats[:, Stat.CASTS] == 2).all() for stats in seen)


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
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    convert(model, Recipe.uniform(scaling))
    y = checkpoint(model, torch.randn(4, 8, requires_grad=True), use_reentrant=False)
    assert isinstance(y, Tensor)
    assert reachable_codes(y) == []
    assert reachable_codes(model(torch.randn(4, 8))) == []


def save_products(ctx: object, function: object, *args: object, **kwargs: object):
    saves = function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


def selectively(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block as torchtitan does by default: each operation of it is counted."""
    made = checkpoint(
        block,
        x,
        use_reentrant=False,
        early_stop=False,
        context_fn=lambda: create_selective_checkpoint_contexts(save_products),
    )
    assert isinstance(made, Tensor)
    return made


def test_selective_checkpointing_changes_no_gradient():
    """torch refuses an operation that the second run of a forward has and the first had not."""
    found = []
    for run in (selectively, lambda block, x: block(x)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        convert(model, Recipe.uniform(Delayed(history_len=2)))
        optimizer = SGD(model.parameters(), lr=0.1)
        for step in range(4):
            x = (torch.randn(4, 16) * (step + 1)).requires_grad_()
            run(model, x).square().sum().backward()
            optimizer.step()
            found += [t.grad.clone() for t in (x, *model.parameters()) if t.grad is not None]
            optimizer.zero_grad()
    half = len(found) // 2
    assert half == 4 * 5
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
