"""An optimizer's step that raises leaves nothing behind; a closure's forwards are one step's."""

import warnings

import pytest
import torch
from torch import nn

import unclamp
from unclamp import Recipe, UnclampWarning

STEPS = 8


class Failure(Exception):
    """What a closure raises."""


def fail() -> float:
    raise Failure


def converted() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    unclamp.convert(model, Recipe())
    return model


def train_by_hand(model: nn.Module) -> None:
    for _ in range(STEPS):
        model(torch.randn(3, 4)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None


@pytest.mark.parametrize("by_name", [True, False])
def test_steps_that_nobody_sees_are_warned_of_after_a_step_that_raised(by_name: bool) -> None:
    model = converted()
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(Failure):
        other.step(closure=fail) if by_name else other.step(fail)
    with pytest.warns(UnclampWarning, match="sees no optimizer step"):
        train_by_hand(model)


def test_a_step_that_raises_without_a_closure_leaves_nothing_either() -> None:
    class Raising(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # pyright: ignore
            raise Failure

    model = converted()
    with pytest.raises(Failure):
        Raising([torch.zeros(1, requires_grad=True)], lr=1.0).step()
    with pytest.warns(UnclampWarning, match="sees no optimizer step"):
        train_by_hand(model)


@pytest.mark.parametrize("by_name", [True, False])
def test_a_closure_may_change_weights_many_times_and_gives_its_loss_back(by_name: bool) -> None:
    model = converted()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, max_eval=40)
    x, losses = torch.randn(16, 4), list[float]()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert len(losses) > 3
    assert float(first.detach()) == losses[0]
