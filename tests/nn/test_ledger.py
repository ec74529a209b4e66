"""What an update makes of the amaxes of a step: histories and scales; who hears of it."""

import math
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from unclamp import Delayed, Dynamic, Recipe, convert
from unclamp.nn import Ledger, find_ledgers
from unclamp.numerics import Stat
from unclamp.reference import float32
from unclamp.scaling import HighPrecision

INPUT, WEIGHT, GRAD_OUTPUT = 0, 1, 2


def made(scaling=None, **others) -> tuple[nn.Linear, Ledger, torch.optim.Optimizer]:
    """Return one converted layer, its ledger and an optimizer that changes nothing."""
    layer = nn.Linear(4, 3)
    convert(layer, Recipe.uniform(scaling or Delayed(**others)))
    return layer, find_ledgers(layer)[0], torch.optim.SGD(layer.parameters(), lr=0.0)


def backward(layer: nn.Module, amax: float) -> None:
    layer(torch.full((2, 4), float(amax))).sum().backward()


def input_scales(amaxes: list[float], **settings) -> list[float]:
    layer, ledger, optimizer = made(**settings)
    scales = []
    for amax in amaxes:
        backward(layer, amax)
        optimizer.step()
        scales.append(float(ledger.scale[INPUT]))
    assert ledger.updates == len(amaxes)
    return scales


def scale(amax: float, largest: float = 448.0) -> float:
    return float32(largest / float32(amax))


# ---- history and window --------------------------------------------------------------------


def test_a_spike_is_held_for_exactly_the_window():
    amaxes = [3.725, 2.885, 3.097, 40.937, 3.092, 3.383, 3.473, 3.740]
    scales = input_scales(amaxes, history_len=4)
    assert scales == [scale(max(amaxes[max(0, i - 3) : i + 1])) for i in range(8)]
    assert [i for i, s in enumerate(scales) if s == scale(40.937)] == [3, 4, 5, 6]


def test_a_window_of_four_follows_the_golden_sequence():
    got = input_scales([1, 2, 4, 1, 1, 1, 1], history_len=4)
    assert got == [448, 224, 112, 112, 112, 112, 448]


def test_most_recent_forgets_at_once():
    got = input_scales([1, 2, 4, 1, 1], history_len=4, reduce="most_recent")
    assert got == [448, 224, 112, 448, 448]


def test_history_len_one_is_most_recent():
    assert input_scales([1, 4, 2], history_len=1) == [448, 112, 224]


def test_a_reduce_function_sees_its_own_window_newest_first():
    seen = []

    def reduce(history: Tensor) -> Tensor:
        seen.append(history.clone())
        return history.amax(dim=1) * 2

    layer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    recipe = Recipe(input=Delayed(history_len=3, reduce=reduce), weight=Delayed(history_len=9))
    convert(layer, recipe)
    ledger = find_ledgers(layer)[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for amax in (1.0, 4.0, 2.0, 1.0):
        backward(layer, amax)
        optimizer.step()
    assert seen[-1].shape == (2, 3)
    assert [h[0].tolist() for h in seen] == [[1, 0, 0], [4, 1, 0], [2, 4, 1], [1, 2, 4]]
    assert ledger.scale[INPUT] == scale(8)


@pytest.mark.parametrize("result", [math.nan, math.inf, 0.0])
def test_a_reduce_function_that_fails_keeps_the_scale(result):
    layer = nn.Linear(4, 3)
    outcome = [2.0]
    convert(layer, Recipe(input=Delayed(reduce=lambda h: torch.full((len(h),), outcome[0]))))
    ledger = find_ledgers(layer)[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    backward(layer, 1.0)
    optimizer.step()
    outcome[0] = result
    backward(layer, 1.0)
    optimizer.step()
    assert ledger.scale[INPUT] == 224


def test_the_scales_of_transformer_engines_recipe_test():
    layer = nn.Linear(4, 4, bias=False)
    convert(layer, Recipe.uniform(Delayed(margin=2)))
    ledger = find_ledgers(layer)[0]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    got = []
    for step in range(4):
        with torch.no_grad():
            layer.weight.fill_(step + 0.5)
        x = torch.full((4, 4), step + 0.25)
        layer(x).backward(torch.full((4, 4), step + 0.75))
        optimizer.step()
        got.append(ledger.scale.tolist())
    expected = [
        [448, 224, 19114.666667],
        [89.6, 74.666667, 8192],
        [49.777778, 44.8, 5213.090909],
        [34.461538, 32, 3822.933333],
    ]
    assert got == [pytest.approx(row, rel=1e-7) for row in expected]


def test_a_delayed_scale_clamps_what_is_new_and_counts_it():
    layer, ledger, optimizer = made()
    backward(layer, 1.0)
    assert ledger.pending[INPUT, Stat.SATURATED] == 0
    optimizer.step()
    backward(layer, 10.0)
    assert ledger.pending[INPUT, Stat.SATURATED] == 8
    assert ledger.pending[INPUT, Stat.SCALE_INV] == float32(1 / 448)
    optimizer.step()
    backward(layer, 10.0)
    assert ledger.pending[INPUT, Stat.SATURATED] == 0


def test_a_dynamic_site_casts_with_its_own_scale_and_still_keeps_a_history():
    layer, ledger, optimizer = made(Dynamic())
    for amax in (1.0, 100.0):
        backward(layer, amax)
        assert ledger.pending[INPUT, Stat.SATURATED] == 0
        optimizer.step()
    assert ledger.history_of(INPUT)[:3].tolist() == [100, 1, 0]


# ---- zeros and non-finite values -----------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_nonfinite_tensor_does_not_freeze_the_scale(bad):
    scales = input_scales([2, bad, 4, 1], history_len=2)
    assert scales == [224, 224, 112, 112]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_nonfinite_element_beside_finite_ones_is_counted_and_ignored(bad):
    layer, ledger, optimizer = made()
    x = torch.full((2, 4), 2.0)
    x[0, 0] = bad
    layer(x).sum().backward()
    assert ledger.pending[INPUT, Stat.NONFINITE] == 1
    optimizer.step()
    assert ledger.scale[INPUT] == 224
    assert bool(ledger.scale.isfinite().all())


def test_an_amax_of_zero_keeps_the_scale_and_enters_the_history():
    layer, ledger, optimizer = made(history_len=2)
    for amax in (2.0, 0.0, 0.0, 0.0):
        backward(layer, amax)
        optimizer.step()
    assert ledger.scale[INPUT] == 224
    assert ledger.history_of(INPUT).tolist() == [0, 0]


def test_zeros_at_the_start_leave_the_scale_to_the_first_real_tensor():
    layer, ledger, optimizer = made()
    backward(layer, 0.0)
    optimizer.step()
    assert ledger.scale[INPUT] == 0
    backward(layer, 1e6)
    assert ledger.pending[INPUT, Stat.SATURATED] == 0


def test_an_empty_batch_changes_neither_history_nor_scale():
    layer, ledger, optimizer = made()
    backward(layer, 2.0)
    optimizer.step()
    before = (ledger.amax_history.clone(), ledger.scale.clone())
    layer(torch.zeros(0, 4)).sum().backward()
    optimizer.step()
    for row in (INPUT, GRAD_OUTPUT):
        assert torch.equal(ledger.amax_history[row], before[0][row])
        assert ledger.scale[row] == before[1][row]


def test_microsteps_all_use_the_scale_of_the_step():
    layer, ledger, optimizer = made()
    backward(layer, 4.0)
    optimizer.step()
    x = torch.full((2, 4), 1.0)
    first = layer(x)
    backward(layer, 400.0)
    assert torch.equal(layer(x), first)
    assert ledger.scale[INPUT] == 112


def test_a_high_precision_role_is_never_measured():
    layer = nn.Linear(4, 3)
    convert(layer, Recipe(input=HighPrecision()))
    ledger = find_ledgers(layer)[0]
    backward(layer, 2.0)
    assert ledger.pending[:, Stat.CASTS].tolist() == [0, 1, 1]


def test_a_listener_gets_a_copy_of_what_was_pending_until_it_ends():
    layer, ledger, optimizer = made()
    heard: list[Tensor] = []
    end = ledger.subscribe(lambda update: heard.append(update.stats))
    backward(layer, 2.0)
    optimizer.step()
    assert heard[0][INPUT, Stat.AMAX] == 2
    end()
    backward(layer, 2.0)
    optimizer.step()
    assert len(heard) == 1


def test_windows_may_differ_by_site() -> None:
    model = nn.Linear(4, 3, bias=False)
    one, two, many = Delayed(history_len=1), Delayed(history_len=2), Delayed(history_len=16)
    convert(model, Recipe(input=one, weight=two, grad_output=many))
    (ledger,), optimizer = find_ledgers(model), SGD(model.parameters(), lr=0.0)
    for value in (8.0, 4.0, 2.0):
        nn.init.constant_(model.weight, value)
        model(torch.full((2, 4), value)).backward(torch.full((2, 3), value))
        optimizer.step()
    assert ledger.scale.tolist() == [448 / 2, 448 / 4, 57344 / 8]
    assert [len(ledger.history_of(row)) for row in range(3)] == [1, 2, 16]


def test_an_update_is_as_many_kernels_for_many_layers_as_for_one() -> None:
    counts = []
    for layers in (1, 12):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        convert(model, Recipe())
        model(torch.randn(3, 4)).sum().backward()
        with torch.profiler.profile() as profile:
            find_ledgers(model)[0].update()
        counts.append(len(cast(list[object], profile.events())))
    assert counts[0] == counts[1]
