"""A part that is reverted is forgotten by whatever followed it; the rest trains on as before."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import Delayed, Recipe, Recorder, UnclampWarning
from unclamp.nn import Ledger, find_ledgers
from unclamp.report.view import build_view

RECIPE = Recipe.uniform(Delayed(history_len=4))
INPUT = 0
Step = Callable[[], None]


def converted() -> tuple[nn.Sequential, Ledger]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    unclamp.convert(model, RECIPE)
    return model, find_ledgers(model)[0]


def by_an_optimizer(model: nn.Sequential) -> Step:
    return torch.optim.SGD(model.parameters(), lr=0.1).step


def by_two(model: nn.Sequential, *, turned: bool = False) -> Step:
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]

    def step() -> None:
        for optimizer in reversed(optimizers) if turned else optimizers:
            optimizer.step()

    return step


def by_two_turned(model: nn.Sequential) -> Step:
    return by_two(model, turned=True)


def by_hand(model: nn.Sequential) -> Step:
    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.1 * parameter.grad)

    return step


def by_hand_and_told(model: nn.Sequential) -> Step:
    step = by_hand(model)

    def told() -> None:
        step()
        unclamp.step(model)

    return told


@contextmanager
def recorded(model: nn.Module, path: Path, *, is_open: bool) -> Iterator[Step]:
    """Give what records a step, where a recorder is open; no warning comes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not is_open:
            yield lambda: None
            return
        with Recorder(model, path) as recorder:
            yield recorder.step


def train(model: nn.Module, amaxes: list[float], step: Step, record: Step) -> Tensor:
    """Train on inputs with these largest magnitudes; return the last output."""
    output = torch.empty(0)
    for amax in amaxes:
        model.zero_grad()
        output = model(torch.tensor([[amax, 0.5, -0.25, 0.125]]))
        output.sum().backward()
        step()
        record()
    return output


def history(model: nn.Sequential, place: int = 0) -> list[float]:
    """Return the amax history of a layer's input, newest first."""
    return model[place].state_dict()["unclamp_input_amax_history"].tolist()


HOW = [by_an_optimizer, by_two, by_two_turned, by_hand_and_told, by_hand]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_part_is_reverted_and_converted_again(
    how: Callable[[nn.Sequential], Step], is_open: bool, steps_before: int, tmp_path: Path
) -> None:
    if how is by_hand and not is_open:
        pytest.skip("only a recorder could see those steps")
    model, ledger = converted()
    step = how(model)
    with recorded(model, tmp_path / "run", is_open=is_open) as record:
        train(model, [1.0, 2.0][:steps_before], step, record)
        unclamp.revert(model[2])
        # Held while it trains on: its graph holds what the reverted layer had.
        output = train(model, [3.0, 4.0], step, record)
        assert ledger.updates == steps_before + 2
        assert history(model) == ([4, 3, 2, 1] if steps_before else [4, 3, 0, 0])
        assert not ledger.has_pending
        unclamp.convert(model, RECIPE)
        assert find_ledgers(model) == [ledger]
        train(model, [5.0, 6.0], step, record)
    assert ledger.updates == steps_before + 4
    assert history(model) == [6, 5, 4, 3]
    newest, before, *older = history(model, 2)
    assert min(newest, before) > 0
    assert older == [0, 0]  # the new layer knows its two steps, and nothing of the old one
    assert output.shape == (1, 4)
    if is_open:
        assert build_view(tmp_path / "run").notes == []


@pytest.mark.parametrize("how", HOW[:-1])
def test_a_part_is_reverted_between_backward_and_step(
    how: Callable[[nn.Sequential], Step],
) -> None:
    model, ledger = converted()
    step = how(model)
    for amax in (1.0, 2.0, 3.0):
        model.zero_grad()
        model(torch.full((1, 4), amax)).sum().backward()
        if amax == 2.0:
            unclamp.revert(model[0])
        step()
    assert ledger.updates == 3
    assert not ledger.has_pending
    assert all(amax > 0 for amax in history(model, 2)[:3])


@pytest.mark.parametrize("how", HOW)
def test_the_whole_is_reverted_under_an_open_recorder(
    how: Callable[[nn.Sequential], Step], tmp_path: Path
) -> None:
    model, ledger = converted()
    step = how(model)
    with recorded(model, tmp_path / "run", is_open=True) as record:
        train(model, [1.0, 2.0], step, record)
        unclamp.revert(model)
        if how is not by_hand_and_told:
            train(model, [3.0] * 10, step, record)
    assert ledger.updates == 2
    assert build_view(tmp_path / "run").notes == []


def test_a_recorder_says_that_it_does_not_hear_what_was_converted_anew(tmp_path: Path) -> None:
    model, ledger = converted()
    step = by_an_optimizer(model)
    with Recorder(model, tmp_path / "run") as recorder:
        train(model, [1.0, 2.0], step, recorder.step)
        unclamp.revert(model)
        unclamp.convert(model, RECIPE)
        with pytest.warns(UnclampWarning, match="reverted and converted again") as caught:
            train(model, [3.0, 4.0] * 5, step, recorder.step)
    assert len(caught) == 1
    assert ledger.updates == 2
    (anew,) = find_ledgers(model)
    assert anew.updates == 10
    assert history(model) == [4, 3, 4, 3]


def test_a_part_that_is_converted_apart_after_it_was_reverted_has_scales_of_its_own() -> None:
    model, ledger = converted()
    step = by_an_optimizer(model)
    train(model, [1.0, 2.0], step, lambda: None)
    unclamp.revert(model[0])
    unclamp.convert(model[0], RECIPE)
    train(model, [3.0], step, lambda: None)
    assert history(model) == [3, 0, 0, 0]
    assert [each.updates for each in find_ledgers(model)] == [1, 3]
    assert ledger.updates == 3


def test_a_copy_of_a_partly_reverted_model_makes_one_step_a_step() -> None:
    model, _ = converted()
    train(model, [1.0], by_an_optimizer(model), lambda: None)
    unclamp.revert(model[2])
    twin = copy.deepcopy(model)
    gc.collect()
    train(twin, [2.0, 3.0], by_two_turned(twin), lambda: None)
    (ledger,) = find_ledgers(twin)
    assert ledger.updates == 3
    assert not ledger.has_pending
    assert history(twin) == [3, 2, 1, 0]


@pytest.mark.parametrize("first", [0, 2])
def test_steps_that_nobody_sees_are_warned_of_after_the_watched_part_is_reverted(
    first: int,
) -> None:
    model, _ = converted()

    def train_unseen(steps: int) -> None:
        for _ in range(steps):
            model.zero_grad()
            model(torch.randn(3, 4)).sum().backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.data = parameter.data - 0.1 * parameter.grad  # has no version

    train_unseen(2)
    unclamp.revert(model[first])
    with pytest.warns(UnclampWarning, match="sees no optimizer step"):
        train_unseen(12)
