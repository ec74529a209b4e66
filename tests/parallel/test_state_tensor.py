"""Scaling state under tensor parallelism: histories of a rank's own blocks find their place.

Layers are 12 to 10 (column-wise) and 10 to 6 (row-wise), on two ranks: [5, 12] and [6, 5] each.
Blocks of 5 by 5 lie on one rank each; those of 2 by 2 and rows do not all.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import SGD

from ranks import run_ranks
from truths.wrapped import Kind, net, quiet, state_of, train, wrapped
from unclamp import Delayed, Dynamic, PerBlock, PerRow, Recipe
from unclamp.nn import find_ledgers

# Only the weights' scales remember, so that no rank's run depends on what others measured.
WHOLE_BLOCKS = Recipe(
    input=Dynamic(),
    weight=Delayed(history_len=4, granularity=PerBlock(5, 5)),
    grad_output=Dynamic(),
)
ON_BOTH = [
    Recipe(weight=Delayed(history_len=4, granularity=grain)) for grain in (PerBlock(2, 2), PerRow())
]


def _own(model: nn.Module) -> list[Any]:
    """Return the histories of both weights that this rank has."""
    (ledger,) = find_ledgers(model)
    return [ledger.history_of(index).tolist() for index in (1, 4)]


@quiet
def _save_and_go_on(rank: int, kind: Kind, path: Path) -> Any:
    model = wrapped(net(recipe=WHOLE_BLOCKS), kind)
    optimizer = SGD(model.parameters(), lr=0.05)
    train(model, optimizer, kind, range(3))
    save(get_model_state_dict(model), checkpoint_id=path)
    own = _own(model)
    return own, train(model, optimizer, kind, range(3, 6)), _own(model)


@quiet
def _load_and_go_on(rank: int, kind: Kind, path: Path, has_trained: bool) -> Any:
    model = wrapped(net(seed=1, recipe=WHOLE_BLOCKS), kind)
    optimizer = SGD(model.parameters(), lr=0.05)
    if has_trained:
        train(model, optimizer, kind, range(10, 11))
    state = get_model_state_dict(model)
    load(state, checkpoint_id=path)
    set_model_state_dict(model, state)
    own = _own(model)
    return own, train(model, optimizer, kind, range(3, 6)), _own(model)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(("kind", "count"), [("tp", 2), ("fsdp2+tp", 4)])
def test_blocks_go_on_bit_for_bit_and_find_their_place(
    kind: Kind, count: int, tmp_path: Path
) -> None:
    ends = run_ranks(count, _save_and_go_on, kind, tmp_path)
    for has_trained in (False, True):
        assert run_ranks(count, _load_and_go_on, kind, tmp_path, has_trained) == ends
    # [5, 12] in blocks of 5 by 5 is [1, 3]; [6, 5] is [2, 1]. All of it: [2, 3] and [2, 2].
    first, second = (torch.tensor(ends[n][0][0]) for n in (0, 1))
    by_rows = torch.cat([first, second])
    first, second = (torch.tensor(ends[n][0][1]).reshape(2, 1, -1) for n in (0, 1))
    by_columns = torch.cat([first, second], dim=1)
    assert not torch.equal(first, second)
    plain = net(seed=1, recipe=WHOLE_BLOCKS)
    state = plain.state_dict()
    load(state, checkpoint_id=tmp_path)
    plain.load_state_dict(state)
    (ledger,) = find_ledgers(plain)
    assert torch.equal(ledger.history_of(1), by_rows)
    assert torch.equal(ledger.history_of(4), by_columns.flatten(0, 1))


@quiet
def _spread(rank: int, path: Path, full: dict[str, Tensor]) -> list[list[float]]:
    model = wrapped(net(seed=1, recipe=WHOLE_BLOCKS), "tp")
    state = get_model_state_dict(model)
    load(state, checkpoint_id=path)
    set_model_state_dict(model, state)
    sent = wrapped(net(seed=2, recipe=WHOLE_BLOCKS), "tp")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(sent, dict(full) if rank == 0 else {}, options=options)
    assert state_of(sent) == state_of(model)
    return _own(model)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_blocks_of_one_process_are_spread(tmp_path: Path) -> None:
    plain = net(recipe=WHOLE_BLOCKS)
    train(plain, SGD(plain.parameters(), lr=0.05), "plain", range(3))
    save(plain.state_dict(), checkpoint_id=tmp_path)
    (ledger,) = find_ledgers(plain)
    by_rows, by_columns = ledger.history_of(1), ledger.history_of(4).reshape(2, 2, -1)
    full = {key: value.numpy() for key, value in plain.state_dict().items()}
    for rank, own in enumerate(run_ranks(2, _spread_arrays, tmp_path, full)):
        assert own[0] == by_rows[3 * rank : 3 * rank + 3].tolist()
        assert own[1] == by_columns[:, rank].tolist()


def _spread_arrays(rank: int, path: Path, full: dict[str, Any]) -> list[list[float]]:
    return _spread(rank, path, {key: torch.tensor(value) for key, value in full.items()})


@quiet
def _forgetting(rank: int, path: Path) -> list[bool]:
    checks = []
    for number, recipe in enumerate(ON_BOTH):
        model, other = wrapped(net(recipe=recipe), "tp"), wrapped(net(1, recipe), "tp")
        optimizer = SGD(model.parameters(), lr=0.05)
        train(model, optimizer, "tp", range(3))
        train(other, SGD(other.parameters(), lr=0.05), "tp", range(10, 12))
        state = get_model_state_dict(model)
        save(state, checkpoint_id=path / str(number))
        other.load_state_dict(state)
        (ledger,), (own,) = find_ledgers(other), find_ledgers(model)
        for index in range(6):
            if index in (1, 4):
                checks.append(bool((ledger.scale_of(index) == 0).all()))
            else:
                checks.append(torch.equal(ledger.history_of(index), own.history_of(index)))
    return checks


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_blocks_on_two_ranks_are_saved_as_not_measured(tmp_path: Path) -> None:
    assert run_ranks(2, _forgetting, tmp_path) == [[True] * 12] * 2
    for number, recipe in enumerate(ON_BOTH):
        plain = net(seed=1, recipe=recipe)
        train(plain, SGD(plain.parameters(), lr=0.05), "plain", range(2))
        state = plain.state_dict()
        load(state, checkpoint_id=tmp_path / str(number))
        plain.load_state_dict(state)
        (ledger,) = find_ledgers(plain)
        for index in range(6):
            assert bool((ledger.scale_of(index) > 0).all()) == (index not in (1, 4))
