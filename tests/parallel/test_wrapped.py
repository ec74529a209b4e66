"""Under every wrapper a training has the scales of one process that sees the whole batch."""

import functools
import itertools
import warnings
from typing import Any

import pytest
import torch

import unclamp
from ranks import run_ranks
from unclamp.nn import find_ledgers
from wrapped import Case, Net, Trained, batches, recipe, train, wrap

CASES = {
    "ddp": Case(wrapper="ddp"),
    "ddp, converted after": Case(wrapper="ddp", after=True),
    "ddp, accumulation": Case(wrapper="ddp", microsteps=2),
    "ddp, static graph": Case(wrapper="ddp", static=True),
    "ddp, reentrant checkpointing": Case(wrapper="ddp", reentrant=True, static=True),
    "ddp, checkpointing": Case(wrapper="ddp", reentrant=False),
    "ddp, guarded": Case(wrapper="ddp", scaling="guarded"),
    "ddp, static": Case(wrapper="ddp", scaling="static"),
    "fsdp1": Case(wrapper="fsdp1"),
    "fsdp1, converted after": Case(wrapper="fsdp1", after=True),
    "fsdp1, flat": Case(wrapper="fsdp1", flat=True),
    "fsdp2": Case(wrapper="fsdp2"),
    "fsdp2, converted after": Case(wrapper="fsdp2", after=True),
    "fsdp2, kept whole": Case(wrapper="fsdp2", reshard=False),
    "fsdp2, offload": Case(wrapper="fsdp2", offload=True),
    "fsdp2, accumulation": Case(wrapper="fsdp2", microsteps=2),
    "fsdp2, accumulation, kept whole": Case(wrapper="fsdp2", microsteps=2, reshard=False),
    "fsdp2, reentrant checkpointing": Case(wrapper="fsdp2", reentrant=True),
    "fsdp2, checkpointing": Case(wrapper="fsdp2", reentrant=False),
    "fsdp2, guarded": Case(wrapper="fsdp2", scaling="guarded"),
    "fsdp2, the root alone": Case(wrapper="root"),
    "fsdp2, the root alone, whole": Case(wrapper="root", by_hand=True),
}


def _differ(many: Trained, one: Trained) -> float:
    """Return the largest relative difference of any scale, amax or loss."""
    pairs = [(many.scales, one.scales), (many.histories, one.histories)]
    worst = 0.0
    for ours, theirs in pairs:
        a, b = torch.tensor(ours), torch.tensor(theirs)
        assert torch.equal(a == 0, b == 0)
        worst = max(worst, float(((a - b).abs() / b.abs().clamp(min=1e-30)).max()))
    return worst


@functools.cache
def _alone(case: Case, ranks: int) -> Trained:
    return run_ranks(1, train, case, ranks)[0]


def _check(case: Case, ranks: int, *, most: float = 1e-6, alone: Case | None = None) -> None:
    several = run_ranks(ranks, train, case, ranks)
    plain = Case(wrapper="none", microsteps=case.microsteps, scaling=case.scaling)
    one = _alone(alone or plain, ranks)
    for other in several[1:]:
        assert (other.scales, other.histories) == (several[0].scales, several[0].histories)
    assert several[0].updates == one.updates
    # Before weights have moved all tensors are equal: so are scales and histories, to the bit.
    assert several[0].scales[0] == one.scales[0]
    assert several[0].histories[0] == one.histories[0]
    assert _differ(several[0], one) <= most
    losses = torch.tensor([each.losses for each in several]).sum(0)
    torch.testing.assert_close(losses, torch.tensor(one.losses), rtol=max(most, 1e-6), atol=0)


@pytest.mark.parametrize("name", CASES)
def test_scales_are_those_of_one_process(name: str) -> None:
    _check(CASES[name], 2)


def test_hybrid_shards_have_the_scales_of_one_process() -> None:
    _check(Case(wrapper="hsdp"), 4)


def test_mixed_precision_has_the_scales_of_one_process() -> None:
    """bfloat16 rounds what sums in another order have moved by little."""
    case = Case(wrapper="fsdp2", bf16=True)
    _check(case, 2, most=2e-2, alone=case)


def test_unused_layers_keep_one_state() -> None:
    """The first scale is each rank's own there, so that only the ranks are equal."""
    several = run_ranks(2, train, Case(wrapper="ddp", unused=True), 2)
    (one,) = run_ranks(1, train, Case(wrapper="none", unused=True), 2)
    assert several[0].scales == several[1].scales
    assert several[0].histories == several[1].histories
    assert several[0].updates == one.updates
    spare = slice(9, 12)
    for step, (scales, histories) in enumerate(
        zip(several[0].scales, several[0].histories, strict=True)
    ):
        measured = sum(amax > 0 for amax in itertools.chain(*histories[spare]))
        assert measured == 3 * min((step + 1) // 2, 2)
        assert all(scale > 0 for scale in scales[spare]) == (step > 0)


def _compiled(rank: int, wrapper: str) -> tuple[Any, list[bool]]:
    warnings.simplefilter("ignore")  # of torch's compiler, of what it does itself
    torch.manual_seed(0)
    net = Net()
    unclamp.convert(net, recipe("delayed"))
    net.middle.compile(backend="aot_eager", fullgraph=True)
    model = wrap(net, Case(wrapper=wrapper))
    optimizer, (ledger,) = torch.optim.SGD(model.parameters(), lr=0.5), find_ledgers(model)
    states, grew = [], []
    for (batch,) in batches(3, 1, 2):
        model(batch[rank]).square().sum().div(2**10).backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append((ledger.scale.tolist(), ledger.amax_history.tolist(), ledger.updates))
        grew.append(ledger.updates == len(states))
    return states, grew


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_compiled_layers_share_their_scales(wrapper: str) -> None:
    first, second = run_ranks(2, _compiled, wrapper)
    assert first == second
    assert first[1] == [True] * 3
