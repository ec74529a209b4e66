import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import unclamp
from exchange import Exchange
from ranks import run_ranks
from unclamp.nn.convert import find_ledgers

WIDTH, EXPERTS, TOKENS, STEPS, RANKS = 16, 4, 48, 4, 2
LEFT_OUT, WITHOUT = 3, 2
"""The expert that gets no token, and the step at which."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is left of a training, by site and by expert; histories after each step."""

    histories: list[dict[str, np.ndarray]]
    scales: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


class Mixture(nn.Module):
    """A router that is not trained, and those experts that one rank holds."""

    def __init__(self, held: range, *, calls_all: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False).requires_grad_(False)
        every = [nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)]
        self.experts = nn.ModuleDict({str(i): every[i] for i in held})
        self.calls_all = calls_all

    def choose(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the expert of each token, and its weight."""
        logits = self.router(x)
        if step == WITHOUT:
            logits[:, LEFT_OUT] = -torch.inf
        weight, expert = logits.softmax(1).max(1)
        return expert, weight

    def apply_to(self, expert: int, x: Tensor) -> Tensor:
        """Return what an expert makes of its tokens; without any it may not be called."""
        return self.experts[str(expert)](x) if len(x) or self.calls_all else x


def batch(step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randn(TOKENS, WIDTH, generator=g) * (1 + step % 3)


def run_alone(model: Mixture, step: int) -> Tensor:
    """Return the loss of the whole batch."""
    x = batch(step)
    expert, weight = model.choose(x, step)
    output = torch.zeros_like(x)
    for i in range(EXPERTS):
        own = expert == i
        output = output.index_put((own,), model.apply_to(i, x[own]))
    return (output * weight.unsqueeze(1)).square().sum() / TOKENS


def run_shared(model: Mixture, step: int, rank: int) -> Tensor:
    """Return this rank's part of the loss: half the tokens, each sent to where its expert is."""
    half, a_rank = TOKENS // RANKS, EXPERTS // RANKS
    x = batch(step)[rank * half : (rank + 1) * half]
    expert, weight = model.choose(x, step)
    order = torch.argsort(expert, stable=True)
    ours = torch.bincount(expert, minlength=EXPERTS)
    theirs = torch.empty_like(ours)  # [from rank, expert of ours]
    dist.all_to_all_single(theirs, ours)
    sent = ours.view(RANKS, a_rank).sum(1).tolist()
    received = theirs.view(RANKS, a_rank).sum(1).tolist()
    came = Exchange.apply(x[order], sent, received)
    parts = came.split(theirs.tolist())  # by rank, and by expert within
    done: list[Tensor] = [came] * len(parts)
    for i in range(a_rank):
        mine = [parts[r * a_rank + i] for r in range(RANKS)]
        made = model.apply_to(rank * a_rank + i, torch.cat(mine)).split([len(p) for p in mine])
        for r in range(RANKS):
            done[r * a_rank + i] = made[r]
    back = Exchange.apply(torch.cat(done), received, sent)
    output = torch.zeros_like(x).index_put((order,), back)
    return (output * weight.unsqueeze(1)).square().sum() / TOKENS


def train(model: Mixture, loss_of: Any) -> Found:
    (ledger,) = find_ledgers(model)
    heard: list[Tensor] = []
    ledger.subscribe(lambda update: heard.append(update.stats.clone()))
    optimizer = torch.optim.SGD(model.experts.parameters(), lr=0.1)
    names = [str(site.name) for site in ledger.sites]
    histories = []
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        histories.append({n: ledger.history_of(i).numpy() for i, n in enumerate(names)})
    stats = torch.stack(heard)
    return Found(
        histories=histories,
        scales={n: ledger.scale_of(i).numpy() for i, n in enumerate(names)},
        counts={n: stats[:, i].numpy() for i, n in enumerate(names)},
        weights={n: p.detach().numpy() for n, p in model.experts.named_parameters()},
    )


def converted(held: range, *, calls_all: bool) -> Mixture:
    model = Mixture(held, calls_all=calls_all)
    # One rank holds each expert: this one.
    unclamp.convert(model, unclamp.Recipe(), skip=["router"], group={"experts.*": ()})
    return model


def on_rank(rank: int, calls_all: bool) -> Found:
    a_rank = EXPERTS // RANKS
    model = converted(range(rank * a_rank, (rank + 1) * a_rank), calls_all=calls_all)
    return train(model, functools.partial(run_shared, rank=rank))


@functools.cache
def shared(calls_all: bool) -> list[Found]:
    return run_ranks(RANKS, on_rank, calls_all)


@pytest.mark.parametrize("calls_all", [True, False], ids=["called without tokens", "left out"])
def test_experts_on_two_ranks_see_what_those_of_one_process_see(calls_all: bool):
    truth = train(converted(range(EXPERTS), calls_all=calls_all), run_alone)
    ranks = shared(calls_all)
    assert sorted(n for rank in ranks for n in rank.scales) == sorted(truth.scales)
    for rank in ranks:
        for name, scale in rank.scales.items():
            np.testing.assert_array_equal(scale, truth.scales[name], err_msg=name)
            np.testing.assert_array_equal(rank.counts[name], truth.counts[name], err_msg=name)
            for ours, theirs in zip(rank.histories, truth.histories, strict=True):
                np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        for name, weight in rank.weights.items():
            np.testing.assert_array_equal(weight, truth.weights[name], err_msg=name)


@pytest.mark.parametrize("calls_all", [True, False], ids=["called without tokens", "left out"])
def test_an_expert_without_tokens_keeps_its_state(calls_all: bool):
    holder = shared(calls_all)[-1]
    before, after = holder.histories[WITHOUT - 1 : WITHOUT + 1]
    for role in ("input", "grad_output"):
        np.testing.assert_array_equal(
            before[f"experts.{LEFT_OUT} {role}"], after[f"experts.{LEFT_OUT} {role}"]
        )
        other = f"experts.{LEFT_OUT - 1} {role}"
        assert not np.array_equal(before[other], after[other])


def _decibel(made: Tensor, wanted: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (made - wanted).square().sum()))


def test_a_mixture_has_the_signal_to_noise_that_torchao_asks_of_its_own() -> None:
    """Rows of their own scales, all operands in E4M3: 26.5, 29 and 21 dB."""
    rows = unclamp.Dynamic(unclamp.PerRow())
    recipe = unclamp.Recipe(input=rows, weight=rows, grad_output=rows, grad_output_format="e4m3fn")
    dy = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(1))
    found = []
    for is_converted in (False, True):
        model = Mixture(range(EXPERTS), calls_all=True)
        if is_converted:
            unclamp.convert(model, recipe, skip=["router"])
        x = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        expert = torch.arange(512) % EXPERTS
        parts = [model.apply_to(i, x[expert == i]) for i in range(EXPERTS)]
        output = torch.cat(parts)
        output.backward(dy)
        assert x.grad is not None
        weights = [p.grad.flatten() for p in model.experts.parameters() if p.grad is not None]
        found.append((output.detach(), x.grad, torch.cat(weights)))
    output, gradient, weights = (_decibel(b, a) for a, b in zip(*found, strict=True))
    assert output >= 26.5
    assert gradient >= 29
    assert weights >= 21
