"""Expert parallel: banks that are DTensors split over experts, as torchtitan's, on two ranks.

Each rank holds half of the experts and half of the tokens, and sends each token to where its
expert is. One process with all of both is the truth: bit for bit.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import unclamp
from exchange import Exchange
from ranks import run_ranks
from unclamp import Delayed, Guarded, PerBlock, PerRow, Recipe
from unclamp.nn import find_ledgers

EXPERTS, WIDTH, HIDDEN, TOKENS, STEPS, RANKS = 4, 16, 24, 48, 4, 2
HELD = EXPERTS // RANKS
LEFT_OUT, WITHOUT = 3, 2
"""The expert that gets no token, and the step at which."""
RECIPES = {
    "delayed": Recipe(),
    "rows": Recipe(weight=Guarded(granularity=PerRow(), history_len=3)),
    "blocks": Recipe(weight=Delayed(granularity=PerBlock(8, 8), history_len=3)),
}


class Experts(nn.Module):
    """Two products an expert, of this rank's part of the banks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each row's expert's output."""
        up, down = (w.to_local() if isinstance(w, DTensor) else w for w in (self.up, self.down))
        return unclamp.grouped_mm(unclamp.grouped_mm(x, up.mT, offs).relu(), down.mT, offs)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return tokens and the expert of each."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, WIDTH, generator=g) * (1 + step % 3)
    expert = torch.randint(0, EXPERTS - (step == WITHOUT), (TOKENS,), generator=g)
    return x, expert


def ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0).to(torch.int32)


def alone(model: Experts, step: int) -> Tensor:
    """Return the loss of the whole batch."""
    x, expert = batch(step)
    order = torch.argsort(expert, stable=True)
    output = model(x[order], ends(torch.bincount(expert, minlength=EXPERTS)))
    return output.square().sum() / TOKENS


def apart(model: Experts, step: int, *, rank: int) -> Tensor:
    """Return this rank's part of the loss."""
    half = TOKENS // RANKS
    x, expert = (t[rank * half : (rank + 1) * half] for t in batch(step))
    order = torch.argsort(expert, stable=True)
    ours = torch.bincount(expert, minlength=EXPERTS)
    theirs = torch.empty_like(ours)  # [from rank, expert of ours]
    dist.all_to_all_single(theirs, ours)
    sent = ours.view(RANKS, HELD).sum(1).tolist()
    received = theirs.view(RANKS, HELD).sum(1).tolist()
    came = Exchange.apply(x[order], sent, received)
    of = torch.arange(HELD).repeat(RANKS).repeat_interleave(theirs)  # the expert of what came
    by_expert = torch.argsort(of, stable=True)
    made = model(came[by_expert], ends(torch.bincount(of, minlength=HELD)))
    back = Exchange.apply(made[torch.argsort(by_expert)], received, sent)
    return back.square().sum() / TOKENS


@dataclass(kw_only=True)
class Found:
    """What a training leaves: histories, scales and whole weights, after each step."""

    histories: list[dict[str, np.ndarray]] = field(default_factory=list)
    scales: list[dict[str, np.ndarray]] = field(default_factory=list)
    weights: list[dict[str, np.ndarray]] = field(default_factory=list)


def train(model: Experts, loss_of: Any, steps: range = range(STEPS)) -> Found:
    (ledger,) = find_ledgers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = [str(site.name) for site in ledger.sites]
    found = Found()
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.histories.append({n: ledger.history_of(i).numpy() for i, n in enumerate(names)})
        found.scales.append({n: ledger.scale_of(i).numpy().copy() for i, n in enumerate(names)})
        found.weights.append({n: whole(p) for n, p in model.named_parameters()})
    return found


def whole(x: Any) -> np.ndarray:
    """Return a copy of all of a tensor; tensors themselves do not come back from a rank."""
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).numpy().copy()


def converted(recipe: str) -> Experts:
    model = Experts()
    unclamp.convert(model, RECIPES[recipe])
    return model


def sharded(recipe: str, order: str = "convert last") -> Experts:
    model, mesh = Experts(), init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))
    if order == "convert first":
        unclamp.convert(model, RECIPES[recipe])
    for name, bank in list(model.named_parameters()):
        model.register_parameter(name, nn.Parameter(distribute_tensor(bank, mesh, [Shard(0)])))
    if order == "convert last":
        unclamp.convert(model, RECIPES[recipe])
    return model


def on_rank(rank: int, recipe: str, order: str) -> Found:
    return train(sharded(recipe, order), functools.partial(apart, rank=rank))


@functools.cache
def expected(recipe: str) -> Found:
    return train(converted(recipe), alone)


def assert_same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    for step, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert list(mine) == list(theirs)
        for name in mine:
            assert np.array_equal(mine[name], theirs[name]), (step, name)


@pytest.mark.parametrize(
    ("recipe", "order"),
    [("delayed", "convert first"), *((recipe, "convert last") for recipe in RECIPES)],
)
def test_both_ranks_have_the_scales_of_one_process(recipe: str, order: str) -> None:
    truth = expected(recipe)
    for found in run_ranks(RANKS, on_rank, recipe, order):
        assert_same(found.weights, truth.weights)
        assert_same(found.histories, truth.histories)
        assert_same(found.scales, truth.scales)
    before, after = truth.histories[WITHOUT - 1 : WITHOUT + 1]
    stay = {name for name in before if np.array_equal(before[name], after[name])}
    assert stay == {name for name in before if f".{LEFT_OUT} " in name}


def saving_rank(rank: int, recipe: str, path: str) -> Any:
    model = sharded(recipe)
    train(model, functools.partial(apart, rank=rank))
    state = model.state_dict()
    saved = {key: whole(value) for key, value in state.items()}
    save(state, checkpoint_id=path)
    other = sharded(recipe)
    other.load_state_dict(state)
    third = sharded(recipe)
    loaded = third.state_dict()
    load(loaded, checkpoint_id=path)
    third.load_state_dict(loaded)
    later = range(STEPS, STEPS + 2)
    going = [train(m, functools.partial(apart, rank=rank), later) for m in (model, other, third)]
    return saved, going


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_checkpoint_holds_the_experts_of_all_ranks(recipe: str, tmp_path: Path) -> None:
    truth = converted(recipe)
    train(truth, alone)
    state = {key: whole(value) for key, value in truth.state_dict().items()}
    found = run_ranks(RANKS, saving_rank, recipe, str(tmp_path))
    alone_again = converted(recipe)
    loaded = alone_again.state_dict()
    load(loaded, checkpoint_id=str(tmp_path), no_dist=True)
    alone_again.load_state_dict(loaded)
    later = range(STEPS, STEPS + 2)
    expected_later = train(truth, alone, later)
    everyone = [going for _, several in found for going in several]
    for going in (*everyone, train(alone_again, alone, later)):
        assert_same(going.weights, expected_later.weights)
        assert_same(going.histories, expected_later.histories)
    for theirs, _ in found:
        assert_same([theirs], [state])


def cut(rank: int, recipe: str) -> str:
    """Return what the first forward says of banks whose matrices are cut in halves."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model = Experts()
    for name, bank in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(bank.detach(), mesh, [Shard(1)])))
    unclamp.convert(model, RECIPES[recipe])
    try:
        model(torch.randn(4, WIDTH), torch.tensor([1, 2, 3, 4], dtype=torch.int32))
    except unclamp.UnsupportedError as error:
        return str(error)
    except RuntimeError:  # the halves do not fit together, of which the plain model says the same
        return ""
    return ""


def test_matrices_that_are_cut_have_one_scale_each() -> None:
    assert all("split over experts" in said for said in run_ranks(RANKS, cut, "rows"))
    assert run_ranks(RANKS, cut, "delayed") == ["", ""]
