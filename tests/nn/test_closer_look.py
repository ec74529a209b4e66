"""The closer look in a model: which casts get it, what it says, and that it disturbs nothing."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import Delayed, Dynamic, Guarded, PerBlock, PerRow, Recipe, Static
from unclamp.nn import find_ledgers
from unclamp.nn.update import Update
from unclamp.numerics import Stat
from unclamp.numerics.inspection import (
    EXPONENTS,
    INSPECTED,
    INSPECTED_SQUARE,
    MAGNITUDES,
    PRICES,
)

ROLES = 3


def made(recipe=None, layers=2):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    unclamp.convert(model, recipe or Recipe())
    (ledger,) = find_ledgers(model)
    heard: list[Update] = []
    ledger.subscribe(heard.append)
    return model, ledger, heard


def train(model, sizes, call=None, microsteps=1):
    optimizer = SGD(model.parameters(), lr=0.01)
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for _ in range(microsteps):
            (call or model)(torch.randn(5, 8) * size).square().mean().backward()
        optimizer.step()


def test_nothing_is_inspected_unless_asked_for():
    model, _, heard = made()
    train(model, [1, 1])
    assert [update.details for update in heard] == [None, None]


def test_every_cast_is_inspected_and_its_elements_counted():
    model, ledger, heard = made()
    ledger.inspect("always")
    train(model, [1, 2], microsteps=3)
    for update in heard:
        assert update.details is not None
        assert update.details[:, INSPECTED].tolist() == [3] * 2 * ROLES
        finite = update.stats[:, Stat.ELEMENTS]
        assert torch.equal(update.details[:, MAGNITUDES].sum(1), finite)
        assert (update.details[:, EXPONENTS].sum(1) <= finite).all()
        torch.testing.assert_close(
            update.details[:, INSPECTED_SQUARE], update.stats[:, Stat.SQUARE], rtol=1e-6, atol=0
        )


def test_asked_for_what_clamped_only_that_is_inspected():
    model, ledger, heard = made(Recipe(input=Delayed(history_len=4)))
    ledger.inspect("clamped")
    train(model, [1, 1, 50, 1])
    for update in heard:
        details = update.details
        assert details is not None
        clamped = update.stats[:, Stat.SATURATED] > 0
        assert torch.equal(details[:, INSPECTED] > 0, clamped)
    assert sum(int((u.stats[:, Stat.SATURATED] > 0).sum()) for u in heard) > 0


def test_inspection_ends_and_begins_again():
    model, ledger, heard = made()
    for mode in ("always", "never", "always"):
        ledger.inspect(mode)
        train(model, [1])
    assert [update.details is not None for update in heard] == [True, False, True]
    assert all(u.details[:, INSPECTED].max() == 1 for u in heard if u.details is not None)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_a_cast_is_inspected_once(reentrant):
    model, ledger, heard = made()
    ledger.inspect("always")
    x_of = lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)  # noqa: E731
    train(model, [1], call=x_of)
    assert heard[0].details is not None
    assert heard[0].details[:, INSPECTED].tolist() == [1] * 2 * ROLES


def test_operands_cast_along_both_axes_count_twice():
    row = Dynamic(granularity=PerRow())
    model, ledger, heard = made(Recipe(input=row, grad_output=row))
    ledger.inspect("always")
    train(model, [1])
    assert heard[0].details is not None
    looks, casts = heard[0].details[:, INSPECTED], heard[0].stats[:, Stat.CASTS]
    assert torch.equal(looks, casts)
    assert looks.max() == 2


def test_inspection_changes_no_number():
    model, ledger, _ = made()
    twin = copy.deepcopy(model)
    ledger.inspect("always")
    train(model, [1, 30, 1])
    train(twin, [1, 30, 1])
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_copy_and_a_new_layout_keep_working():
    model, ledger, heard = made()
    ledger.inspect("always")
    train(model, [1])
    unclamp.switch(model, "0", input=Delayed(history_len=64))
    train(model, [1])
    twin = copy.deepcopy(model)
    train(twin, [1])
    assert [update.details is not None for update in heard] == [True, True]
    assert find_ledgers(twin)[0].inspection == "never"


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_it_says_the_same_and_compiles_once_more():
    torch._dynamo.reset()
    (eager, ledger, want), (model, other, got) = made(), made()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for mode in ("never", "always", "never", "clamped", "always"):
        ledger.inspect(mode)
        other.inspect(mode)
        train(eager, [1, 40])
        train(model, [1, 40], call=compiled)
    assert len(want) == len(got) == 10
    for a, b in zip(want, got, strict=True):
        assert (a.details is None) == (b.details is None)
        if a.details is not None and b.details is not None:
            told, same = a.details[:, :PRICES], b.details[:, :PRICES]
            torch.testing.assert_close(same, told, rtol=1e-12, atol=0)
            assert not b.details[:, PRICES:].any()  # what a compiled graph casts has no price
    assert backend.frame_count <= 3  # one for each of the three modes
    torch._dynamo.reset()


# ---- the age of a scale ---------------------------------------------------------------------


def ages_of_input(scaling, sizes, **other):
    model, ledger, heard = made(Recipe(input=scaling, **other), layers=1)
    ledger.inspect("always")
    optimizer = SGD(model.parameters(), lr=0.0)
    for size in sizes:
        model(torch.full((2, 8), float(size))).sum().backward()
        optimizer.step()
    return [int(u.scale_age[0]) for u in heard if u.scale_age is not None]


def test_the_age_of_a_delayed_scale_counts_from_its_amax():
    # Window 3. Step 0 seeds itself. The 9 of step 1 rules from step 2 to step 4.
    assert ages_of_input(Delayed(history_len=3), [1, 9, 2, 3, 1, 1, 1]) == [0, 1, 1, 2, 3, 2, 3]


def test_the_newest_of_equal_amaxes_counts():
    assert ages_of_input(Delayed(history_len=4), [5, 5, 5, 5]) == [0, 1, 1, 1]


def test_most_recent_is_a_step_old_and_dynamic_new():
    recent = Delayed(history_len=4, reduce="most_recent")
    assert ages_of_input(recent, [9, 1, 1, 1]) == [0, 1, 1, 1]
    assert ages_of_input(Dynamic(), [9, 1, 1]) == [0, 0, 0]


def test_a_static_scale_and_a_reduction_of_ones_own_have_no_age():
    assert ages_of_input(Static(scale=2.0), [1, 2]) == [-1, -1]
    mean = Delayed(history_len=4, reduce=lambda history: history.mean(1))
    assert ages_of_input(mean, [1, 2])[1:] == [-1]


def test_of_blocks_the_oldest_counts():
    blocks = Guarded(history_len=4, granularity=PerBlock(4, 4))
    model, ledger, heard = made(Recipe(weight=blocks), layers=1)
    ledger.inspect("always")
    weight = next(model.parameters())
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer = SGD(model.parameters(), lr=0.0)
    for step in range(3):
        with torch.no_grad():
            weight[0, 0] = 1 + step  # one block's amax is renewed, the others' equal
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert [int(u.scale_age[1]) for u in heard if u.scale_age is not None] == [0, 1, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_the_default_compiler_hands_the_looks_over_too():
    torch._dynamo.reset()
    (eager, ledger, want), (model, other, got) = made(layers=1), made(layers=1)
    compiled = torch.compile(model, fullgraph=True)
    for mode in ("always", "never", "always"):
        ledger.inspect(mode)
        other.inspect(mode)
        train(eager, [1])
        train(model, [1], call=compiled)
    for a, b in zip(want, got, strict=True):
        assert (a.details is None) == (b.details is None)
        if a.details is not None and b.details is not None:
            assert torch.equal(a.details[:, INSPECTED], b.details[:, INSPECTED])
    torch._dynamo.reset()


def test_of_several_who_ask_the_one_who_wants_most_decides():
    _, ledger, _ = made()
    one, other = object(), object()
    ledger.inspect("always", by=one)
    ledger.inspect("clamped", by=other)
    assert ledger.inspection == "always"
    ledger.inspect("never", by=one)
    assert ledger.inspection == "clamped"


def test_listeners_do_not_share_what_they_hear():
    model, ledger, heard = made()
    more: list[Update] = []
    ledger.subscribe(more.append)
    ledger.inspect("always")
    train(model, [1])
    assert heard[0].details is not None
    assert more[0].details is not None
    heard[0].details.zero_()
    assert more[0].details.sum() > 0


class Asking:
    """Someone who asks for closer looks."""


def test_the_wish_of_one_who_is_gone_is_not_taken_for_that_of_another():
    _, ledger, _ = made()
    asking = Asking()
    ledger.inspect("always", by=asking)
    old = id(asking)
    del asking
    others = [Asking() for _ in range(50)]
    assert old not in {id(other) for other in others}  # nobody else has its number
    for other in others:
        ledger.inspect("never", by=other)
    assert ledger.inspection == "always"
