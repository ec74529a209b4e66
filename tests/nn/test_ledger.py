import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unclamp.nn import Ledger, convert, find_ledgers
from unclamp.numerics import Stat
from unclamp.recipe import Recipe
from unclamp.reference import float32
from unclamp.scaling import Delayed, Dynamic, HighPrecision

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


# ---- what makes an update ------------------------------------------------------------------


def test_accumulation_takes_the_maximum_over_microsteps_and_updates_once():
    layer, ledger, optimizer = made()
    for amax in (1.0, 8.0, 2.0):
        backward(layer, amax)
    assert ledger.pending[:, Stat.CASTS].tolist() == [3, 3, 3]
    optimizer.step()
    assert ledger.updates == 1
    assert ledger.history_of(INPUT)[:2].tolist() == [8, 0]
    assert ledger.pending[:, Stat.CASTS].tolist() == [0, 0, 0]


def test_microsteps_all_use_the_scale_of_the_step():
    layer, ledger, optimizer = made()
    backward(layer, 4.0)
    optimizer.step()
    x = torch.full((2, 4), 1.0)
    first = layer(x)
    backward(layer, 400.0)
    assert torch.equal(layer(x), first)
    assert ledger.scale[INPUT] == 112


def test_two_optimizers_on_one_model_make_one_update_a_step():
    layer, ledger, _ = made()
    optimizers = [torch.optim.SGD([layer.weight], lr=0.1), torch.optim.Adam([layer.bias])]
    for step in range(3):
        backward(layer, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        assert ledger.updates == step + 1


def test_another_models_optimizer_does_not_update():
    layer, ledger, optimizer = made()
    other = nn.Linear(4, 3)
    other(torch.ones(1, 4)).sum().backward()
    backward(layer, 1.0)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert ledger.updates == 0
    assert ledger.has_pending
    optimizer.step()
    assert ledger.updates == 1


def test_a_step_with_nothing_pending_is_no_update():
    _, ledger, optimizer = made()
    optimizer.step()
    assert ledger.updates == 0


def test_eval_forwards_change_nothing():
    layer, ledger, optimizer = made()
    backward(layer, 1.0)
    optimizer.step()
    before = ledger.pending.clone(), ledger.scale.clone(), ledger.amax_history.clone()
    layer.eval()
    layer(torch.full((2, 4), 100.0))
    layer.train()
    with torch.no_grad():
        layer(torch.full((2, 4), 100.0))
    layer(torch.full((2, 4), 100.0))  # a forward without backward
    optimizer.step()
    assert ledger.updates == 1
    for got, expected in zip(
        (ledger.pending, ledger.scale, ledger.amax_history), before, strict=True
    ):
        assert torch.equal(got, expected)


def test_a_layer_used_twice_in_a_forward_counts_both():
    layer = nn.Linear(4, 4)
    convert(layer, Recipe())
    ledger = find_ledgers(layer)[0]
    layer(layer(torch.ones(2, 4)) * 50).sum().backward()
    assert ledger.pending[:, Stat.CASTS].tolist() == [2, 2, 2]
    assert ledger.pending[INPUT, Stat.ELEMENTS] == 16


def test_frozen_layers_still_follow_their_tensors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    convert(model, Recipe())
    ledger = find_ledgers(model)[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    backward(model, 2.0)
    # The bottom layer has no backward, so its gradient is never cast.
    assert ledger.pending[:, Stat.CASTS].tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1]
    optimizer.step()
    assert ledger.scale[INPUT] == 224
    assert ledger.updates == 1


def test_a_high_precision_role_is_never_measured():
    layer = nn.Linear(4, 3)
    convert(layer, Recipe(input=HighPrecision()))
    ledger = find_ledgers(layer)[0]
    backward(layer, 2.0)
    assert ledger.pending[:, Stat.CASTS].tolist() == [0, 1, 1]


def test_an_optimizer_over_a_wider_model_updates_a_converted_part():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model[0], Recipe())
    backward(model, 1.0)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert find_ledgers(model)[0].updates == 1


def test_converting_a_part_and_then_the_whole_follows_every_optimizer_of_the_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model[0], Recipe())
    convert(model, Recipe())
    (ledger,) = find_ledgers(model)
    backward(model, 1.0)
    torch.optim.SGD(model[1].parameters(), lr=0.1).step()
    assert ledger.updates == 1


def test_converting_the_whole_and_then_a_part_still_follows_the_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model, Recipe())
    convert(model[0], Recipe())
    backward(model, 1.0)
    torch.optim.SGD(model[1].parameters(), lr=0.1).step()
    assert find_ledgers(model)[0].updates == 1


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


def test_a_ledger_dies_with_its_model():
    from unclamp.nn.clock import ticking

    layer, ledger, _ = made()
    assert ledger in ticking
    number = id(ledger)
    del layer, ledger, _
    gc.collect()
    assert number not in {id(other) for other in ticking}


# ---- activation checkpointing --------------------------------------------------------------


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


# ---- who meets whom ------------------------------------------------------------------------


def test_ledgers_and_layers_are_kept_in_the_order_in_which_they_were_made():
    from unclamp.nn.clock import ticking

    models = [made()[0] for _ in range(20)]
    ledgers = [find_ledgers(model)[0] for model in models]
    del models[3:6], ledgers[3:6]
    gc.collect()
    ours = {id(ledger) for ledger in ledgers}
    assert [ledger for ledger in ticking if id(ledger) in ours] == ledgers
    stack = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    convert(stack, Recipe())
    (ledger,) = find_ledgers(stack)
    assert [layer.fqn for layer in ledger.layers] == [str(i) for i in range(20)]


def test_an_optimizer_updates_ledgers_in_the_order_in_which_they_were_made():
    layers = [made()[0] for _ in range(8)]
    order: list[int] = []
    for number, layer in enumerate(layers):
        find_ledgers(layer)[0].subscribe(lambda _, number=number: order.append(number))
        backward(layer, 1.0)
    torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.0).step()
    assert order == list(range(8))


def test_what_is_shared_enters_histories_in_place_of_what_was_seen():
    """Two shards that agree on their amaxes have the histories of one process on all of it."""
    whole, shards = made(history_len=3)[1], [made(history_len=3)[1] for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        amax = torch.randint(-1, 9, (2, 3), generator=generator).to(torch.float64)
        together = amax.amax(0)
        whole.pending[:, Stat.AMAX] = together
        whole.update()
        for shard, own in zip(shards, amax, strict=True):
            shard.pending[:, Stat.AMAX] = own
            shard.share = lambda newest, other=amax: newest.maximum(other.amax(0).float())
            shard.update()
            assert torch.equal(shard.amax_history, whole.amax_history)
            assert torch.equal(shard.scale, whole.scale)
