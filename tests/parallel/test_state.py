"""Scaling state of a model on several ranks: saved, and loaded on as many or as others.

The truth is the run that was never interrupted; for another number of ranks, the run of a model
that was given the whole state while it was plain, before it was wrapped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import SGD, AdamW

from ranks import run_ranks
from truths.wrapped import Kind, net, quiet, state_of, train, wrapped

ON_TWO: tuple[Kind, ...] = ("ddp", "fsdp1", "fsdp2")
ON_FOUR: tuple[Kind, ...] = ("hsdp", "fsdp2")
Ends = dict[Kind, tuple[list[float], list[list[float]]]]
"""Losses and scaling state at the end of a run, of one rank."""


def _save_and_go_on(rank: int, kinds: tuple[Kind, ...], folder: Path) -> Ends:
    return {kind: _saved(kind, folder / kind) for kind in kinds}


@quiet
def _saved(kind: Kind, path: Path) -> Any:
    model = wrapped(net(), kind)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, kind, range(3))
    state, others = get_state_dict(model, optimizer)
    save({"model": state, "optimizer": others}, checkpoint_id=path)
    full: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    all_of_it = {key: value.clone() for key, value in full.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(all_of_it, path.with_suffix(".pt"))
    return train(model, optimizer, kind, range(3, 6)), state_of(model)


def _load_and_go_on(rank: int, kinds: tuple[Kind, ...], folder: Path) -> Ends:
    return {kind: _resumed(kind, folder / kind) for kind in kinds}


@quiet
def _resumed(kind: Kind, path: Path) -> Any:
    model = wrapped(net(seed=1), kind)
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, kind, range(10, 12))
    state, others = get_state_dict(model, optimizer)
    load({"model": state, "optimizer": others}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=others)
    return train(model, optimizer, kind, range(3, 6)), state_of(model)


def _both(rank: int, paths: tuple[Path, ...], kinds: tuple[Kind, ...]) -> list[tuple[Any, Any]]:
    return [(_loaded(kind, path), _given(kind, path)) for path in paths for kind in kinds]


@quiet
def _loaded(kind: Kind, path: Path) -> Any:
    model = wrapped(net(seed=1), kind)
    optimizer = SGD(model.parameters(), lr=0.05)
    train(model, optimizer, kind, range(10, 11))
    state = get_model_state_dict(model)
    load({"model": state}, checkpoint_id=path)
    set_model_state_dict(model, state)
    return state_of(model), train(model, optimizer, kind, range(3, 6)), state_of(model)


@quiet
def _given(kind: Kind, path: Path) -> Any:
    plain = net(seed=2)
    plain.load_state_dict(torch.load(path.with_suffix(".pt")))
    known, model = state_of(plain), wrapped(plain, kind)
    optimizer = SGD(model.parameters(), lr=0.05)
    return known, train(model, optimizer, kind, range(3, 6)), state_of(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def on_two(folder: Path) -> list[Ends]:
    """Return how the runs on two ranks ended that left checkpoints."""
    return run_ranks(2, _save_and_go_on, ON_TWO, folder)


def test_a_resumed_run_goes_on_bit_for_bit(on_two: list[Ends], folder: Path) -> None:
    assert run_ranks(2, _load_and_go_on, ON_TWO, folder) == on_two


def test_one_process_goes_on_from_two_ranks(on_two: list[Ends], folder: Path) -> None:
    for loaded, given in _both(0, tuple(folder / kind for kind in ON_TWO), ("plain",)):
        assert loaded == given


def test_two_ranks_go_on_from_one_process(tmp_path: Path) -> None:
    _saved("plain", tmp_path / "plain")
    for rank in run_ranks(2, _both, (tmp_path / "plain",), ON_TWO):
        for loaded, given in rank:
            assert loaded == given


def test_four_ranks_and_then_two_of_them(tmp_path: Path) -> None:
    ends = run_ranks(4, _save_and_go_on, ON_FOUR, tmp_path)
    assert run_ranks(4, _load_and_go_on, ON_FOUR, tmp_path) == ends
    for rank in run_ranks(2, _both, tuple(tmp_path / kind for kind in ON_FOUR), ("ddp", "fsdp2")):
        for loaded, given in rank:
            assert loaded == given
