"""A fresh start on several ranks is that of one process, and needs no rank that may not come."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import unclamp
from ranks import run_ranks
from unclamp import Delayed, Guarded, Recipe
from unclamp.nn import find_ledgers

WIDTH, ROWS, STEPS, HISTORY = 16, 4, 5, 2
LR = 2.0**-4
FORMATS = {"input": torch.float8_e4m3fn, "weight": torch.float8_e4m3fn, "grad": torch.float8_e5m2}
LARGEST = {name: torch.finfo(dtype).max for name, dtype in FORMATS.items()}


def _net(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def _data(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(STEPS, ROWS, WIDTH, generator=generator) * 2.0**rank


# ---- ranks in plain torch ----------------------------------------------------------------------


def _cast(x: Tensor, name: str, scale: Tensor) -> Tensor:
    """Return what a tensor is after FP8, by torch's own cast."""
    scaled = (x * scale).clamp(-LARGEST[name], LARGEST[name])
    return scaled.to(FORMATS[name]).float() * (1 / scale)


def _scale(history: list[float], name: str) -> Tensor:
    return torch.tensor(LARGEST[name]) / torch.tensor(max(history[-HISTORY:]))


def _by_hand(ranks: int) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Train two layers on several ranks in one process, with equations and no code of unclamp.

    Returns the scales after each step, by layer and operand, and the weights in the end.
    """
    weights = [weight.detach().clone() for weight in _net().parameters()]
    data = [_data(rank) for rank in range(ranks)]
    histories: dict[str, list[float]] = {}
    scales: dict[str, Tensor] = {}
    after = []
    for step in range(STEPS):
        seen: dict[str, float] = {}

        def cast(tensors: list[Tensor], layer: int, name: str, seen: Any = seen) -> list[Tensor]:
            key = f"{layer} {name}"
            seen[key] = max(float(x.abs().max()) for x in tensors)
            scale = scales[key] if key in scales else _scale([seen[key]], name)
            return [_cast(x, name, scale) for x in tensors]

        kept, x = [], [own[step] for own in data]
        for layer, weight in enumerate(weights):
            x_hat = cast(x, layer, "input")
            (w_hat,) = cast([weight], layer, "weight")
            kept.append((x_hat, w_hat))
            x = [F.linear(each, w_hat) for each in x_hat]
        dy = [2 * each for each in x]  # of the sum of squares
        for layer in (1, 0):
            x_hat, w_hat = kept[layer]
            dy_hat = cast(dy, layer, "grad")
            grads = [d.t() @ each for d, each in zip(dy_hat, x_hat, strict=True)]
            dy = [d @ w_hat for d in dy_hat]
            weights[layer] = weights[layer] - LR * (sum(grads[1:], grads[0]) / ranks)
        for key, amax in seen.items():
            histories.setdefault(key, []).append(amax)
            scales[key] = _scale(histories[key], key.split()[1])
        after.append({key: float(scale) for key, scale in scales.items()})
    return after, weights


def _train(rank: int, kind: str, ranks: int) -> tuple[list[list[float]], list[Any], list[Any]]:
    net = _net()
    unclamp.convert(net, Recipe.uniform(Delayed(history_len=HISTORY)))
    if kind == "ddp":
        model: nn.Module = DistributedDataParallel(net)
    else:
        for layer in net:
            fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
        fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
        model = net
    optimizer, (ledger,) = torch.optim.SGD(model.parameters(), lr=LR), find_ledgers(model)
    scales = []
    for x in _data(rank):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(ledger.scale.tolist())
    whole = [w.full_tensor() if isinstance(w, DTensor) else w for w in net.parameters()]
    return scales, [w.detach().tolist() for w in whole], ledger.amax_history.tolist()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_training_is_that_of_ranks_by_hand(kind: str) -> None:
    wanted, weights = _by_hand(2)
    for scales, own, _ in run_ranks(2, _train, kind, 2):
        keys = [f"{layer} {name}" for layer in range(2) for name in ("input", "weight", "grad")]
        by_hand = torch.tensor([[after[key] for key in keys] for after in wanted])
        assert torch.equal(torch.tensor(scales)[0], by_hand[0])
        torch.testing.assert_close(torch.tensor(scales), by_hand, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.tensor(own), torch.stack(weights), rtol=1e-5, atol=1e-6)


# ---- equal tensors -----------------------------------------------------------------------------


def _codes(rank: int, scaling: Any, given: bool) -> tuple[Any, ...]:
    """Return what a layer made of its first batch, and its state after it.

    The weight is one power of two times the identity, so that an output is its input's value.
    """
    alone = dist.get_world_size() == 1
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.eye_(layer.weight)
    unclamp.convert(layer, Recipe.uniform(scaling), group=dist.group.WORLD if given else None)
    parts = [_data(r)[0] for r in (range(2) if alone else [rank])]
    x = torch.cat(parts).requires_grad_()
    y = layer(x)
    y.backward(torch.cat([part * 3 for part in parts]))
    assert x.grad is not None
    optimizer, (ledger,) = torch.optim.SGD(layer.parameters(), lr=0.0), find_ledgers(layer)
    optimizer.step()
    values = [*y.detach().tolist()], [*x.grad.tolist()]
    return *values, ledger.scale.tolist(), ledger.amax_history.tolist(), ledger.updates


@pytest.mark.parametrize(
    "scaling", [Delayed(), Delayed(margin=2, power_of_two=True), Guarded()], ids=repr
)
def test_equal_tensors_get_equal_codes_scales_and_histories(scaling: Any) -> None:
    (one,) = run_ranks(1, _codes, scaling, False)
    several = run_ranks(2, _codes, scaling, True)
    for part in (0, 1):  # outputs, and gradients of inputs
        assert [*several[0][part], *several[1][part]] == one[part]
    assert several[0][2:] == several[1][2:] == one[2:]


# ---- who may not come --------------------------------------------------------------------------


class _Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.head(self.experts[expert](x))


def _apart(rank: int, kind: str) -> Any:
    """Ranks take different ways through a model from the first step on."""
    model = _Routed() if kind == "experts" else _net(3)
    recipe = Recipe.uniform(Delayed(history_len=HISTORY))
    unclamp.convert(model, recipe, group=dist.group.WORLD if kind == "experts" else None)
    wrapped: nn.Module = model
    if kind != "experts":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer, (ledger,) = torch.optim.SGD(model.parameters(), lr=0.0), find_ledgers(model)
    states = []
    for x in _data(rank):
        if kind == "evaluation" and rank == 0:
            with torch.no_grad():
                model(x)
            model.eval()(x)
            model.train()
        y = model(x, rank) if isinstance(model, _Routed) else wrapped(x)
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append((ledger.scale.tolist(), ledger.amax_history.tolist()))
    return states


@pytest.mark.parametrize("kind", ["experts", "evaluation"])
def test_nobody_waits_for_a_rank_that_does_not_come(kind: str) -> None:
    first, second = run_ranks(2, _apart, kind, patience_s=60)
    assert first == second
    assert all(scale > 0 for scale in first[-1][0])


def _warmed(rank: int) -> Any:
    """With a warm-up ranks meet in updates only: a forward of one rank waits for none."""
    model = _net()
    scaling = Delayed(history_len=HISTORY)
    recipe = Recipe(input=scaling, weight=scaling, grad_output=scaling, warmup_steps=1)
    unclamp.convert(model, recipe, group=dist.group.WORLD)
    optimizer, (ledger,) = torch.optim.SGD(model.parameters(), lr=0.0), find_ledgers(model)
    for step, x in enumerate(_data(rank)):
        if rank == 0 or step:
            model(x).square().sum().backward()
        optimizer.step()
    return ledger.scale.tolist(), ledger.amax_history.tolist()


def test_a_warm_up_needs_no_first_scale() -> None:
    first, second = run_ranks(2, _warmed, patience_s=60)
    assert first == second
