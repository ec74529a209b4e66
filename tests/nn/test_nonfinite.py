"""A gradient that is not finite stays to be seen: loops that skip such steps must skip it."""

import math

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import (
    E5M2,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerBlock,
    PerRow,
    PerTensor,
    Recipe,
)
from unclamp.nn.gradient import as_nan
from unclamp.numerics import matmul, quantize
from unclamp.scaling import Granularity

RECIPES = {
    "delayed": Recipe(),
    "guarded": Recipe.uniform(Guarded()),
    "dynamic": Recipe.uniform(Dynamic()),
    "rows": Recipe.uniform(Dynamic(PerRow())),
    "blocks of a row": Recipe.uniform(Dynamic(PerBlock(1, 4))),
    "blocks": Recipe.uniform(Dynamic(PerBlock(4, 4))),
    "mx": Recipe.uniform(Dynamic(unclamp.MX())),
    "smooth": Recipe(weight=Dynamic(), smooth=True),
    "hopper": Recipe(grad_input="hopper", grad_weight="hopper_fast"),
    "gradient in high precision": Recipe(grad_output=HighPrecision()),
    "GEMM in high precision": Recipe(grad_weight=HighPrecision()),
    "warm-up": Recipe(warmup_steps=2),
    "e4m3": Recipe(grad_output=Delayed(), grad_output_format="e4m3fn"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows_that_are_finite(x: Tensor, weight: Tensor, dy: Tensor) -> list[list[bool]]:
    """Return which rows of the gradients of input and weight are finite, summed by hand."""
    tokens, outputs, inputs = len(dy), len(weight), x.shape[1]
    x, weight, dy = x.double(), weight.double(), dy.double()
    grad_input = [
        [sum(float(dy[t, n]) * float(weight[n, k]) for n in range(outputs)) for k in range(inputs)]
        for t in range(tokens)
    ]
    grad_weight = [
        [sum(float(dy[t, n]) * float(x[t, k]) for t in range(tokens)) for k in range(inputs)]
        for n in range(outputs)
    ]
    return [[all(map(math.isfinite, row)) for row in g] for g in (grad_input, grad_weight)]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_not_finite_where_those_of_the_plain_layer_are_not(
    name: str, dtype: torch.dtype, bad: float
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4, dtype=dtype)
    unclamp.convert(model, RECIPES[name])
    x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    dy = torch.randn(6, 4, dtype=dtype)
    dy[2, 1] = bad
    model(x).backward(dy)
    grads = (x.grad, model.weight.grad)
    finite = [g.isfinite().all(1).tolist() for g in grads if g is not None]
    assert finite == rows_that_are_finite(x.detach(), model.weight.detach(), dy)
    assert model.bias.grad is not None
    assert model.bias.grad.isfinite().tolist() == [True, False, True, True]


def test_a_loop_that_skips_steps_by_the_norm_of_the_weights_gradients_skips_an_overflow() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    unclamp.convert(model, Recipe())
    output = model(torch.randn(6, 8))
    (output.sum() * math.inf).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert not norm.isfinite()
    assert all(not p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_overflow_is_counted_once_and_enters_no_history() -> None:
    model = nn.Linear(8, 4)
    unclamp.convert(model, Recipe())
    dy = torch.ones(6, 4)
    dy[2, 1] = math.inf
    model(torch.randn(6, 8)).backward(dy)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    state = model.state_dict()
    assert float(state["unclamp_grad_output_amax_history"][0]) == 1.0


def test_a_finite_gradient_of_the_largest_numbers_stays_finite() -> None:
    model = nn.Linear(8, 4)
    unclamp.convert(model, Recipe.uniform(Dynamic()))
    dy = torch.zeros(6, 4)
    dy[2, 1] = torch.finfo(torch.float32).max
    model(torch.full((6, 8), 2.0**-20)).backward(dy)
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_model_shows_what_the_eager_one_shows() -> None:
    dy = torch.ones(6, 4)
    dy[2, 1] = math.inf
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        unclamp.convert(model, Recipe.uniform(Dynamic()))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(torch.randn(6, 8)).backward(dy)
        assert model.weight.grad is not None
        grads.append(model.weight.grad)
    assert not grads[0][1].isfinite().any()
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("accumulate", ["float32", "hopper"])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerRow(), PerBlock(1, 4), PerBlock(4, 4)], ids=str
)
def test_off_the_cpu_nan_as_a_scale_makes_all_of_a_gemm_nan_and_changes_nothing_without_it(
    granularity: Granularity, accumulate: str
) -> None:
    dy = torch.randn(6, 8)
    dy[0] = 0  # zero times NaN is NaN
    q, weight = quantize(dy, E5M2, granularity=granularity), quantize(torch.randn(5, 8), E5M2)
    for is_wild in (False, True):
        marked = as_nan(q, torch.tensor(is_wild)).along(1)
        output = matmul(marked, weight.along(1), accumulate=accumulate)
        expected = matmul(q.along(1), weight.along(1), accumulate=accumulate)
        assert expected.isfinite().all()
        assert bool(output.isnan().all()) == is_wild
        assert torch.equal(output, expected) != is_wild


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["delayed", "guarded", "rows"])
def test_on_a_gpu_all_of_both_gradients_is_nan(name: str, dtype: torch.dtype, bad: float) -> None:
    model = nn.Linear(128, 128, dtype=dtype, device="cuda")
    unclamp.convert(model, RECIPES[name])
    x = torch.randn(128, 128, dtype=dtype, device="cuda", requires_grad=True)
    dy = torch.randn(128, 128, dtype=dtype, device="cuda")
    dy[2, 1] = bad
    model(x).backward(dy)
    assert x.grad is not None
    assert model.weight.grad is not None
    assert x.grad.isnan().all()
    assert model.weight.grad.isnan().all()
