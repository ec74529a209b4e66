"""Compiled and eager: one graph without a break, the same bits, and no recompilation."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import MX, Delayed, Dynamic, Guarded, HighPrecision, PerBlock, PerRow, Recipe
from unclamp.nn import find_ledgers
from unclamp.nn.operands import Operands
from unclamp.numerics import Stat

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles

ROW, BLOCK = Dynamic(granularity=PerRow()), Dynamic(granularity=PerBlock(1, 16))
RECIPES = {
    "delayed": Recipe(),
    "guarded": Recipe.uniform(Guarded(history_len=2)),
    "rows": Recipe.uniform(ROW),
    "blocks": Recipe(input=BLOCK, weight=Guarded(granularity=PerBlock(16, 16)), grad_output=BLOCK),
    "mx": Recipe.uniform(Dynamic(granularity=MX())),
    "smooth": Recipe(weight=Guarded(), smooth=True),
    "hopper": Recipe(accumulate="hopper"),
    "warm-up": Recipe(warmup_steps=1),
    "plain gradient": Recipe(
        input=BLOCK,
        weight=Guarded(granularity=PerBlock(16, 16)),
        grad_output=HighPrecision(),
    ),
    "gemm": Recipe(grad_weight=HighPrecision(), output="hopper_fast"),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(40, 24)
        self.down = nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def made(recipe: Recipe, blocks: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)))
    unclamp.convert(model, recipe)
    return model


def train(model: nn.Module, call: Callable[[Tensor], Tensor], steps: int = 3) -> list[Tensor]:
    """Return outputs, gradients and the ledger's tensors of every step."""
    optimizer = SGD(model.parameters(), lr=0.1)
    (ledger,) = find_ledgers(model)
    seen = []
    for step in range(steps):
        torch.manual_seed(step)
        x = (torch.randn(6, 40) * (step + 1)).requires_grad_()
        optimizer.zero_grad()
        y = call(x)
        y.backward(torch.randn(6, 40))
        seen += [y.detach(), x.grad, *(p.grad for p in model.parameters()), ledger.pending.clone()]
        optimizer.step()
        seen += [ledger.scale.clone(), ledger.amax_history.clone()]
    assert ledger.updates == steps
    return [t.clone() for t in seen if t is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_a_compiled_model_is_one_graph_and_gives_the_same_bits(name: str) -> None:
    eager, model = made(RECIPES[name]), made(RECIPES[name])
    compiled = torch.compile(model, fullgraph=True)
    assert same(train(model, compiled), train(eager, eager))


@pytest.mark.parametrize("name", ["delayed", "guarded", "blocks", "gemm"])
def test_a_weight_that_backward_casts_again_is_in_the_graph_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a layer of few tokens keeps no codes of its weight."""
    eager = made(RECIPES[name])
    kept = train(eager, eager)
    monkeypatch.setattr(Operands, "remakes_weight", _remakes)
    model = made(RECIPES[name])
    assert same(train(model, torch.compile(model, fullgraph=True)), kept)


def _remakes(operands: Operands, weight: Tensor, tokens: int) -> bool:
    del weight, tokens
    return operands.plans["weight"] is not None and not operands.is_high("grad_input")


def counted(backend: str = "aot_eager") -> CompileCounterWithBackend:
    return CompileCounterWithBackend(backend)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.uniform(Guarded()), Recipe.uniform(ROW)])
def test_one_graph_serves_every_layer_and_every_step(recipe: Recipe) -> None:
    eager, model = made(recipe, 4), made(recipe, 4)
    counter = counted()
    for part in model:
        part.compile(fullgraph=True, backend=counter)
    assert same(train(model, model), train(eager, eager))
    assert counter.frame_count == 1


def test_the_end_of_a_warm_up_recompiles_once() -> None:
    model, counter = made(Recipe(warmup_steps=2), 3), counted()
    for part in model:
        part.compile(fullgraph=True, backend=counter)
    train(model, model, steps=5)
    assert counter.frame_count == 2


def test_a_switch_recompiles_the_layer_once_and_no_other() -> None:
    eager, model = made(Recipe(), 4), made(Recipe(), 4)
    counter = counted()
    for part in model:
        part.compile(fullgraph=True, backend=counter)
    for each in (eager, model):
        train(each, each)
        find_ledgers(each)[0].updates = 0
        unclamp.switch(each, "2.up", input=Dynamic())
    assert counter.frame_count == 1
    assert same(train(model, model), train(eager, eager))
    assert counter.frame_count == 2
    unclamp.switch(model, "2.up", input=Delayed())
    find_ledgers(model)[0].updates = 0
    train(model, model)
    assert counter.frame_count == 2


def test_a_switch_that_grows_every_history_recompiles_that_layer_alone() -> None:
    model, counter = made(Recipe(), 3), counted()
    for part in model:
        part.compile(fullgraph=True, backend=counter)
    train(model, model)
    unclamp.switch(model, "1.down", grad_output=Guarded(history_len=64))
    find_ledgers(model)[0].updates = 0
    train(model, model)
    assert counter.frame_count == 2


@pytest.mark.parametrize("use_reentrant", [False])
def test_checkpointing_inside_a_compiled_model(use_reentrant: bool) -> None:
    eager, model = made(Recipe()), made(Recipe())

    def call(x: Tensor) -> Tensor:
        for part in model:
            x = checkpoint(part, x, use_reentrant=use_reentrant)  # pyright: ignore
        return x

    assert same(train(model, torch.compile(call, fullgraph=True)), train(eager, eager))


def test_a_compiled_layer_under_autocast() -> None:
    results = []
    for compiles in (False, True):
        model = made(Recipe.uniform(Dynamic()))
        call = torch.compile(model, fullgraph=True) if compiles else model
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(torch.ones(6, 40))
        y.float().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([y.detach(), *grads, find_ledgers(model)[0].pending])
    assert results[0][0].dtype == torch.bfloat16
    assert same(*results)


def test_a_frozen_layer_at_the_bottom_counts_in_a_compiled_forward() -> None:
    eager, model = made(Recipe()), made(Recipe())
    for each in (eager, model):
        each[0].requires_grad_(False)
        call = torch.compile(each, fullgraph=True) if each is model else each
        call(torch.ones(6, 40)).sum().backward()
    (first,), (second,) = find_ledgers(eager), find_ledgers(model)
    assert torch.equal(first.pending, second.pending)
    assert first.pending[:3, Stat.CASTS].tolist() == [1, 1, 0]


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode"])
def test_a_compiled_evaluation_commits_nothing(mode: str) -> None:
    model = made(Recipe())
    train(model, model, steps=1)
    x = torch.randn(6, 40)
    expected = model(x).detach()
    if mode == "eval":
        model.eval()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with context.get(mode, torch.enable_grad)():
        got = torch.compile(model, fullgraph=True)(x)
    assert torch.equal(got, expected)
    assert not find_ledgers(model)[0].has_pending


def test_other_batch_sizes_give_the_eager_bits() -> None:
    model = made(Recipe.uniform(ROW))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for size in (4, 6, 9):
        x = torch.randn(size, 40)
        assert torch.equal(compiled(x), eager(x))
