"""A module with several products: each is one of its own, and survives what a layer survives."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import Delayed, Dynamic, Guarded, HighPrecision, PerBlock, Recipe
from unclamp.names import ROLES
from unclamp.nn import Adapted, find_ledgers, products_of
from unclamp.nn import kinds as kinds_of_modules
from unclamp.nn.product import multiply
from unclamp.nn.products import Matrix, stacks
from unclamp.rule import Rule

NAMES = ["block.up", "block.bank.0", "block.bank.1", "last"]


class Block(nn.Module):
    """A product with a weight of its own, then one with each half of a bank, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 4))
        self.bank = nn.Parameter(torch.randn(2, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over the bank."""
        x = torch.tanh(x @ self.up.t())
        return x @ self.bank[0].t() + x @ self.bank[1].t()


class Fp8Block(Adapted):
    """The same in FP8."""

    up: Tensor
    bank: Tensor

    @classmethod
    def matrices(cls, module: nn.Module) -> dict[str, Matrix]:
        """Return the three weights."""
        experts = {f"bank.{number}": Matrix("bank", (5, 6)) for number in range(2)}
        return {"up": Matrix("up", (6, 4)), **experts}

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over the bank."""

        def product(name: str, x: Tensor, weight: Tensor) -> Tensor:
            if name not in self.products:
                return x @ weight.t()
            return multiply(self.products[name], x, weight, None, training=self.training)

        x = torch.tanh(product("up", x, self.up))
        return product("bank.0", x, self.bank[0]) + product("bank.1", x, self.bank[1])


class Model(nn.Module):
    """A block and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.last(self.block(x))


class Layers(nn.Module):
    """The same model made of linear layers, with the same weights."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        weights = {"up": model.block.up, "0": model.block.bank[0], "1": model.block.bank[1]}
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.load_state_dict({"weight": weight})
            self.add_module(name, layer)
        self.last = copy.deepcopy(model.last)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        up, first, second = (self.get_submodule(name) for name in ("up", "0", "1"))
        x = torch.tanh(up(x))
        return self.last(first(x) + second(x))


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kinds_of_modules.Kind(name="block", adaptor=Fp8Block, forward=lambda: Block.forward)
    monkeypatch.setattr(kinds_of_modules, "KINDS", (*kinds_of_modules.KINDS, kind))


def made() -> Model:
    torch.manual_seed(0)
    return Model()


def train(model: nn.Module, *, steps: int = 3, seed: int = 1) -> list[Tensor]:
    """Return the losses of some steps."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(7, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{fqn} {role}": own.ledger.scale_of(own.indices[role])
        for fqn, own, _ in products_of(model)
        for role in ROLES
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_each_product_is_one_of_its_own_and_trains_as_a_layer_would() -> None:
    model = made()
    layers = Layers(model)
    report = unclamp.convert(model, Recipe())
    unclamp.convert(layers, Recipe())
    assert list(report.converted) == NAMES
    assert [fqn for fqn, _, _ in products_of(model)] == NAMES
    assert all(map(torch.equal, train(model), train(layers)))
    (ledger,) = find_ledgers(model)
    assert [site.fqn for site in ledger.sites[::3]] == NAMES
    names = ["up", "0", "1", "last"]
    for one, other in zip(NAMES, names, strict=True):
        for role in ROLES:
            theirs = scales_of(layers)[f"{other} {role}"]
            assert torch.equal(scales_of(model)[f"{one} {role}"], theirs)


def test_rules_and_skips_name_products() -> None:
    model = made()
    rules = (
        Rule(match="*.bank.1", scalings=dict.fromkeys(ROLES, Dynamic())),
        Rule(match="^last", scalings=dict.fromkeys(ROLES, HighPrecision())),
    )
    report = unclamp.convert(model, Recipe(rules=rules), skip=["block.up"])
    assert report.skipped == {"block.up": "matches skip 'block.up'"}
    assert report.unmatched == {}
    found = {fqn: own.operand("input").scaling.kind for fqn, own, _ in products_of(model)}
    assert found == {
        "block.bank.0": "delayed",
        "block.bank.1": "dynamic",
        "last": "high_precision",
    }
    train(model)


def test_state_is_saved_and_loaded_a_row_a_product() -> None:
    model = made()
    unclamp.convert(model, Recipe())
    train(model)
    state = model.state_dict()
    own = {key: value.shape for key, value in state.items() if ".unclamp_" in key}
    assert own["block.unclamp_bank_weight_scale"] == (2,)
    assert own["block.unclamp_bank_input_amax_history"][0] == 2
    assert own["block.unclamp_up_weight_scale"] == ()
    assert own["block.unclamp_updates"] == ()
    assert len(own) == 6 + 6 + 1 + 7
    other = Model()
    unclamp.convert(other, Recipe())
    other.load_state_dict(state)
    assert same(scales_of(model), scales_of(other))
    assert all(map(torch.equal, train(model, seed=2), train(other, seed=2)))
    plain = Model()
    plain.load_state_dict(unclamp.weights_only(state))
    other.load_state_dict(plain.state_dict())  # of which no scale here is known to be right
    assert all(not scale.any() for scale in scales_of(other).values())


def test_products_of_one_bank_with_other_histories_and_blocks_are_saved_too() -> None:
    def converted() -> Model:
        model = Model()
        short = Rule(match="*.bank.0", scalings={"input": Delayed(history_len=2)})
        blocks = Guarded(granularity=PerBlock(2, 2))
        rows = Rule(match="*.bank.1", scalings={"weight": blocks})
        unclamp.convert(model, Recipe(rules=(short, rows)))
        return model

    model, other = converted(), converted()
    train(model)
    state = model.state_dict()
    assert state["block.unclamp_bank_input_amax_history"].shape == (2, 16)
    assert state["block.unclamp_bank_1_weight_scale"].shape == (3, 3)
    other.load_state_dict(state)
    assert same(scales_of(model), scales_of(other))
    assert all(map(torch.equal, train(model, seed=2), train(other, seed=2)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(how: str) -> None:
    model = made()
    unclamp.convert(model, Recipe())
    train(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert same(scales_of(model), scales_of(twin))
    before = scales_of(model)
    losses = train(twin, seed=2)
    assert same(before, scales_of(model))
    assert all(map(torch.equal, losses, train(model, seed=2)))
    assert same(scales_of(model), scales_of(twin))


def test_one_product_is_switched_and_the_others_stay() -> None:
    model = made()
    unclamp.convert(model, Recipe())
    train(model)
    report = unclamp.switch(model, "*.bank.1", input=Dynamic())
    assert list(report.switched) == ["block.bank.1"]
    found = [own.operand("input").scaling.kind for _, own, _ in products_of(model)]
    assert found == ["delayed", "delayed", "dynamic", "delayed"]
    train(model)


def test_reverted_it_is_the_plain_module() -> None:
    model, plain = made(), made()
    parameters = list(model.parameters())
    unclamp.convert(model, Recipe())
    assert unclamp.revert(model).reverted == tuple(NAMES)
    assert type(model.block) is Block
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, train(model), train(plain)))


def test_an_evaluation_of_a_copy_counts_and_follows_each_product() -> None:
    model = made()
    unclamp.convert(model, Recipe())
    train(model)
    twin = copy.deepcopy(model)
    train(model, steps=2, seed=2)
    with torch.no_grad():
        twin.eval()(torch.randn(4, 4))
    counts = unclamp.evaluation_counts(twin)
    assert counts.age == 2
    assert {site.name.fqn for site in counts.sites} == set(NAMES)
    unclamp.refresh(twin, from_=model)
    assert same(scales_of(model), scales_of(twin))


def test_stacks_are_names_that_differ_in_a_last_number() -> None:
    names = ["qk", "up.0", "up.1", "down.0", "in_proj"]
    assert stacks(names) == {
        "qk": ["qk"],
        "up": ["up.0", "up.1"],
        "down": ["down.0"],
        "in_proj": ["in_proj"],
    }
