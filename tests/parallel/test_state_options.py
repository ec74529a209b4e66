"""Every way in which torch hands a model's state over on several ranks, with scaling state in it.

What is loaded has to be what was saved, on every rank; keys and errors are those that a plain
model has with a buffer in the place of each tensor of scaling state.
"""

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from ranks import run_ranks
from truths.wrapped import Kind, net, quiet, state_of, train, wrapped
from unclamp import weights_only
from unclamp.nn import find_ledgers

FULL = StateDictOptions(full_state_dict=True)
SENT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
SHARDED: tuple[Kind, ...] = ("ddp", "fsdp2")


def _trained(kind: Kind, seed: int = 0, steps: int = 3) -> nn.Module:
    model = wrapped(net(seed), kind)
    train(model, SGD(model.parameters(), lr=0.05), kind, range(10 * seed, 10 * seed + steps))
    return model


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() for key, value in state.items()}


def _whole(model: nn.Module) -> dict[str, Any]:
    return _copied(get_model_state_dict(model, options=FULL))


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@quiet
def _get(rank: int, kind: Kind) -> dict[str, bool]:
    model = _trained(kind)
    want = _whole(model)
    offloaded = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    next(model.parameters()).requires_grad_(False)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    thawed = get_model_state_dict(model, options=options)
    return {
        "keys are the plain model's": list(weights_only(want))
        == ["0.weight", "0.bias", "2.weight"],
        "all of it is there": len(want) == 3 + 2 * 7,
        "no DTensor": not any(isinstance(value, DTensor) for value in want.values()),
        "offloaded to rank 0": _same(offloaded, want if rank == 0 else {}),
        "without the frozen": want.keys() - thawed.keys() == {"0.weight"},
    }


@quiet
def _set(rank: int, kind: Kind) -> dict[str, bool]:
    model = _trained(kind)
    want, known = _whole(model), state_of(model)
    each = _trained(kind, seed=1)
    set_model_state_dict(each, _copied(want), options=FULL)
    sent = _trained(kind, seed=2)
    set_model_state_dict(sent, _copied(want) if rank == 0 else {}, options=SENT)
    lax = _trained(kind, seed=3)
    some = {k: v.clone() for k, v in want.items() if not k.startswith("2.unclamp_input")}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    before = _whole(lax)
    set_model_state_dict(lax, {"0.bias": want["0.bias"]} if rank == 0 else {}, options=options)
    stays = _same(_whole(lax), {**before, "0.bias": want["0.bias"]})
    set_model_state_dict(lax, some if rank == 0 else {}, options=options)
    after = _whole(lax)
    lost = {k for k, v in after.items() if not torch.equal(v, want[k])}
    return {
        "to each": _same(_whole(each), want) and state_of(each) == known,
        "sent": _same(_whole(sent), want) and state_of(sent) == known,
        "what is not spoken of stays": stays
        and all(torch.equal(after[k], before[k]) for k in lost),
        "not strict": lost == {"2.unclamp_input_scale", "2.unclamp_input_amax_history"},
    }


@quiet
def _set_weights(rank: int, kind: Kind) -> dict[str, bool]:
    want = weights_only(_whole(_trained(kind)))
    loaded = {}
    for n, options in enumerate((FULL, SENT)):
        for strict in (True, False):
            model = _trained(kind, seed=1 + n)
            options.strict = strict
            given = {} if options.broadcast_from_rank0 and rank else _copied(want)
            set_model_state_dict(model, given, options=options)
            (ledger,) = find_ledgers(model)
            name = f"sent={options.broadcast_from_rank0} strict={strict}"
            loaded[name] = _same(weights_only(_whole(model)), want)
            loaded[f"{name}, forgotten"] = bool((ledger.scale == 0).all())
    return loaded


@quiet
def _with_optimizer(rank: int, kind: Kind, flat: bool) -> bool:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = wrapped(net(), kind), wrapped(net(seed=1), kind)
    optimizer, others = AdamW(model.parameters(), lr=0.01), AdamW(other.parameters(), lr=0.01)
    train(model, optimizer, kind, range(3))
    train(other, others, kind, range(10, 11))
    state, moments = get_state_dict(model, optimizer, options=options)
    set_state_dict(
        other,
        others,
        model_state_dict=state,
        optim_state_dict=copy.deepcopy(moments),  # Adam would share them
        options=options,
    )
    ends = [train(m, o, kind, range(3, 6)) for m, o in ((model, optimizer), (other, others))]
    return ends[0] == ends[1] and state_of(model) == state_of(other)


def _each_kind(rank: int, work: Any, *args: Any) -> dict[Kind, Any]:
    return {kind: work(rank, kind, *args) for kind in SHARDED}


@pytest.mark.parametrize("work", [_get, _set, _set_weights])
def test_torch_gets_and_sets_the_whole_state(work: Any) -> None:
    for results in run_ranks(2, _each_kind, work):
        for kind, checks in results.items():
            assert [f"{kind}: {check}" for check, holds in checks.items() if not holds] == []


@pytest.mark.parametrize("flat", [False, True])
def test_the_optimizers_state_goes_with_it(flat: bool) -> None:
    assert run_ranks(2, _each_kind, _with_optimizer, flat) == [dict.fromkeys(SHARDED, True)] * 2


@quiet
def _of_fsdp1(rank: int) -> dict[str, bool]:
    # Not `rank0_only`: on CPUs torch 2.13 crashes in it, with a plain model too.
    model, checks = _trained("fsdp1"), {}
    known = state_of(model)
    for kind, config in (
        (StateDictType.FULL_STATE_DICT, FullStateDictConfig()),
        (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()),
    ):
        other = _trained("fsdp1", seed=1)
        with FullyShardedDataParallel.state_dict_type(model, kind, config):
            state = model.state_dict()
        with FullyShardedDataParallel.state_dict_type(other, kind, config):
            other.load_state_dict(state)
        checks[f"{kind.name}"] = state_of(other) == known and _same(_whole(other), _whole(model))
    return checks


def test_fsdp1_saves_and_loads_in_each_of_its_ways() -> None:
    for checks in run_ranks(2, _of_fsdp1):
        assert [check for check, holds in checks.items() if not holds] == []


def _of_ddp(rank: int) -> list[bool]:
    model, other = _trained("ddp"), _trained("ddp", seed=1)
    assert isinstance(model, DistributedDataParallel)
    other.load_state_dict(model.state_dict())
    plain = net(seed=2)
    plain.load_state_dict(model.module.state_dict())
    plain_keys = list(plain.state_dict())
    return [
        list(model.state_dict()) == [f"module.{key}" for key in plain_keys],
        state_of(other) == state_of(model),
        state_of(plain) == state_of(model),
    ]


def test_ddp_saves_under_its_own_prefix() -> None:
    assert run_ranks(2, _of_ddp) == [[True] * 3] * 2


def _entry_by_entry(rank: int) -> list[bool]:
    """Do what accelerate's `fsdp2_load_full_state_dict` does: hand over each entry by its mesh."""
    donor = net(is_alone=True)
    train(donor, SGD(donor.parameters(), lr=0.05), "plain", range(3))
    full = donor.state_dict()
    model = wrapped(net(seed=1).to("meta"), "fsdp2")
    sharded = {}
    for key, entry in model.state_dict().items():
        assert isinstance(entry, DTensor)
        kind = entry.device_mesh.device_type
        value = full[key].to(kind) if rank == 0 else torch.empty(entry.size(), dtype=entry.dtype)
        dist.broadcast(value, src=0)
        sharded[key] = distribute_tensor(value, entry.device_mesh, entry.placements)
    model.load_state_dict(sharded, assign=True)
    return [
        list(model.state_dict()) == list(full),
        state_of(model) == state_of(donor),
        _same(_whole(model), full),
    ]


def test_a_sharded_state_is_handed_over_entry_by_entry_as_accelerate_does() -> None:
    assert run_ranks(2, _entry_by_entry) == [[True] * 3] * 2


@quiet
def _onto_meta(rank: int) -> list[bool]:
    want, known = {}, None
    donor = net(is_alone=True)
    train(donor, SGD(donor.parameters(), lr=0.05), "plain", range(3))
    want, known = donor.state_dict(), state_of(donor)
    model = wrapped(net(seed=1).to("meta"), "fsdp2")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, _copied(want) if rank == 0 else {}, options=options)
    return [state_of(model) == known, _same(_whole(model), want)]


def test_a_model_on_meta_gets_all_of_it_from_rank_0() -> None:
    assert run_ranks(2, _onto_meta) == [[True] * 2] * 2


@quiet
def _by_accelerate(rank: int) -> bool:
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict  # pyright: ignore

    donor = net(is_alone=True)
    train(donor, SGD(donor.parameters(), lr=0.05), "plain", range(3))
    model = wrapped(net(seed=1).to("meta"), "fsdp2")
    accelerator: Any = SimpleNamespace(is_main_process=rank == 0)
    fsdp2_load_full_state_dict(accelerator, model, donor.state_dict() if rank == 0 else {})
    return state_of(model) == state_of(donor)


def test_accelerate_hands_a_whole_state_over() -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    assert run_ranks(2, _by_accelerate) == [True, True]
