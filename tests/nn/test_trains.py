"""Whether a forward trains is a matter of gradients, and not of the module's mode."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import Delayed, Recipe, Recorder, RunLog
from unclamp.nn import find_ledgers

OVERFLOWS = 464
"""Above it, rounding to E4M3 lands above its largest value, 448."""
LENGTH = 4


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down = nn.Parameter(torch.randn(2, width) / 4)
        self.up = nn.Parameter(torch.randn(width, 2) / 4)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()


def keep(kept: list[Tensor]) -> Any:
    return lambda _module, arguments: kept.append(arguments[0].detach())


def adapted() -> tuple[nn.Sequential, dict[str, list[Tensor]]]:
    """Return a model whose base is frozen and in evaluation mode, and the inputs that pass."""
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(16), nn.Tanh(), Adapted(16))
    unclamp.convert(model, Recipe.uniform(Delayed(history_len=LENGTH)))
    model.eval()
    passed: dict[str, list[Tensor]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kept = passed.setdefault(fqn, [])
            module.register_forward_pre_hook(keep(kept))
    return model, passed


def clamped(inputs: list[Tensor]) -> list[int]:
    """Return what a delayed scale clamps of one input a step, by definition."""
    counts = []
    for step, x in enumerate(inputs):
        past = [float(old.abs().max()) for old in inputs[max(step - LENGTH, 0) : step]]
        scale = torch.tensor(448 / max(past or [float(x.abs().max())]), dtype=torch.float32)
        counts.append(int(((x * scale).abs() > OVERFLOWS).sum()))
    return counts


def test_a_frozen_base_in_evaluation_mode_counts_under_an_adapter_that_trains(
    tmp_path: Path,
) -> None:
    model, passed = adapted()
    (ledger,) = find_ledgers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with Recorder(model, tmp_path / "run") as recorder:
        for step in range(8):
            model(torch.randn(32, 16) * 2.0**step).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    with RunLog.open(tmp_path / "run") as log:
        rows = log.sql(
            "SELECT fqn, list(saturated::BIGINT ORDER BY step) AS counts FROM casts "
            "JOIN sites USING (site) WHERE role = 'input' GROUP BY fqn"
        ).to_pylist()
    truth = {fqn: clamped(inputs) for fqn, inputs in passed.items()}
    assert {row["fqn"]: row["counts"] for row in rows} == truth
    assert sum(truth["0.base"]) > 100
    assert float(ledger.scale_of(0)) == pytest.approx(
        448 / max(float(x.abs().max()) for x in passed["0.base"][-LENGTH:])
    )


def test_an_evaluation_between_steps_changes_nothing() -> None:
    model, _ = adapted()
    (ledger,) = find_ledgers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    before = ledger.pending.clone()
    with torch.no_grad():
        model(1000 * torch.randn(4, 16))
    with torch.inference_mode():
        model(1000 * torch.randn(4, 16))
    assert torch.equal(ledger.pending, before)
    assert not ledger.has_pending


def test_a_model_that_nothing_trains_counts_nothing_in_evaluation_mode() -> None:
    model, _ = adapted()
    model.requires_grad_(False)
    model(torch.randn(4, 16))
    assert not find_ledgers(model)[0].has_pending


def test_a_model_counts_again_as_soon_as_its_adapter_wants_gradients() -> None:
    model, _ = adapted()
    (ledger,) = find_ledgers(model)
    adapters = [p for name, p in model.named_parameters() if "base" not in name]
    model.requires_grad_(False)
    model(torch.randn(4, 16))
    for p in adapters:
        p.requires_grad_()
    model(torch.randn(4, 16)).sum().backward()
    assert ledger.pending[::3, unclamp.numerics.Stat.CASTS].tolist() == [1, 1]


def test_a_forward_that_backward_makes_again_counts_once_in_evaluation_mode() -> None:
    model, _ = adapted()
    (ledger,) = find_ledgers(model)
    x = torch.randn(4, 16)
    y: Any = checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    assert ledger.pending[::3, unclamp.numerics.Stat.CASTS].tolist() == [1, 1]


def test_a_model_in_evaluation_mode_trains_like_one_in_training_mode() -> None:
    histories = []
    for mode in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train(mode)
        unclamp.convert(model, Recipe())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        histories.append(find_ledgers(model)[0].amax_history)
    assert torch.equal(*histories)
    assert (histories[0] > 0).any()
