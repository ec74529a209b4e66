"""Engines with an optimizer of their own, as DeepSpeed and Megatron-LM, by `unclamp.step`.

They are stand-ins: neither library installs here. What each does to parameters and gradients is
theirs: DeepSpeed's float16 parameters are views of one flat buffer, trained by a flat float32 copy
that no parameter has a link to; Megatron-LM adds gradients up in buffers (`main_grad`) by hooks,
lets the gradient go, and trains float32 shards. The truth is the inputs of each step, and a run
that was never interrupted.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import unclamp
from unclamp import Delayed, Recipe, Recorder, RunLog, ScalingState
from unclamp.nn import find_ledgers

WIDTH, MICRO, STEPS, SKIPPED = 8, 3, 5, 2
RECIPE = Recipe.uniform(Delayed(history_len=8))


class FlatEngine:
    """As DeepSpeed's: the engine divides the loss, and steps when enough of them came."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.micro = model, 0
        self.parameters = list(model.parameters())
        self.flat16 = torch.cat([p.detach().half().reshape(-1) for p in self.parameters])
        start = 0
        for p in self.parameters:
            p.data = self.flat16[start : start + p.numel()].view_as(p)
            start += p.numel()
        self.flat32 = nn.Parameter(self.flat16.float())
        self.optimizer = AdamW([self.flat32], lr=0.01)
        self.norm = torch.zeros(())

    def backward(self, loss: Tensor) -> None:
        (loss / MICRO).backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([g.float().reshape(-1) for g in grads])
        self.flat32.grad = flat if self.flat32.grad is None else self.flat32.grad + flat
        for p in self.parameters:
            p.grad = None
        self.micro += 1

    def step(self) -> bool:
        """Make a step where it is time for one; return whether it was made."""
        if self.micro % MICRO:
            return False
        assert self.flat32.grad is not None
        grad, self.norm = self.flat32.grad, self.flat32.grad.norm()
        is_made = bool(grad.isfinite().all())
        if is_made:
            self.optimizer.step()
            with torch.no_grad():
                self.flat16.copy_(self.flat32)
        self.flat32.grad = None
        return is_made


class MainGradEngine:
    """As Megatron-LM's distributed optimizer: hooks fill buffers, shards are trained."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.micro = model, 0
        self.parameters: list[Any] = list(model.parameters())
        sizes = [p.numel() for p in self.parameters]
        self.buffer = torch.zeros(sum(sizes))
        for p, part in zip(self.parameters, self.buffer.split(sizes), strict=True):
            p.main_grad = part.view_as(p)
            p.register_post_accumulate_grad_hook(self._add)
        self.shards = [nn.Parameter(p.detach().float().reshape(-1)) for p in self.parameters]
        self.optimizer = AdamW(self.shards, lr=0.01)
        self.norm = torch.zeros(())

    @staticmethod
    def _add(p: Any) -> None:
        p.main_grad.add_(p.grad)
        p.grad = None

    def backward(self, loss: Tensor) -> None:
        (loss / MICRO).backward()
        self.micro += 1

    def step(self) -> bool:
        """Make a step where it is time for one; return whether it was made."""
        if self.micro % MICRO:
            return False
        self.norm = self.buffer.norm()
        is_made = bool(self.buffer.isfinite().all())
        if is_made:
            for p, shard in zip(self.parameters, self.shards, strict=True):
                shard.grad = p.main_grad.reshape(-1).clone()
            self.optimizer.step()
            with torch.no_grad():
                for p, shard in zip(self.parameters, self.shards, strict=True):
                    p.copy_(shard.view_as(p))
        self.buffer.zero_()
        return is_made


ENGINES: dict[str, Callable[[nn.Module], Any]] = {
    "flat float16 buffer": FlatEngine,
    "main_grad buffers": MainGradEngine,
}


def batch(step: int, micro: int) -> Tensor:
    g = torch.Generator().manual_seed(100 * step + micro)
    return torch.randn(4, WIDTH, generator=g) * (1 + step)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4, bias=False))
    unclamp.convert(model, RECIPE, state="apart")
    return model


def train(engine: Any, steps: range, recorder: Recorder | None = None) -> list[float]:
    """Be the user's loop: one line after a step that was made, and one to record it."""
    losses, number = [], 0
    dtype = next(engine.model.parameters()).dtype
    for step in steps:
        total = torch.zeros(())
        for micro in range(MICRO):
            loss = engine.model(batch(step, micro).to(dtype)).float().square().mean()
            overflows = (step, micro) == (SKIPPED, 1)
            engine.backward(loss * torch.inf if overflows else loss)
            total = total + loss.detach() / MICRO
            if engine.step():
                unclamp.step(engine.model)
                losses.append(float(total))
                if recorder is not None:
                    recorder.step(number, loss=total, grad_norm=engine.norm, lr=0.01)
                number += 1
    return losses


@pytest.mark.parametrize("name", ENGINES)
def test_a_history_has_one_entry_a_step_that_was_made(name: str, tmp_path: Path) -> None:
    model = made()
    engine = ENGINES[name](model)
    dtype = next(model.parameters()).dtype
    with Recorder(model, tmp_path / "run") as recorder:
        losses = train(engine, range(STEPS), recorder)
    seen = [
        max(float(batch(step, micro).to(dtype).abs().max()) for micro in range(MICRO))
        for step in range(STEPS)
        if step != SKIPPED
    ]
    # What the skipped step saw and is finite waits for the next one, whose inputs are larger.
    history = ScalingState(model).state_dict()["0.unclamp_input_amax_history"]
    assert history.tolist() == [*reversed(seen), 0, 0, 0, 0]
    assert find_ledgers(model)[0].count() == len(seen)
    with RunLog.open(tmp_path / "run") as log:
        rows = log.sql("SELECT step, loss FROM steps ORDER BY step").to_pylist()
        casts = log.sql("SELECT step, count(*) AS n FROM casts GROUP BY step").to_pylist()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows] == losses
    assert {row["step"]: row["n"] for row in casts} == dict.fromkeys(range(4), 6)


@pytest.mark.parametrize("name", ENGINES)
def test_the_state_beside_an_engines_own_checkpoint_resumes_bit_for_bit(name, tmp_path) -> None:
    def saved(engine: Any) -> dict[str, Any]:
        weights = {k: v.clone() for k, v in engine.model.state_dict().items()}
        own = [p.detach().clone() for g in engine.optimizer.param_groups for p in g["params"]]
        return {"weights": weights, "optimizer": engine.optimizer.state_dict(), "own": own}

    whole = ENGINES[name](made())
    want = train(whole, range(SKIPPED)) + train(whole, range(SKIPPED + 1, STEPS))
    first = ENGINES[name](made())
    losses = train(first, range(SKIPPED))
    torch.save(saved(first), tmp_path / "engine.pt")
    ScalingState(first.model).save(tmp_path / "scaling.pt")
    second = ENGINES[name](made())
    train(second, range(7, 9))
    state = torch.load(tmp_path / "engine.pt", weights_only=True)
    second.model.load_state_dict(state["weights"])
    second.optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for p, own in zip(second.optimizer.param_groups[0]["params"], state["own"], strict=True):
            p.copy_(own)
    ScalingState(second.model).load(tmp_path / "scaling.pt")
    assert losses + train(second, range(SKIPPED + 1, STEPS)) == want
    mine, its = (ScalingState(each.model).state_dict() for each in (whole, second))
    assert all(torch.equal(mine[key], its[key]) for key in mine)
