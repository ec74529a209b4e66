"""What clamping a gradient did to the weight's: recomputed in float64 from planted clamps.

Inputs are small integers, which FP8 holds exactly, and so are gradients but for planted ones that
exceed the largest value of the format: the truth needs no cast.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import Dynamic, Guarded, HighPrecision, PerBlock, PerRow, Recipe, Static
from unclamp.nn import find_ledgers
from unclamp.nn.update import Inspection, Update
from unclamp.numerics.inspection import (
    CHANGE_PRODUCT,
    CHANGE_SQUARE,
    GRADIENT_SQUARE,
    GRADIENTS,
    INSPECTED,
)

TOKENS, IN, OUT = 12, 8, 6
MOST = 112.0
"""Largest gradient that fits: 57,344 of E5M2 over the scale."""
GRADIENT = Static(scale=512.0)
GRADIENT_ROW = 2
INPUTS = {
    "tensor": Static(scale=1.0),
    "row": Dynamic(granularity=PerRow(), power_of_two=True),
    "block": Dynamic(granularity=PerBlock(2, 4), power_of_two=True),
    "high": HighPrecision(),
}


def recipe(granularity: str = "tensor", **changes) -> Recipe:
    return Recipe(
        input=INPUTS[granularity], weight=Static(scale=1.0), grad_output=GRADIENT, **changes
    )


def linear(plan: Recipe, inspection: Inspection = "gradients", **settings):
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, **settings)
    return layer, *heard_by(layer, plan, inspection)


def heard_by(layer: nn.Module, plan: Recipe, inspection: Inspection):
    unclamp.convert(layer, plan)
    (ledger,) = find_ledgers(layer)
    ledger.inspect(inspection)
    heard: list[Update] = []
    ledger.subscribe(heard.append)
    return ledger, heard


def batch(seed: int, clamped: int) -> tuple[Tensor, Tensor]:
    """Return an input and a gradient of integers, of which so many elements are too large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, (TOKENS, IN), generator=generator).float()
    dy = torch.randint(-3, 4, (TOKENS, OUT), generator=generator).float()
    places = torch.randperm(dy.numel(), generator=generator)[:clamped]
    signs = torch.where(torch.rand(clamped, generator=generator) < 0.5, -1.0, 1.0)
    dy.view(-1)[places] = signs * torch.randint(130, 900, (clamped,), generator=generator)
    return x, dy


def truth(batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Return the three sums over the calls that clamp."""
    sums = [0.0, 0.0, 0.0]
    for x, dy in batches:
        wide = dy.double()
        if not (wide.abs() > MOST).any():
            continue
        computed = wide.clamp(-MOST, MOST).t() @ x.double()
        change = wide.t() @ x.double() - computed
        sums[0] += float(computed.square().sum())
        sums[1] += float(change.square().sum())
        sums[2] += float((computed * change).sum())
    return sums[0], sums[1], sums[2]


def found(update: Update) -> tuple[float, float, float]:
    assert update.details is not None
    row = update.details[GRADIENT_ROW]
    return float(row[GRADIENT_SQUARE]), float(row[CHANGE_SQUARE]), float(row[CHANGE_PRODUCT])


def looks(update: Update) -> list[float]:
    assert update.details is not None
    return update.details[:, GRADIENTS].tolist()


@pytest.mark.parametrize("inspection", ["gradients", "clamped", "always"])
@pytest.mark.parametrize("granularity", INPUTS)
def test_the_sums_are_those_of_the_gradients_with_and_without_clamping(granularity, inspection):
    layer, ledger, heard = linear(recipe(granularity), inspection)
    x, dy = batch(1, clamped=5)
    layer(x).backward(dy)
    ledger.update()
    (update,) = heard
    assert found(update) == pytest.approx(truth([(x, dy)]), rel=1e-6)
    assert looks(update) == [0, 0, 1]
    assert layer.weight.grad is not None  # the gradient itself stays the clamped one
    torch.testing.assert_close(layer.weight.grad, dy.clamp(-MOST, MOST).t() @ x)


@pytest.mark.parametrize("granularity", INPUTS)
def test_microsteps_add_up_and_those_that_clamped_nothing_add_nothing(granularity):
    layer, ledger, heard = linear(recipe(granularity))
    batches = [batch(seed, clamped) for seed, clamped in enumerate([0, 3, 0, 40, 1])]
    for x, dy in batches:
        layer(x).backward(dy)
    ledger.update()
    assert found(heard[0]) == pytest.approx(truth(batches), rel=1e-6)
    assert looks(heard[0])[GRADIENT_ROW] == 3


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("tokens", "few"), [(160, 20), (32, 16)])  # an eighth; or 16 of any batch
def test_between_inspected_steps_a_gradient_is_measured_where_few_tokens_clamp(
    tokens, few, is_compiled
):
    torch._dynamo.reset()
    layer, ledger, heard = linear(recipe())
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if is_compiled else layer
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randint(-4, 5, (tokens, IN), generator=generator).float()
    made = []
    for clamped in (few, few + 1, tokens):
        dy = torch.randint(-3, 4, (tokens, OUT), generator=generator).float()
        dy[torch.randperm(tokens, generator=generator)[:clamped], 2] = 500
        made.append(dy)
        call(x).backward(dy)
        ledger.update()
    ledger.inspect("always")
    call(x).backward(made[-1])
    ledger.update()
    at_most, above, every, inspected = map(found, heard)
    assert at_most == pytest.approx(truth([(x, made[0])]), rel=1e-6)
    assert all(map(math.isnan, (*above, *every)))
    assert inspected == pytest.approx(truth([(x, made[-1])]), rel=1e-6)
    torch._dynamo.reset()


def test_a_step_of_which_a_part_was_not_measured_has_no_figure():
    layer, ledger, heard = linear(recipe())
    x, dy = batch(1, clamped=3)
    layer(x).backward(dy)
    layer(torch.ones(40, IN)).backward(torch.full((40, OUT), 500.0))
    ledger.update()
    assert math.isnan(found(heard[0])[1])


def test_a_large_weight_is_added_up_in_parts():
    torch.manual_seed(0)
    layer = nn.Linear(300, 257)
    ledger, heard = heard_by(layer, recipe(), "gradients")
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (9, 300), generator=generator).float()
    dy = torch.randint(-3, 4, (9, 257), generator=generator).float()
    dy[3, 200], dy[8, 0] = 600, -333
    layer(x).backward(dy)
    ledger.update()
    assert found(heard[0]) == pytest.approx(truth([(x, dy)]), rel=1e-9)


def test_calls_of_a_shared_module_add_up():
    layer, ledger, heard = linear(recipe())
    pairs = [batch(seed, clamped=2) for seed in (1, 2)]
    torch.stack([(layer(x) * dy).sum() for x, dy in pairs]).sum().backward()
    ledger.update()
    assert found(heard[0]) == pytest.approx(truth(pairs), rel=1e-6)


def test_conv1d_tells_the_same():
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = kind(OUT, IN)
    ledger, heard = heard_by(layer, recipe(), "gradients")
    x, dy = batch(3, clamped=4)
    layer(x).backward(dy)
    ledger.update()
    assert found(heard[0]) == pytest.approx(truth([(x, dy)]), rel=1e-6)


def test_a_smoothed_product_tells_of_the_gradient_that_its_weight_gets():
    plan = Recipe(
        input=Dynamic(power_of_two=True),
        weight=Dynamic(),
        grad_output=GRADIENT,
        smooth=True,
    )
    layer, ledger, heard = linear(plan)
    x, dy = batch(4, clamped=4)
    x *= torch.tensor([1.0, 2, 4, 1, 8, 1, 16, 1])
    layer(x).backward(dy)
    ledger.update()
    assert found(heard[0]) == pytest.approx(truth([(x, dy)]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_it_of_the_rounded_gradient(dtype):
    layer, ledger, heard = linear(recipe(), dtype=dtype)
    x, dy = batch(5, clamped=5)
    dy = dy.to(dtype).float()
    layer(x.to(dtype)).backward(dy.to(dtype))
    ledger.update()
    assert found(heard[0]) == pytest.approx(truth([(x, dy)]), rel=1e-2)
    assert found(heard[0])[1] == pytest.approx(truth([(x, dy)])[1], rel=1e-6)


def test_a_backward_under_autocast_tells_the_same():
    layer, ledger, heard = linear(recipe())
    x, dy = batch(5, clamped=5)
    x = x + 1 / 64  # not a bfloat16 number beside an integer, and none of E4M3
    output = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output.backward(dy)
    ledger.update()
    rounded = x.to(torch.float8_e4m3fn).float()
    assert found(heard[0]) == pytest.approx(truth([(rounded, dy)]), rel=1e-6)


def test_without_a_clamp_nothing_is_changed_and_nothing_computed():
    layer, ledger, heard = linear(recipe(), "always")
    x, dy = batch(6, clamped=0)
    layer(x).backward(dy)
    ledger.update()
    assert found(heard[0]) == (0, 0, 0)
    assert looks(heard[0])[GRADIENT_ROW] == 1
    for inspection in ("gradients", "never"):
        ledger.inspect(inspection)
        layer(x).backward(dy)
        ledger.update()
    assert [update.details is None for update in heard] == [False, True, True]


def test_a_look_at_gradients_alone_is_no_look_at_casts():
    layer, ledger, heard = linear(recipe())
    x, dy = batch(7, clamped=3)
    layer(x).backward(dy)
    ledger.update()
    assert heard[0].details is not None
    assert not heard[0].details[:, INSPECTED].any()


def test_no_weights_gradient_no_change_of_it():
    x, dy = batch(8, clamped=3)
    frozen, ledger, heard = linear(recipe(), "always")
    frozen.weight.requires_grad_(False)
    frozen(x.clone().requires_grad_()).backward(dy)
    ledger.update()
    plan = recipe(grad_weight=HighPrecision())
    plain, ledger, more = linear(plan, "always")
    plain(x.clone().requires_grad_()).backward(dy)
    ledger.update()
    assert [looks(update) for update in (*heard, *more)] == [[0, 0, 0]] * 2


def test_infinite_elements_are_not_clamped_and_nan_leaves_no_number():
    layer, ledger, heard = linear(recipe())
    x, dy = batch(9, clamped=3)
    wild = dy.clone()
    wild[0, 0] = torch.inf
    layer(x).backward(wild)
    ledger.update()
    dy[0, 0] = MOST  # what Inf became: the truth takes it for an element that fits
    assert found(heard[0]) == pytest.approx(truth([(x, dy)]), rel=1e-6)
    wild[0, 0] = torch.nan
    layer(x).backward(wild)
    ledger.update()
    assert not torch.isfinite(torch.tensor(found(heard[1])[0]))


def test_under_checkpointing_a_gradient_counts_once():
    layer, ledger, heard = linear(recipe())
    x, dy = batch(10, clamped=3)
    for reentrant in (False, True):
        made = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant)
        made.backward(dy)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        ledger.update()
    for update in heard:
        assert looks(update)[GRADIENT_ROW] == 1
        assert found(update) == pytest.approx(truth([(x, dy)]), rel=1e-6)


def test_a_backward_is_measured_in_eval_mode_too_and_a_forward_alone_is_not():
    """Gradients decide whether a forward trains, and not the module's mode."""
    layer, ledger, heard = linear(recipe())
    layer.eval()
    x, dy = batch(11, clamped=3)
    with torch.no_grad():
        layer(x)
    ledger.update()
    layer(x).backward(dy)
    ledger.update()
    assert [update.details is None for update in heard[:-1]] == [True] * (len(heard) - 1)
    assert found(heard[-1]) == pytest.approx(truth([(x, dy)]), rel=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_a_compiled_layer_tells_the_same_in_one_graph_a_mode(granularity):
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    layer, ledger, heard = linear(recipe(granularity))
    twin, other, same = linear(recipe(granularity))
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    modes: tuple[Inspection, ...] = ("always", "gradients", "always", "gradients")
    for seed, mode in enumerate(modes):
        x, dy = batch(seed, clamped=3 if seed != 1 else 0)
        for each, call, book in ((layer, layer, ledger), (twin, compiled, other)):
            book.inspect(mode)
            call(x).backward(dy)
            book.update()
            assert each.weight.grad is not None
    assert torch.equal(layer.weight.grad, twin.weight.grad)  # pyright: ignore
    for seed in (0, 2, 3):
        assert found(same[seed]) == pytest.approx(found(heard[seed]), rel=1e-12)
        assert looks(same[seed])[GRADIENT_ROW] == 1
    assert backend.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("inspection", ["gradients", "clamped", "always"])
def test_training_is_the_same_bit_for_bit(inspection):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(IN, 16), nn.SiLU(), nn.Linear(16, OUT))
    watched = copy.deepcopy(plain)
    modes: tuple[Inspection, ...] = ("never", inspection)
    changes: list[bool] = []
    for model, mode in zip((plain, watched), modes, strict=True):
        _, heard = heard_by(model, Recipe(), mode)
        optimizer = SGD(model.parameters(), lr=0.05)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(TOKENS, IN, generator=generator)
            optimizer.zero_grad()
            for size in (1, 30 if step % 5 == 4 else 1):
                (model(x).square().mean() * size).backward()
            optimizer.step()
        changes = [found_any(update) for update in heard]
    assert any(changes)
    for ours, theirs in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def found_any(update: Update) -> bool:
    return update.details is not None and bool(update.details[:, CHANGE_SQUARE].any())


def test_the_gradient_with_the_gradients_guarded_is_the_unclamped_one():
    """Two trainings alike to the first clamp: what is told there is how far they are apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 64), nn.SiLU(), nn.Linear(64, OUT))
    twin = copy.deepcopy(model)
    grads: list[Tensor] = []
    updates: list[Update] = []
    for each, scaling in ((model, unclamp.Delayed()), (twin, Guarded())):
        same = Dynamic()
        plan = Recipe(input=same, weight=same, grad_output=scaling)
        _, heard = heard_by(each, plan, "clamped")  # all tokens clamp, which are not few
        optimizer = SGD(each.parameters(), lr=0.01)
        for step in range(4):
            x = torch.randn(256, IN, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (each(x).square().mean() * (40 if step == 3 else 1)).backward()
            if step < 3:
                optimizer.step()
        (ledger,) = find_ledgers(each)
        ledger.update()
        last = each[2].weight.grad
        assert isinstance(last, Tensor)
        grads.append(last.double())
        updates.append(heard[-1])
    clamped, unclamped = grads
    computed, change, product = found_at(updates[0], row=5)
    assert computed == pytest.approx(float(clamped.square().sum()), rel=1e-6)
    apart = unclamped - clamped
    assert change == pytest.approx(float(apart.square().sum()), rel=0.05)
    assert product == pytest.approx(float((clamped * apart).sum()), rel=0.05)
    assert change > 0.5 * computed  # a change that matters, and no rounding
    assert not found_any(updates[1])


def found_at(update: Update, *, row: int) -> tuple[float, float, float]:
    assert update.details is not None
    numbers = update.details[row]
    return (
        float(numbers[GRADIENT_SQUARE]),
        float(numbers[CHANGE_SQUARE]),
        float(numbers[CHANGE_PRODUCT]),
    )
