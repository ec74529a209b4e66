"""What underflow takes: elements that are small in number, or in size, in logs of real casts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unclamp.analysis.advice import Advice, advise
from unclamp.analysis.advice.choice import LADDER
from unclamp.analysis.advice.groups import groups_of
from unclamp.analysis.advice.outruns import outruns
from unclamp.analysis.advice.underflow import Underflows, rounding_takes
from unclamp.analysis.whatif import evaluate
from unclamp.analysis.whatif.inspected import read_inspected
from unclamp.formats import get_format
from unclamp.nn import convert
from unclamp.recipe import Recipe
from unclamp.runlog import RunLog
from unclamp.scaling import Delayed, Dynamic
from unclamp.telemetry import Recorder

STEPS, INSPECT = 100, 5
WIDTH, TOKENS = 16, 64


class Branches(nn.Module):
    """Two layers side by side, called `name.0` and `name.1`, whose outputs add up."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.add_module(name, self.branches)
        del self.branches
        self.called = name

    def forward(self, x: Tensor, sizes: tuple[float, float]) -> Tensor:
        """Return the sum of the outputs, each times its size."""
        one, other = self.get_submodule(self.called).children()
        return one(x) * sizes[0] + other(x) * sizes[1]


def noise_of(step: int) -> Tensor:
    """Return what the loss has for gradient at a step; a branch's has its size besides."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def trained(
    path: Path, name: str, sizes: Callable[[int], tuple[float, float]], *, token: float = 1.0
) -> Path:
    """Write the log of a dynamic run whose branches' gradients have given sizes.

    At every twelfth step one `token` is so many times as large.
    """
    torch.manual_seed(0)
    model = Branches(name)
    convert(model, Recipe.uniform("dynamic"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    with Recorder(model, path, inspect=INSPECT) as recorder:
        for step in range(STEPS):
            optimizer.zero_grad()
            x = torch.randn(TOKENS, WIDTH)
            x[0] *= token if step % 12 == 0 else 1
            out = model(x, sizes(step))
            loss = (out * noise_of(step)).sum()
            loss.backward()
            optimizer.step()
            recorder.step(step, loss=loss)
    return path


def advice_of(path: Path) -> Advice:
    with RunLog.open(path) as log:
        return advise(log)


def scaling_of(advice: Advice, role: str = "grad_output") -> object:
    """Return what an operand gets."""
    (found,) = {g.scaling for g in advice.groups if g.group.role == role}
    return found


def same(step: int) -> tuple[float, float]:
    """Gradients stay as they are."""
    return 1.0, 1.0


def one_is_tiny(step: int) -> tuple[float, float]:
    """One branch's gradients are as good as nothing beside the other's, where it is looked at."""
    return 1.0, 1e-25 if step % INSPECT == 0 and step else 1.0


def both_jump(step: int) -> tuple[float, float]:
    """All gradients are enormous now and then, so that a history forgets none of it."""
    return (1e12, 1e12) if step % 12 == 0 else (1.0, 1.0)


def test_many_zeros_are_nothing_beside_the_other_experts_gradients(tmp_path: Path) -> None:
    """Half of all elements vanish, which hold 1e-50 of the squares of their step."""
    path = trained(tmp_path / "run", "experts", one_is_tiny)
    with RunLog.open(path) as log:
        lost = evaluate(log, [Delayed()], site="grad_output").outcomes[0].lost
    assert lost is not None
    assert lost.underflow.value == pytest.approx(0.5 * 19 / 20, abs=0.001)
    advice = advice_of(path)
    assert scaling_of(advice) == Delayed()
    assert advice.reads == 1.0


@pytest.mark.parametrize(
    ("name", "sizes"), [("layers", one_is_tiny), ("layers", both_jump), ("experts", both_jump)]
)
def test_a_layer_or_a_step_whose_gradients_all_vanish_is_scaled_by_itself(
    name: str, sizes: Callable[[int], tuple[float, float]], tmp_path: Path
) -> None:
    assert scaling_of(advice_of(trained(tmp_path / "run", name, sizes))) == Dynamic()


@pytest.mark.parametrize(
    ("token", "lost", "expected"),
    [(300, (0.0005, 0.01), Delayed()), (1e6, (0.8, 1.0), Dynamic())],
)
def test_inputs_may_lose_what_is_small_beside_their_median(
    token: float, lost: tuple[float, float], expected: object, tmp_path: Path
) -> None:
    """A large token stays in a history, and of the tokens behind it elements become zero."""
    path = trained(tmp_path / "run", "layers", same, token=token)
    with RunLog.open(path) as log:
        found = evaluate(log, [Delayed()], site="input").outcomes[0].lost
    assert found is not None
    assert lost[0] < found.underflow.value < lost[1]
    assert scaling_of(advice_of(path), "input") == expected


@pytest.mark.parametrize("octaves", [-32, -31, -30])
def test_the_share_of_squares_is_that_of_the_cast_itself(octaves: int, tmp_path: Path) -> None:
    """Part of a tensor vanishes under the scale of larger ones before it."""

    def sizes(step: int) -> tuple[float, float]:
        size = 2.0**octaves if step % INSPECT == 0 else 1.0
        return size, size

    path = trained(tmp_path / "run", "layers", sizes)
    expected = []
    for step in range(0, STEPS, INSPECT):
        before = range(max(step - 16, 0), step)
        past = [(noise_of(s) * sizes(s)[0]).abs().max() for s in before]
        x = (noise_of(step) * sizes(step)[0]).double()
        scaled = x * (57344 / (max(past) if past else x.abs().max()))
        zeroed = scaled.float().to(torch.float8_e5m2).float() == 0
        expected.append(float((x[zeroed] ** 2).sum() / (x**2).sum()))
    mean = sum(expected) / len(expected)
    assert 0.001 < mean < 0.9
    with RunLog.open(path) as log:
        sites = log.computed_sites()
        inspected = read_inspected(log, sites)
        missed = outruns(log, sites, LADDER, inspected)
        underflows = Underflows.of(missed, inspected, sites)
        (group,) = [g for g in groups_of(sites) if g.role == "grad_output"]
        assert underflows.lost(0, group) == pytest.approx(mean, rel=0.35)
        assert underflows.lost(-1, group) == 0


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("of", ["normal", "uniform", "octaves"])
def test_rounding_takes_at_least_what_is_tolerated(of: str, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 16, generator=generator)
    if of == "uniform":
        x = torch.rand(1 << 16, generator=generator)
    if of == "octaves":
        x = torch.exp2(-4 * torch.rand(1 << 16, generator=generator))
    fmt = get_format(name)
    scaled = x / x.abs().max() * fmt.max
    rounded = scaled.to(getattr(torch, f"float8_{name}")).float()
    taken = float((rounded - scaled).square().sum() / scaled.square().sum())
    assert rounding_takes(fmt) <= taken <= 4 * rounding_takes(fmt)
