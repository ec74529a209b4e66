"""Experts in one parameter are, bit for bit, a list of linear layers, each with its own tokens."""

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import Delayed, Dynamic, Guarded, HighPrecision, PerBlock, PerRow, Recipe
from unclamp.names import ROLES
from unclamp.nn import find_ledgers, products_of
from unclamp.nn.ledger import Ledger
from unclamp.numerics import Stat
from unclamp.rule import Rule

EXPERTS, WIDTH, HIDDEN = 4, 16, 24


class Grouped(nn.Module):
    """A user's own experts; `turned` ones lie as torch's function wants them."""

    def __init__(self, *, turned: bool = False, has_bias: bool = False) -> None:
        super().__init__()
        shape = (EXPERTS, WIDTH, HIDDEN) if turned else (EXPERTS, HIDDEN, WIDTH)
        self.turned = turned
        self.up = nn.Parameter(torch.randn(shape) / 4)
        self.shift = nn.Parameter(torch.randn(EXPERTS, HIDDEN)) if has_bias else None

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each row's product."""
        weight = self.up if self.turned else self.up.mT
        return unclamp.grouped_mm(x, weight, offs, self.shift)


class TorchGrouped(Grouped):
    """The same by torch's own function, in a function of the module's file."""

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each row's product."""
        return run_grouped(x, self.up if self.turned else self.up.mT, offs)


def run_grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=offs)


class Listed(nn.Module):
    """The same experts as linear layers."""

    def __init__(self, grouped: Grouped) -> None:
        super().__init__()
        self.up = nn.ModuleList()
        for number in range(EXPERTS):
            layer = nn.Linear(WIDTH, HIDDEN, bias=grouped.shift is not None)
            weight = grouped.up[number].t() if grouped.turned else grouped.up[number]
            with torch.no_grad():
                layer.weight.copy_(weight)
                if grouped.shift is not None:
                    layer.bias.copy_(grouped.shift[number])
            self.up.append(layer)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each row's product."""
        starts = [0, *offs.tolist()]
        parts = [
            self.up[number](x[start:stop])
            for number, (start, stop) in enumerate(itertools.pairwise(starts))
            if stop > start
        ]
        return torch.cat(parts)


def offsets(*sizes: int) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def ledger_of(model: nn.Module) -> Ledger:
    (ledger,) = find_ledgers(model)
    return ledger


def stepped(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Return the outputs, the inputs' gradients and those of the parameters, step by step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for x, offs in batches:
        x = x.clone().requires_grad_()
        output = model(x, offs)
        (output * torch.arange(1.0, 1.0 + len(output)).view(-1, 1)).square().sum().backward()
        assert x.grad is not None
        grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        found.append((output.detach(), x.grad, grads))
        optimizer.step()
        optimizer.zero_grad()
    return found


def batches(*, seed: int = 1, sizes: Sequence[Sequence[int]] = ()) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    found = []
    for number, each in enumerate(
        sizes or [(5, 3, 7, 1), (4, 0, 6, 8), (0, 0, 9, 2), (3, 3, 3, 3)]
    ):
        x = torch.randn(sum(each), WIDTH) * 4.0**number
        found.append((x, offsets(*each)))
    return found


RECIPES = {
    "delayed": Recipe(),
    "guarded": Recipe(rules=(Rule(match="*", scalings=dict.fromkeys(ROLES, Guarded())),)),
    "dynamic": Recipe(rules=(Rule(match="*", scalings=dict.fromkeys(ROLES, Dynamic())),)),
    "rows": Recipe(
        rules=(Rule(match="*", scalings=dict.fromkeys(ROLES, Dynamic(granularity=PerRow()))),)
    ),
    "blocks": Recipe(
        rules=(
            Rule(
                match="*",
                scalings={
                    "input": Dynamic(granularity=PerBlock(1, 8)),
                    "weight": Delayed(granularity=PerBlock(8, 8)),
                    "grad_output": Dynamic(granularity=PerBlock(1, 8)),
                },
            ),
        )
    ),
}


@pytest.mark.parametrize("turned", [False, True], ids=["outputs-first", "inputs-first"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("made", [Grouped, TorchGrouped])
def test_a_bank_is_a_list_of_linear_layers_bit_for_bit(
    made: type[Grouped], recipe: Recipe, turned: bool
) -> None:
    torch.manual_seed(0)
    bank = made(turned=turned)
    listed = Listed(bank)
    report = unclamp.convert(bank, recipe)
    unclamp.convert(listed, recipe)
    assert list(report.converted) == [f"up.{number}" for number in range(EXPERTS)]
    pairs = zip(stepped(bank, batches()), stepped(listed, batches()), strict=True)
    for (output, dx, grads), (their_output, their_dx, their_grads) in pairs:
        assert torch.equal(output, their_output)
        assert torch.equal(dx, their_dx)
        for number in range(EXPERTS):
            theirs = their_grads.get(f"up.{number}.weight", torch.zeros(HIDDEN, WIDTH))
            assert torch.equal(grads["up"][number], theirs.t() if turned else theirs)
    one, other = ledger_of(bank), ledger_of(listed)
    for index in range(len(one.sites)):
        assert one.sites[index].name == other.sites[index].name
        assert torch.equal(one.history_of(index), other.history_of(index))
        assert torch.equal(one.scale_of(index), other.scale_of(index))


def test_a_bias_is_added_as_a_linear_layer_does() -> None:
    torch.manual_seed(0)
    bank = Grouped(has_bias=True)
    plain, listed = copy.deepcopy(bank), Listed(bank)
    x, offs = batches()[0]
    torch.testing.assert_close(plain(x, offs), listed(x, offs))
    unclamp.convert(bank, Recipe())
    unclamp.convert(listed, Recipe())
    for one, other in zip(stepped(bank, batches()), stepped(listed, batches()), strict=True):
        assert torch.equal(one[0], other[0])
        for number in range(EXPERTS):
            theirs = other[2].get(f"up.{number}.bias", torch.zeros(HIDDEN))
            assert torch.equal(one[2]["shift"][number], theirs)


def test_until_it_is_converted_and_after_it_is_reverted_it_is_torchs_function() -> None:
    torch.manual_seed(0)
    bank = Grouped()
    x, offs = batches()[0]
    expected = F.grouped_mm(x, bank.up.mT, offs=offs)
    assert torch.equal(bank(x, offs), expected)
    unclamp.convert(bank, Recipe())
    assert not torch.equal(bank(x, offs), expected)
    unclamp.revert(bank)
    assert type(bank) is Grouped
    assert torch.equal(bank(x, offs), expected)


@pytest.mark.parametrize("made", [Grouped, TorchGrouped])
def test_an_observed_bank_computes_what_the_plain_one_does_and_counts(made: type[Grouped]) -> None:
    torch.manual_seed(0)
    bank = made()
    plain, listed = copy.deepcopy(bank), Listed(bank)
    with unclamp.observe(bank) as mine, unclamp.observe(listed) as theirs:
        found, expected = stepped(bank, batches()), stepped(plain, batches())
        stepped(listed, batches())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2]["up"], other[2]["up"])
    counts = [(s.fqn, s.role, s.casts, s.elements, s.saturated) for s in mine.sites()]
    assert sorted(counts) == sorted(
        (s.fqn, s.role, s.casts, s.elements, s.saturated) for s in theirs.sites()
    )


def test_an_expert_without_tokens_keeps_its_history_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    bank = Grouped()
    unclamp.convert(bank, Recipe())
    stepped(bank, batches())
    ledger = ledger_of(bank)
    before = [ledger.history_of(index) for index in range(len(ledger.sites))]
    seen: list[Tensor] = []
    ledger.subscribe(lambda update: seen.append(update.stats))
    x = torch.randn(16, WIDTH)
    x[3:8] = 0  # expert 0 has 3 tokens and 5 rows of padding, expert 1 padding alone
    x[8:12] = 0
    x[14:] = 0  # and two rows lie after the last group
    ((_, _, grads),) = stepped(bank, [(x, offsets(8, 4, 0, 2))])
    after = [ledger.history_of(index) for index in range(len(ledger.sites))]
    casts = seen[0][:, Stat.CASTS].reshape(EXPERTS, 3).tolist()
    assert casts == [[1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1]]
    rows = (seen[0][::3, Stat.ELEMENTS] / WIDTH).tolist()
    assert rows == [3, 0, 0, 2]
    for expert, changes in enumerate([True, False, False, True]):
        for index in range(3 * expert, 3 * expert + 3):
            assert torch.equal(before[index], after[index]) != changes
    assert not grads["up"][1].any()
    assert not grads["up"][2].any()


def test_rows_of_zeros_between_others_have_the_gradient_of_the_plain_product() -> None:
    torch.manual_seed(0)
    bank, x = Grouped(), torch.randn(6, WIDTH)
    plain = copy.deepcopy(bank)
    x[4:] = 0
    unclamp.convert(bank, Recipe())
    found = []
    for model in (bank, plain):
        x = x.detach().clone().requires_grad_()
        (model(x, offsets(6, 0, 0, 0)) * torch.arange(1.0, 7.0).view(-1, 1)).sum().backward()
        assert x.grad is not None
        found.append(x.grad[4:])
    torch.testing.assert_close(*found)
    assert found[0].any()


def test_no_tokens_at_all_give_what_torch_gives() -> None:
    bank = Grouped()
    unclamp.convert(bank, Recipe())
    x = torch.randn(3, WIDTH)
    assert bank(x[:0], offsets(0, 0, 0, 0)).shape == (0, HIDDEN)
    assert not bank(x, offsets(0, 0, 0, 0)).any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(how: str) -> None:
    torch.manual_seed(0)
    bank = Grouped()
    unclamp.convert(bank, Recipe())
    stepped(bank, batches())
    twin = copy.deepcopy(bank) if how == "deepcopy" else pickle.loads(pickle.dumps(bank))
    one, other = stepped(bank, batches(seed=2)), stepped(twin, batches(seed=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


def test_state_of_a_bank_is_a_row_an_expert() -> None:
    torch.manual_seed(0)
    bank, other = Grouped(), Grouped()
    for model in (bank, other):
        unclamp.convert(model, Recipe())
    stepped(bank, batches())
    state = bank.state_dict()
    assert state["unclamp_up_weight_scale"].shape == (EXPERTS,)
    assert state["unclamp_up_input_amax_history"].shape == (EXPERTS, 16)
    other.load_state_dict(state)
    one, two = stepped(bank, batches(seed=2)), stepped(other, batches(seed=2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))


def test_one_expert_is_switched_and_rules_name_experts() -> None:
    bank = Grouped()
    rule = Rule(match="up.[01]", scalings=dict.fromkeys(ROLES, HighPrecision()))
    unclamp.convert(bank, Recipe(rules=(rule,)), skip=["up.3"])
    unclamp.switch(bank, "up.2", input=Dynamic())
    kinds = {fqn: own.operand("input").scaling.kind for fqn, own, _ in products_of(bank)}
    assert kinds == {"up.0": "high_precision", "up.1": "high_precision", "up.2": "dynamic"}
    plain = copy.deepcopy(bank)
    unclamp.revert(plain)
    x, offs = batches()[0]
    theirs, ours = plain(x, offs), bank(x, offs)
    torch.testing.assert_close(ours[:8], theirs[:8])
    torch.testing.assert_close(ours[15:], theirs[15:])
    assert not torch.equal(ours[8:15], theirs[8:15])


def by_unclamp(bank: Grouped, x: Tensor, offs: Tensor, *, reentrant: bool) -> Any:
    act = lambda x: unclamp.grouped_mm(x, bank.up.mT, offs)  # noqa: E731
    return checkpoint(act, x, use_reentrant=reentrant)


def by_torch(bank: Grouped, x: Tensor, offs: Tensor, *, reentrant: bool) -> Any:
    act = lambda x: F.grouped_mm(x, bank.up.mT, offs=offs)  # noqa: E731
    return checkpoint(act, x, use_reentrant=reentrant)


def by_torch_with_a_copy(bank: Grouped, x: Tensor, offs: Tensor, *, reentrant: bool) -> Any:
    """As libraries do it: the weight is an argument, and was made elsewhere."""
    weight = bank.up.to(torch.float64).float().mT
    return checkpoint(run_grouped, x, weight, offs, use_reentrant=reentrant)


class Checkpointed(Grouped):
    """The product alone is computed again in backward, outside of the module's forward."""

    act: Any = None
    reentrant = False

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return each row's product."""
        return type(self).act(self, x, offs, reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("act", [by_unclamp, by_torch, by_torch_with_a_copy])
def test_a_product_checkpointed_inside_is_the_same_and_counts_once(
    act: Callable[..., Tensor], reentrant: bool
) -> None:
    torch.manual_seed(0)
    bank = Grouped()
    other = copy.deepcopy(bank)
    bank.__class__ = type(
        "CheckpointedExperts", (Checkpointed,), {"act": act, "reentrant": reentrant}
    )
    for each in (bank, other):
        unclamp.convert(each, Recipe())
    one, two = stepped(bank, batches()), stepped(other, batches())
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[2]["up"], b[2]["up"])
    assert torch.equal(ledger_of(bank).amax_history, ledger_of(other).amax_history)


def test_under_checkpointing_it_is_the_same_and_counts_once() -> None:
    torch.manual_seed(0)
    bank = Grouped()
    other = copy.deepcopy(bank)
    model = Outside(bank)
    for each in (model, other):
        unclamp.convert(each, Recipe())
    one, two = stepped(model, batches()), stepped(other, batches())
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert torch.equal(ledger_of(model).amax_history, ledger_of(other).amax_history)


class Outside(nn.Module):
    def __init__(self, bank: nn.Module) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        """Return what the bank does."""
        return checkpoint(self.bank, x, offs, use_reentrant=False)  # pyright: ignore[reportReturnType]


def test_a_step_notes_the_weights_that_its_optimizer_holds() -> None:
    """All experts of a bank have one parameter, and of two banks each has its own optimizer."""
    model = nn.ModuleList([Grouped(), Grouped()])
    unclamp.convert(model, Recipe())
    rows = torch.randn(8, WIDTH)
    offs = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    optimizers = [torch.optim.SGD(bank.parameters(), lr=0.1) for bank in model]
    for bank in list(model):
        bank(rows, offs).sum().backward()
    for place, optimizer in enumerate(optimizers):
        optimizer.step()
        for bank in list(model)[: place + 1]:
            weight = bank.get_parameter("up")
            notes = [own.noted for _, own, _ in products_of(bank)]
            assert [note and note.version for note in notes] == [weight._version] * EXPERTS
            assert all(note and note.weight and note.weight() is weight for note in notes)
    with torch.no_grad():
        model[1].get_parameter("up").mul_(2)  # by nobody's optimizer
    optimizers[0].step()
    versions = {own.noted and own.noted.version for _, own, _ in products_of(model[1])}
    assert versions == {model[1].get_parameter("up")._version - 1}
