"""Banks of matrices whose products nothing is known of are named: in report, coverage, run."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import grouped_mm as renamed

import unclamp
from unclamp import Recipe, UnclampWarning

EXPERTS, WIDTH, HIDDEN, TOKENS = 3, 16, 24, 12


class Bank(nn.Module):
    """Rows in groups of four, by a bank, in a way that each subclass says."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return each row's product."""
        raise NotImplementedError


class Einsum(Bank):
    def forward(self, x: Tensor) -> Tensor:
        """Return each row's product."""
        return torch.einsum("etk,ekn->etn", x.view(EXPERTS, -1, WIDTH), self.up).flatten(0, 1)


class EinsumExperts(Einsum):
    """By its name it is taken for experts."""


class Hidden(Bank):
    """Calls torch's function where no code of it names it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = functools.partial(getattr(F, "_".join(["grouped", "mm"])), offs=offsets())

    def forward(self, x: Tensor) -> Tensor:
        """Return each row's product."""
        return self.act(x, self.up)


class Renamed(Bank):
    def forward(self, x: Tensor) -> Tensor:
        """Return each row's product."""
        return renamed(x, self.up, offs=offsets())


def offsets() -> Tensor:
    return torch.arange(4, TOKENS + 1, 4, dtype=torch.int32)


def test_torchs_function_is_known_by_another_name() -> None:
    report = unclamp.convert(Renamed(), Recipe())
    assert list(report.converted) == ["up.0", "up.1", "up.2"]


@pytest.mark.parametrize("made", [Einsum, Hidden])
def test_the_report_says_what_a_bank_needs(made: type[Bank]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), made())
    said = unclamp.convert(model, Recipe()).skipped["1"]
    assert said.startswith(f"not a linear layer ({made.__name__}); if up [3, 16, 24] is a bank of")
    assert "use unclamp.grouped_mm (docs/experts.md)" in said


def test_a_layer_of_torch_with_three_dimensions_is_no_bank() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 3), nn.Bilinear(4, 4, 4))
    skipped = unclamp.convert(model, Recipe()).skipped
    assert skipped == {"1": "not a linear layer (Conv1d)", "2": "not a linear layer (Bilinear)"}


def test_an_embedding_of_one_row_is_no_bank() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Module())
    model[1].register_parameter("token", nn.Parameter(torch.ones(1, 5, 4)))
    assert unclamp.convert(model, Recipe()).skipped["1"] == "not a linear layer (Module)"


@pytest.mark.parametrize("converts", [True, False], ids=["converted", "plain"])
@pytest.mark.parametrize("made", [Einsum, Hidden, EinsumExperts])
def test_coverage_names_the_bank(made: type[Bank], converts: bool) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), made())
    if converts:
        unclamp.convert(model, Recipe())
    report = unclamp.coverage(model, torch.randn(TOKENS, WIDTH))
    (left,) = [product for product in report.products if product.state == "left out"]
    assert left.fqn == "1.up"
    assert "a bank of matrices, [E, K, N]" in left.why
    assert "unclamp.grouped_mm" in left.why


def test_a_bank_that_is_converted_and_not_taken_is_told_once() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), EinsumExperts())
    assert len(unclamp.convert(model, Recipe()).converted) == 1 + EXPERTS
    with pytest.warns(UnclampWarning, match=r"1\.up: a bank of matrices, .* through einsum"):
        model(torch.randn(TOKENS, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(TOKENS, WIDTH))


def test_a_bank_that_is_left_in_high_precision_is_not_told() -> None:
    model = EinsumExperts()
    with pytest.warns(UnclampWarning):  # nothing is in FP8
        unclamp.convert(model, Recipe.uniform(unclamp.HighPrecision()))
    model(torch.randn(TOKENS, WIDTH))
