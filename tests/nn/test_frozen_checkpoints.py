"""A frozen product in a checkpoint counts once a step, whether backward runs it again or not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import Delayed, Recipe
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

LENGTH, WIDTH = 4, 16
OVERFLOWS = 464
"""Above it, rounding to E4M3 lands above its largest value, 448."""
no_gradient = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def built() -> tuple[nn.Linear, nn.Linear, SGD]:
    """Return a frozen base, an adapter, and the adapter's optimizer."""
    torch.manual_seed(0)
    base, adapter = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    unclamp.convert(nn.ModuleList([base, adapter]), Recipe.uniform(Delayed(history_len=LENGTH)))
    base.requires_grad_(False)
    return base, adapter, SGD(adapter.parameters(), lr=1e-3)


def casts(layer: Any) -> int:
    return int(layer.sites.pending[0, Stat.CASTS])


@no_gradient
def test_one_that_backward_does_not_run_again_counts_in_training_mode() -> None:
    base, adapter, optimizer = built()
    (ledger,) = find_ledgers(base)
    counts: list[int] = []
    ledger.subscribe(lambda update: counts.append(int(update.stats[0, Stat.SATURATED])))
    truth, past = [], []
    for step in range(6):
        x = torch.randn(16, WIDTH) * (1 + 3 * step)
        scale = 448 / max(past[-LENGTH:] or [float(x.abs().max())])
        truth.append(int(((x * scale).abs() > OVERFLOWS).sum()))
        past.append(float(x.abs().max()))
        hidden: Any = checkpoint(base, x, use_reentrant=True)
        adapter(hidden).square().mean().backward()
        optimizer.step()
    assert counts == truth
    assert sum(truth) > 0
    assert unclamp.evaluation_counts(base).sites == ()


@no_gradient
def test_in_evaluation_mode_it_counts_as_an_evaluation() -> None:
    base, adapter, _ = built()
    base.eval()
    hidden: Any = checkpoint(base, torch.ones(2, WIDTH), use_reentrant=True)
    adapter(hidden).sum().backward()
    first = unclamp.evaluation_counts(base).sites[0]
    assert (casts(base), first.casts, first.elements) == (0, 1, 2 * WIDTH)


def both(base: nn.Module, adapter: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: adapter(x) + base(y)


def nested(base: nn.Module, adapter: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, y: Tensor) -> Tensor:
        again: Any = checkpoint(both(base, adapter), x, y, use_reentrant=False)
        return again

    return run


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("made", [both, nested], ids=["one", "nested"])
def test_one_without_a_gradient_beside_one_that_has_one_counts_once(
    made: Any, use_reentrant: bool, training: bool
) -> None:
    base, adapter, _ = built()
    base.train(training)
    x, y = torch.ones(2, WIDTH, requires_grad=True), torch.ones(2, WIDTH)
    out: Any = checkpoint(made(base, adapter), x, y, use_reentrant=use_reentrant)
    out.sum().backward()
    assert (casts(base), casts(adapter)) == (1, 1)


@no_gradient
def test_a_forward_without_gradients_of_what_trains_in_its_checkpoint_counts_nothing() -> None:
    base, adapter, optimizer = built()
    seen = -1
    for _ in range(3):
        with torch.no_grad():  # as for the reference of a policy
            checkpoint(base, torch.full((2, WIDTH), 64.0), use_reentrant=True)
        seen = casts(base)
        out: Any = checkpoint(
            base, adapter(torch.ones(2, WIDTH)).detach().requires_grad_(), use_reentrant=True
        )
        (out.sum() + adapter(torch.ones(2, WIDTH)).sum()).backward()
        optimizer.step()
    assert seen == 0
