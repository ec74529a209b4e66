"""Experts in a compiled model: one break of the graph, the bits of eager mode, counted once."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import Dynamic, PerRow, Recipe
from unclamp.nn import find_ledgers

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
OFFSETS = [(3, 3, 12, 20), (5, 10, 15, 20), (0, 0, 0, 20)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 24, 16) / 4)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each row's product."""
        return unclamp.grouped_mm(x, self.up.mT, offs)


class Model(nn.Module):
    def __init__(self, *, checkpoints: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.experts = Experts()
        self.last = nn.Linear(24, 8)
        self.checkpoints = checkpoints

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return what the experts make of rows, between two layers."""
        x = self.first(x).relu()
        if self.checkpoints:
            x = checkpoint(self.experts, x, offs, use_reentrant=False)  # pyright: ignore
        else:
            x = self.experts(x, offs)
        return self.last(x.relu())


def stepped(model: Callable[..., Tensor], parameters: list[nn.Parameter]) -> list[list[Tensor]]:
    """Return outputs and gradients, step by step."""
    optimizer, found = torch.optim.SGD(parameters, lr=0.1), []
    for step, ends in enumerate(OFFSETS):
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(step))
        output = model(x, torch.tensor(ends, dtype=torch.int32))
        output.square().mean().backward()
        found.append([output.detach(), *(p.grad.clone() for p in parameters if p.grad is not None)])
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe.uniform(Dynamic(granularity=PerRow()))], ids=["delayed", "rows"]
)
def test_compiled_is_eager_bit_for_bit(recipe: Recipe, checkpoints: bool) -> None:
    torch.manual_seed(0)
    eager = Model(checkpoints=checkpoints)
    model = copy.deepcopy(eager)
    for each in (eager, model):
        unclamp.convert(each, recipe)
    one = stepped(torch.compile(model, backend="aot_eager"), list(model.parameters()))
    other = stepped(eager, list(eager.parameters()))
    for a, b in zip(one, other, strict=True):
        assert len(a) == len(b) == 6
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    (mine,), (theirs,) = find_ledgers(model), find_ledgers(eager)
    assert torch.equal(mine.amax_history, theirs.amax_history)
    assert torch.equal(mine.scale, theirs.scale)


def test_the_experts_are_the_one_break_of_the_graph() -> None:
    model = Model(checkpoints=False)
    unclamp.convert(model, Recipe())
    offs = torch.tensor(OFFSETS[0], dtype=torch.int32)
    said = torch._dynamo.explain(model)(torch.randn(20, 16), offs)
    assert said.graph_break_count == 1
    assert "Fp8Experts.forward" in said.break_reasons[0].reason
