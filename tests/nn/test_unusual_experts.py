"""Banks of experts multiplied in unusual ways: each product is its experts', or nobody's."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp
from unclamp import Dynamic, Recipe
from unclamp.nn import find_ledgers, products_of
from unclamp.numerics import Stat

EXPERTS, INPUTS, OUTPUTS = 4, 16, 32


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.randn(EXPERTS, INPUTS, OUTPUTS))


class BatchOfOneExperts(Bank):
    def forward(self, x: Tensor) -> Tensor:
        return x[None] @ self.w


class EveryTokenExperts(Bank):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.w)


class OneMatrixExperts(Bank):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, EXPERTS) @ self.w.view(-1, OUTPUTS)


class EverySecondExperts(Bank):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.w[::2])


class LastTwoExperts(Bank):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.w[2:])


class SplitMatrixExperts(Bank):
    def forward(self, x: Tensor) -> Tensor:
        halves = self.w[1].view(2, INPUTS // 2, OUTPUTS)
        return torch.bmm(torch.stack(x.chunk(2, -1)), halves)


CASES: dict[type[Bank], list[int]] = {
    BatchOfOneExperts: [0, 1, 2, 3],
    EveryTokenExperts: [0, 1, 2, 3],
    OneMatrixExperts: [],  # one matrix of all experts has no scale
    EverySecondExperts: [],
    LastTwoExperts: [2, 3],
    SplitMatrixExperts: [],
}
"""Which experts' products are known."""


def cast(x: Tensor) -> Tensor:
    """Return what a dynamic cast to e4m3fn leaves of a tensor, in torch's own arithmetic."""
    scale = 448 / x.abs().amax()
    return (x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale


def casts(model: nn.Module) -> list[int]:
    ledger = find_ledgers(model)[0]
    return [
        number
        for number, (_, own, _) in enumerate(products_of(model))
        if ledger.pending[own.indices["input"], Stat.CASTS] > 0
    ]


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_a_product_is_its_experts_or_nobodys(kind: type[Bank]) -> None:
    torch.manual_seed(0)
    plain, x = kind(), torch.randn(6, INPUTS)
    observed, in_fp8, by_hand = (copy.deepcopy(plain) for _ in range(3))
    wanted = plain(x)
    with unclamp.observe(observed):
        got = observed(x)
        got.square().sum().backward()
        assert torch.equal(got, wanted)
        assert casts(observed) == CASES[kind]
    unclamp.convert(in_fp8, Recipe.uniform(Dynamic()))
    got = in_fp8(x)
    got.square().sum().backward()
    assert casts(in_fp8) == CASES[kind]
    if CASES[kind]:
        with torch.no_grad():
            by_hand.w.copy_(torch.stack([cast(w) for w in by_hand.w]))
            wanted = by_hand(cast(x))
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class BiasedExperts(Bank):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(EXPERTS, 1, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(EXPERTS, -1, -1), self.w) + self.b


def test_a_bias_of_three_dimensions_is_no_product() -> None:
    report = unclamp.convert(BiasedExperts(), Recipe())
    assert list(report.converted) == [f"w.{number}" for number in range(EXPERTS)]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(0.1 * torch.randn(EXPERTS, INPUTS, OUTPUTS))
        self.down = nn.Parameter(0.1 * torch.randn(EXPERTS, OUTPUTS, INPUTS))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        up = unclamp.grouped_mm(x, self.up, offs)
        return unclamp.grouped_mm(F.silu(up), self.down, offs)


@pytest.mark.parametrize("rows", [0, 8])
@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe.uniform(Dynamic())], ids=["delayed", "dynamic"]
)
def test_a_rank_whose_experts_have_no_rows_has_gradients_of_zeros(recipe: Any, rows: int) -> None:
    """Or data parallelism waits for the gradients of a bank for ever."""
    model = Grouped()
    unclamp.convert(model, recipe)
    x = torch.randn(rows, INPUTS, requires_grad=True)
    output = model(x, torch.zeros(EXPERTS, dtype=torch.int32))
    assert torch.equal(output, torch.zeros(rows, INPUTS))
    output.sum().backward()
    for tensor in (x, model.up, model.down):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
