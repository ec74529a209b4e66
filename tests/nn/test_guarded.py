"""Guarded scaling: delayed's scale, and never a clamped element."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclamp import Delayed, Dynamic, Guarded, PerRow, Recipe, convert
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

INPUT, WEIGHT, GRAD_OUTPUT = 0, 1, 2


def made(scaling, k: int = 8, n: int = 6) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(k, n)
    convert(layer, Recipe.uniform(scaling))
    return layer, torch.optim.SGD(layer.parameters(), lr=0.0)


def seen(model: nn.Module) -> list[Tensor]:
    stats: list[Tensor] = []
    find_ledgers(model)[0].subscribe(lambda update: stats.append(update.stats))
    return stats


def step(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    optimizer.step()
    return y.detach()


amaxes = st.lists(st.floats(2.0**-100, 2.0**100), min_size=2, max_size=8)


@run(max_examples=60)
@given(amaxes=amaxes, history_len=st.integers(1, 4), margin=st.integers(0, 3), p2=st.booleans())
def test_no_finite_element_is_ever_clamped(amaxes, history_len, margin, p2):
    scaling = Guarded(history_len=history_len, margin=margin, power_of_two=p2)
    layer, optimizer = made(scaling)
    stats = seen(layer)
    for amax in amaxes:
        x = torch.randn(5, 8)
        step(layer, optimizer, x / x.abs().max() * amax)
    assert len(stats) == len(amaxes)
    assert all((each[:, Stat.SATURATED] == 0).all() for each in stats)


def test_delayed_clamps_where_guarded_casts_again():
    counts = {}
    for scaling in (Delayed(), Guarded()):
        layer, optimizer = made(scaling)
        stats = seen(layer)
        for amax in (1.0, 1.0, 50.0, 1.0):
            step(layer, optimizer, torch.full((5, 8), amax))
        counts[scaling.kind] = [
            [int(each[INPUT, field]) for each in stats] for field in (Stat.SATURATED, Stat.RECAST)
        ]
    assert counts == {"delayed": [[0, 0, 40, 0], [0] * 4], "guarded": [[0] * 4, [0, 0, 1, 0]]}


def test_the_history_learns_the_true_amax_and_the_next_cast_is_predicted():
    layer, optimizer = made(Guarded(history_len=2, margin=0))
    (ledger,) = find_ledgers(layer)
    stats = seen(layer)
    for amax in (1.0, 50.0, 50.0):
        step(layer, optimizer, torch.full((5, 8), amax))
    assert ledger.history_of(INPUT).tolist() == [50, 50]
    assert ledger.scale[INPUT] == torch.tensor(448 / 50)
    assert [int(each[INPUT, Stat.RECAST]) for each in stats] == [0, 1, 0]


def test_a_step_that_is_cast_again_gives_what_dynamic_gives():
    outputs = []
    for scaling in (Guarded(), Dynamic()):
        layer, optimizer = made(scaling)
        step(layer, optimizer, torch.ones(5, 8))
        torch.manual_seed(1)
        outputs.append(step(layer, optimizer, torch.randn(5, 8) * 100))
        outputs.append(layer.weight.grad)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_a_margin_is_for_predictions_and_not_for_casts_again():
    layer, optimizer = made(Guarded(margin=3))
    stats = seen(layer)
    for amax in (1.0, 1.0, 100.0):
        step(layer, optimizer, torch.full((5, 8), amax))
    scales = [1 / float(each[INPUT, Stat.SCALE_INV]) for each in stats]
    assert scales == pytest.approx([448, 56, 4.48])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_forward_backward_and_recompute_agree(use_reentrant):
    results = []
    for checkpoints in (False, True):
        layer, optimizer = made(Guarded(history_len=1))
        stats = seen(layer)
        for amax in (1.0, 30.0, 2.0):
            torch.manual_seed(3)
            x = (torch.randn(5, 8) * amax).requires_grad_()
            optimizer.zero_grad()
            y = checkpoint(layer, x, use_reentrant=use_reentrant) if checkpoints else layer(x)
            assert isinstance(y, Tensor)
            y.square().sum().backward()
            optimizer.step()
            results.append([y.detach(), x.grad, layer.weight.grad, stats[-1]])
    for plain, again in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_nonfinite_element_neither_triggers_a_cast_nor_enters_the_history():
    layer, optimizer = made(Guarded())
    stats = seen(layer)
    step(layer, optimizer, torch.ones(5, 8))
    x = torch.ones(5, 8)
    x[0, 0] = torch.inf
    layer(x).sum().backward()
    optimizer.step()
    assert stats[1][INPUT, Stat.RECAST] == 0
    assert stats[1][INPUT, Stat.NONFINITE] == 1
    assert find_ledgers(layer)[0].history_of(INPUT)[:2].tolist() == [1, 1]


def test_rows_of_a_weight_are_guarded_one_by_one():
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    convert(model, Recipe(weight=Guarded(margin=0, granularity=PerRow())))
    (layer,) = model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stats = seen(model)
    for factor in (1.0, 1.0, 100.0):
        with torch.no_grad():
            layer.get_parameter("weight").fill_(1)
            layer.get_parameter("weight")[2] = factor
        step(model, optimizer, torch.ones(5, 8, requires_grad=True))
    assert [int(each[WEIGHT, Stat.RECAST]) for each in stats] == [0, 0, 2]
    assert [int(each[WEIGHT, Stat.SATURATED]) for each in stats] == [0, 0, 0]
    (ledger,) = find_ledgers(model)
    assert ledger.scale_of(WEIGHT)[:6].tolist() == [448, 448, pytest.approx(4.48), 448, 448, 448]


def test_accumulation_counts_each_cast_again_once():
    layer, optimizer = made(Guarded())
    stats = seen(layer)
    step(layer, optimizer, torch.ones(5, 8))
    for amax in (1.0, 9.0, 9.0):
        layer(torch.full((5, 8), amax)).sum().backward()
    optimizer.step()
    assert stats[1][INPUT, Stat.RECAST] == 2
    assert stats[1][INPUT, Stat.CASTS] == 3
