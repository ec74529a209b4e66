"""Where casts are only counted, everything works that works for the plain model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unclamp import Dynamic, HighPrecision, Recipe, convert, observe
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

pytestmark = [
    pytest.mark.filterwarnings("ignore:no layer is in FP8"),
    pytest.mark.filterwarnings("ignore:a product under torch.func"),
    # Of torch's own rules for forward-mode differentiation.
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def observed() -> nn.Sequential:
    model = plain()
    observe(model)
    return model


def warming() -> nn.Sequential:
    model = plain()
    convert(model, Recipe(warmup_steps=5))
    return model


def uncast() -> nn.Sequential:
    model = plain()
    convert(model, Recipe.uniform(HighPrecision()))
    return model


each = pytest.mark.parametrize("make", [observed, warming, uncast])
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))


@each
def test_second_derivatives_are_those_of_the_plain_model(make: Callable[[], nn.Module]) -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    got, want = penalty(make()), penalty(plain())
    assert len(got) == len(want) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each
def test_per_sample_gradients_are_those_of_the_plain_model(make: Callable[[], nn.Module]) -> None:
    def per_sample(model: nn.Module) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)

    got, want = per_sample(make()), per_sample(plain())
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


@each
def test_directional_derivatives_are_those_of_the_plain_model(
    make: Callable[[], nn.Module],
) -> None:
    direction = torch.ones_like(X)
    got, want = (torch.func.jvp(m, (X,), (direction,)) for m in (make(), plain()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each
def test_a_trace_computes_what_the_plain_model_does(make: Callable[[], nn.Module]) -> None:
    traced = torch.jit.trace(make(), (X,), check_trace=False)
    assert torch.equal(traced(X), plain()(X))  # pyright: ignore[reportCallIssue]


@each
@pytest.mark.parametrize("compiled", [False, True])
def test_a_result_may_be_written_into(make: Callable[[], nn.Module], compiled: bool) -> None:
    def losses(model: nn.Module) -> list[Tensor]:
        model = nn.Sequential(model, nn.ReLU(inplace=True))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        x = X.clone().requires_grad_()
        output = run(x)
        output.sum().backward()
        assert x.grad is not None
        return [output.detach(), x.grad]

    got, want = losses(make()), losses(plain())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_converted_result_may_be_written_into_when_compiled_too() -> None:
    model = nn.Sequential(plain(), nn.ReLU(inplace=True))
    convert(model, Recipe())
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    assert torch.equal(compiled(X), model(X))


def test_a_second_derivative_counts_each_cast_once() -> None:
    model = observed()
    (ledger,) = find_ledgers(model)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert ledger.pending[:, Stat.CASTS].tolist() == [1.0] * 6
    gradient.square().sum().backward()
    counts = ledger.pending.reshape(2, 3, -1)[:, :, Stat.CASTS]
    assert counts[:, :2].tolist() == [[1.0, 1.0]] * 2  # inputs and weights of one forward


def test_what_is_not_counted_is_said() -> None:
    from unclamp.nn import counting

    counting.say_not_counted.cache_clear()
    model = observed()
    with pytest.warns(UserWarning, match="not counted"):
        torch.func.jvp(model, (X,), (torch.ones_like(X),))
    assert find_ledgers(model)[0].pending[:, Stat.CASTS].sum() == 0


def test_counts_of_a_warm_up_are_those_of_the_casts_that_follow() -> None:
    counts = []
    for steps in (9, 0):
        model = plain()
        recipe = Recipe(
            input=Dynamic(), weight=Dynamic(), grad_output=Dynamic(), warmup_steps=steps
        )
        convert(model, recipe)
        model(X.clone().requires_grad_()).sum().backward()
        counts.append(find_ledgers(model)[0].pending[:2].clone())
    assert torch.equal(*counts)  # of the first input and weight, which no other cast has touched


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_an_input_of_another_dtype_is_refused_in_a_warm_up_and_after_as_by_the_plain_layer(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    own, other = dtypes
    model = warming().to(own)
    later = copy.deepcopy(model)
    find_ledgers(later)[0].restore_updates(5)
    with pytest.raises(RuntimeError, match="same dtype"):
        plain().to(own)(X.to(other))
    for one in (model, later):
        with pytest.raises(
            RuntimeError, match=f"0: expected an input of the weight's dtype, {own}"
        ):
            one(X.to(other))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert one(X.to(other)).dtype == torch.bfloat16
