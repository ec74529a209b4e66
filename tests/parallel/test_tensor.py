"""Tensor parallelism: layers compute on their rank's parts, with the single process's numbers."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import unclamp
from ranks import run_ranks
from unclamp import Dynamic, PerRow, Recipe, Static

MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
STEPS = 4
SHARED = Dynamic(shared=True)
SHARED_ROWS = Dynamic(PerRow(), shared=True)
EXACT = {"static": Static(8.0), "shared": SHARED, "shared rows": SHARED_ROWS}
"""Whose scales are the single process's without another word."""


class Mlp(nn.Module):
    """Norm, up, down: what is parallel in a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.head(x + self.down(F.relu(self.up(x))))
        return x.clone()  # FSDP2 warns where a module returns a view, such as a DTensor's part


def _model() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def _batch(step: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(step)
    return torch.randn(4, 8, 32, generator=made), torch.randint(16, (4, 8), generator=made)


def _plan(how: str) -> dict[str, Any]:
    if how == "tp":
        return {
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
    if how == "tp, DTensors between":
        return {
            "up": ColwiseParallel(use_local_output=False),
            "down": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate(), use_local_output=True),
        }
    if how == "sp":
        return {
            "norm": SequenceParallel(use_local_output=False),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
            "": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),)),
        }
    assert how == "loss parallel"
    return {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(use_local_output=False),
    }


def _apply(model: nn.Module, mesh: Any, how: str) -> None:
    plan = _plan(how)
    whole = plan.pop("", None)
    parallelize_module(model, mesh, plan)
    if whole is not None:
        parallelize_module(model, mesh, whole)


def _train(model: nn.Module, *, how: str = "", steps: int = STEPS, part: Any = None) -> list[float]:
    """Return the losses of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        x, y = _batch(step)
        if part is not None:
            x, y = x[part], y[part]
        if how == "loss parallel":
            with loss_parallel():
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                loss.backward()
            assert isinstance(loss, DTensor)
            loss = loss.full_tensor()
        else:
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _single(scaling: Any, *, steps: int = STEPS) -> tuple[list[float], Tensor]:
    model = _model()
    unclamp.convert(model, Recipe.uniform(scaling))
    losses = _train(model, steps=steps)
    return losses, model.down.weight.detach()


# ---- training: TP = SP = the single process ----------------------------------------------------


Trained = tuple[list[float], Any]


def _each_way(rank: int, ways: list[str], scaling: Any, order: str) -> list[Trained]:
    mesh = init_device_mesh("cpu", (2,))
    return [_parallel(mesh, how, scaling, order) for how in ways]


def _parallel(mesh: Any, how: str, scaling: Any, order: str) -> Trained:
    model = _model()
    if order == "convert first":
        unclamp.convert(model, Recipe.uniform(scaling))
    _apply(model, mesh, how)
    if order == "convert last":
        unclamp.convert(model, Recipe.uniform(scaling))
    losses = _train(model, how=how)
    weight: Any = model.down.weight
    return losses, weight.full_tensor().tolist()


@pytest.mark.parametrize("order", ["convert first", "convert last"])
@pytest.mark.parametrize("scaling", EXACT)
def test_tensor_and_sequence_parallel_train_like_one_process(order: str, scaling: str) -> None:
    losses, weight = _single(EXACT[scaling])
    ways = ["tp", "tp, DTensors between", "sp", "loss parallel"]
    for rank in run_ranks(2, _each_way, ways, EXACT[scaling], order):
        for seen, made in rank:
            torch.testing.assert_close(seen, losses, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.tensor(made), weight, rtol=1e-5, atol=1e-6)


def test_a_part_has_a_scale_of_its_own_unless_it_is_shared() -> None:
    losses, _ = _single(Dynamic())
    [(seen, _)] = run_ranks(2, _each_way, ["tp"], Dynamic(), "convert first")[0]
    assert max(abs(a - b) for a, b in zip(seen, losses, strict=True)) > 1e-5


def _fsdp_and_tp(rank: int, scaling: Any, order: str) -> Trained:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = _model()
    if order == "convert first":
        unclamp.convert(model, Recipe.uniform(scaling))
    _apply(model, mesh["tp"], "tp")
    fully_shard(model, mesh=mesh["dp"])
    if order == "convert last":
        unclamp.convert(model, Recipe.uniform(scaling))
    half = mesh["dp"].get_local_rank()
    losses = torch.tensor(_train(model, part=slice(2 * half, 2 * half + 2)))
    dist.all_reduce(losses, group=mesh["dp"].get_group())
    weight: Any = model.down.weight
    return (losses / 2).tolist(), weight.full_tensor().tolist()


@pytest.mark.parametrize("order", ["convert first", "convert last"])
@pytest.mark.parametrize("scaling", ["shared", "shared rows"])
def test_fsdp_with_tensor_parallel_trains_like_one_process(order: str, scaling: str) -> None:
    losses, weight = _single(EXACT[scaling])
    for seen, made in run_ranks(4, _fsdp_and_tp, EXACT[scaling], order):
        # A rank's loss is twice its part of the mean, which a scale of the gradient's own undoes.
        torch.testing.assert_close(seen, losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.tensor(made), weight, rtol=1e-5, atol=1e-6)


# ---- one layer against plain torch -------------------------------------------------------------


def _hat(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Return a tensor after a cast in plain torch, by its own scale or a given one."""
    scale = MAX[dtype] / x.abs().max() if scale is None else scale
    codes = (x * scale).clamp(-MAX[dtype], MAX[dtype]).to(dtype)
    return codes.to(torch.float32) * scale.reciprocal()


def _layer(rank: int, how: str) -> dict[str, Any]:
    """Return what a layer makes on this rank, and what plain torch makes of its parts."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    layer = nn.Linear(32, 16)
    with torch.no_grad():
        layer.weight[3, 5], layer.weight[12, 20] = 3.0, -4.0  # amaxes of parts differ
    x, dy = torch.randn(6, 32) * torch.linspace(1, 3, 32), torch.randn(6, 16)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    unclamp.convert(layer, Recipe.uniform(SHARED))
    style = ColwiseParallel() if how == "colwise" else RowwiseParallel()
    parallelize_module(layer, mesh, style)
    given = x.clone() if how == "colwise" else x.chunk(2, 1)[rank].clone()
    given.requires_grad_()
    made = layer(given)
    made.backward(dy.chunk(2, 1)[rank].clone() if how == "colwise" else dy)

    scales = [MAX[t] / z.abs().max() for t, z in zip(
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2), (x, weight, dy), strict=True
    )]  # fmt: skip
    w_part = weight.chunk(2, 0 if how == "colwise" else 1)[rank]
    x_part = x if how == "colwise" else x.chunk(2, 1)[rank]
    dy_part = dy.chunk(2, 1)[rank] if how == "colwise" else dy
    x_hat, w_hat = (
        _hat(t.contiguous(), torch.float8_e4m3fn, s)
        for t, s in ((x_part, scales[0]), (w_part, scales[1]))
    )
    dy_hat = _hat(dy_part.contiguous(), torch.float8_e5m2, scales[2])
    output, grad_x = x_hat @ w_hat.T, dy_hat @ w_hat
    if how == "colwise":
        output = output + bias.chunk(2)[rank]
        dist.all_reduce(grad_x)
    else:
        dist.all_reduce(output)
        output = output + bias
    w: Any = layer.weight
    b: Any = layer.bias
    return {
        "made": [t.tolist() for t in (made, given.grad, w.grad.to_local(), b.grad.to_local())],
        "wanted": [t.tolist() for t in (output, grad_x, dy_hat.T @ x_hat, dy_part.sum(0))],
        "placements": [w.grad.placements == w.placements, b.grad.placements == b.placements],
    }


@pytest.mark.parametrize("how", ["colwise", "rowwise"])
def test_a_layer_is_the_hand_sharded_computation(how: str) -> None:
    for seen in run_ranks(2, _layer, how):
        assert seen["placements"] == [True, True]
        for made, wanted in zip(seen["made"], seen["wanted"], strict=True):
            # The codes are equal; what is left is the order in which a GEMM adds.
            torch.testing.assert_close(
                torch.tensor(made), torch.tensor(wanted), rtol=1e-6, atol=1e-5
            )
