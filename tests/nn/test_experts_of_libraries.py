"""Experts of transformers and of torchtitan's shape, found by what they do, and their routers."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import (
    Tensor,
    _grouped_mm,  # pyright: ignore[reportPrivateImportUsage]  # as torchtitan
    nn,
)

import unclamp
from unclamp import Dynamic, PerRow, Recipe
from unclamp.names import ROLES
from unclamp.nn import find_ledgers, products_of
from unclamp.numerics import Stat
from unclamp.rule import Rule

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
MODELS = {
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
}
NAMES = {f"{bank}.{number}" for bank in ("gate_up_proj", "down_proj") for number in range(4)}


def made(name: str, experts: str = "grouped_mm") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.set_experts_implementation(experts)
    return model


def experts_of(model: nn.Module) -> tuple[str, nn.Module]:
    return next((fqn, m) for fqn, m in model.named_modules() if fqn.endswith(".experts"))


class ByHand(nn.Module):
    """A module of experts as a loop over experts, each product a linear layer of its own."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = [experts]  # whose activation alone is used: no submodule
        self.layers = nn.ModuleDict()
        for bank in ("gate_up_proj", "down_proj"):
            for number, weight in enumerate(getattr(experts, bank)):
                matrix = weight.t() if experts.is_transposed else weight
                layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
                layer.load_state_dict({"weight": matrix})
                self.layers[f"{bank}_{number}"] = layer

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the sum over each token's experts, as transformers' grouped forward does."""
        (own,) = self.experts
        chosen, perm = torch.sort(index.reshape(-1))
        rows, scores = x[perm // index.shape[-1]], weights.reshape(-1)[perm]
        parts = []
        for number in range(own.num_experts):
            tokens = rows[chosen == number]
            if not len(tokens):
                continue
            y = self.layers[f"gate_up_proj_{number}"](tokens)
            y = own._apply_gate(y + own.gate_up_proj_bias[number] if own.has_bias else y)
            y = self.layers[f"down_proj_{number}"](y)
            parts.append(y + own.down_proj_bias[number] if own.has_bias else y)
        weighted = torch.cat(parts) * scores.unsqueeze(-1)
        back = torch.empty_like(perm)
        back[perm] = torch.arange(len(perm))
        return weighted[back].view(*index.shape, -1).sum(dim=1)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", list(MODELS))
def test_experts_of_transformers_are_a_loop_of_linear_layers(
    name: str, implementation: str
) -> None:
    model = made(name, implementation)
    fqn, experts = experts_of(model)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    by_hand = ByHand(copy.deepcopy(experts))
    plain = copy.deepcopy(experts)
    report = unclamp.convert(model, Recipe())
    unclamp.convert(by_hand, Recipe())
    assert {f"{fqn}.{product}" for product in NAMES} <= set(report.converted)
    found = []
    for module in (experts, by_hand, plain):
        torch.manual_seed(3)
        x = torch.randn(12, 16).requires_grad_()
        index = torch.randint(0, 3, (12, 2))  # nobody asks the last expert
        index[:, 1] = (index[:, 0] + 1) % 3
        output = module(x, index, torch.rand(12, 2))
        (output * torch.arange(1.0, 13.0).view(-1, 1)).sum().backward()
        assert x.grad is not None
        found.append((output.detach(), x.grad))
    (output, dx), (expected, expected_dx), (plain_output, _) = found
    if implementation == "eager":  # which adds the experts' outputs in another order
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(dx, expected_dx)
    else:
        assert torch.equal(output, expected)
        assert torch.equal(dx, expected_dx)
    assert not torch.equal(output, plain_output)
    for bank in ("gate_up_proj", "down_proj"):
        grad = getattr(experts, bank).grad
        for number in range(4):
            theirs = by_hand.layers[f"{bank}_{number}"].weight.grad
            mine = grad[number].t() if getattr(experts, "is_transposed", False) else grad[number]
            expected = torch.zeros_like(mine) if theirs is None else theirs
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_an_observed_model_of_transformers_is_the_plain_one(implementation: str) -> None:
    model = made("GptOss", implementation)
    plain = copy.deepcopy(model)
    tokens = torch.arange(24).view(2, 12) % 32
    with unclamp.observe(model) as observation:
        losses = [m(input_ids=tokens, labels=tokens).loss for m in (model, plain)]
        for loss in losses:
            loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        assert torch.equal(*losses)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)
        assert any(".experts.down_proj." in site.fqn for site in observation.sites())


def test_what_is_saved_is_the_plain_model(tmp_path: Path) -> None:
    model = made("Mixtral")
    plain_config = model.config.to_dict()
    unclamp.convert(model, Recipe())
    assert model.config.to_dict() == plain_config
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(model(input_ids=tokens).logits, twin(input_ids=tokens).logits)
    model.save_pretrained(tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    assert "experts_implementation" not in (tmp_path / "config.json").read_text()
    assert not any("unclamp" in key for key in loaded.state_dict())
    unclamp.revert(model)
    assert torch.equal(model(input_ids=tokens).logits, loaded(input_ids=tokens).logits)


# ---- of torchtitan's shape ---------------------------------------------------------------------


def run_experts(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    offs = counts.cumsum(0).to(torch.int32)
    h = F.silu(_grouped_mm(x.bfloat16(), w1.bfloat16().transpose(-2, -1), offs=offs))
    h = h * _grouped_mm(x.bfloat16(), w3.bfloat16().transpose(-2, -1), offs=offs)
    return _grouped_mm(h, w2.bfloat16().transpose(-2, -1), offs=offs).type_as(x)


def padded(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have each group end at a multiple of 8 rows, filled up with zeros."""

    def wrapped(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor, counts: Tensor) -> Tensor:
        sizes = [-(-size // 8) * 8 for size in counts.tolist()]
        filled = x.new_zeros(sum(sizes), x.shape[-1])
        places, start = [], 0
        for size, count in zip(sizes, counts.tolist(), strict=True):
            places += range(start, start + count)
            start += size
        filled = filled.index_put((torch.tensor(places),), x)
        return run(w1, w2, w3, filled, torch.tensor(sizes))[places]

    return wrapped


class Titan(nn.Module):
    """As torchtitan's experts: three banks, two ways to compute, padding in between."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, hidden, dim) / 4)
        self.w2 = nn.Parameter(torch.randn(num_experts, dim, hidden) / 4)
        self.w3 = nn.Parameter(torch.randn(num_experts, hidden, dim) / 4)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return each token's expert's output."""
        return padded(run_experts)(self.w1, self.w2, self.w3, x, counts)


class Router(nn.Module):
    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the number of the expert of each token."""
        return self.gate(x).argmax(-1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Titan(16, 24, 4)
        self.router = Router(16, 4)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of each token's expert, by expert."""
        chosen = self.router(x)
        counts = torch.bincount(chosen, minlength=4)
        return self.out(self.experts(x[chosen.argsort(stable=True)], counts))


def test_experts_of_torchtitans_shape_are_products_and_their_router_is_left_out() -> None:
    torch.manual_seed(0)
    model = Mixture()
    report = unclamp.convert(model, Recipe())
    banks = [f"experts.{bank}.{n}" for bank in ("w1", "w2", "w3") for n in range(4)]
    assert list(report.converted) == [*banks, "out"]
    assert "router" in report.skipped["router.gate"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    casts: list[Tensor] = []
    (ledger,) = find_ledgers(model)
    ledger.subscribe(lambda update: casts.append(update.stats))
    x = torch.randn(20, 16)
    model(x).sum().backward()
    optimizer.step()
    counts = torch.bincount(model.router(x), minlength=4)
    for place, (fqn, own, _) in enumerate(products_of(model)):
        rows = int(casts[0][own.indices["input"], Stat.ELEMENTS]) // (24 if ".w2." in fqn else 16)
        assert rows == (counts[place % 4] if fqn != "out" else 20)


def test_a_router_beside_experts_within_experts_is_left_out() -> None:
    """torchtitan's bank is `moe.routed_experts.inner_experts`, its router `moe.router.gate`."""
    moe = nn.ModuleDict(
        {
            "router": nn.ModuleDict({"gate": nn.Linear(16, 4)}),
            "routed_experts": nn.ModuleDict({"inner_experts": Titan(16, 24, 4)}),
        }
    )
    report = unclamp.convert(nn.ModuleDict({"moe": moe}), Recipe())
    assert len(report.converted) == 3 * 4
    assert "a router" in report.skipped["moe.router.gate"]


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_a_router_beside_modules_that_are_experts_is_left_out(kind: str) -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 4)
            every = [nn.Linear(16, 16) for _ in range(4)]
            named = nn.ModuleDict({str(i): each for i, each in enumerate(every)})
            self.experts = nn.ModuleList(every) if kind == "list" else named

    report = unclamp.convert(Mixture(), unclamp.Recipe())
    assert list(report.converted) == [f"experts.{i}" for i in range(4)]
    assert list(report.skipped) == ["router"]


def test_a_rule_that_names_the_router_takes_it_in() -> None:
    model = Mixture()
    rule = Rule(match="*.gate", scalings={"input": Dynamic()})
    report = unclamp.convert(model, Recipe(rules=(rule,)))
    assert "router.gate" in report.converted


class Layer(nn.Module):
    """As torchtitan's MoE: one expert a token, weighted by its score, and a shared expert."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.experts = Titan(dim, hidden, num_experts)
        self.shared = Titan(dim, hidden, 1)
        self.router = Router(dim, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Return what both experts of each token make of it."""
        score, chosen = self.router.gate(x).sigmoid().max(-1)
        order = chosen.argsort(stable=True)
        routed = self.experts((x * score.unsqueeze(-1))[order], torch.bincount(chosen, minlength=8))
        return self.shared(x, torch.tensor([len(x)])).index_add(0, order, routed)


def sqnr_db(exact: Tensor | None, found: Tensor | None) -> float:
    assert exact is not None
    assert found is not None
    return float(20 * torch.log10(exact.norm() / (exact - found).norm()))


def test_scales_by_row_meet_the_bounds_that_torchao_sets_itself() -> None:
    torch.manual_seed(0)
    plain = Layer(256, 512, 8)
    for parameter in plain.parameters():
        nn.init.trunc_normal_(parameter, std=0.02)
    model = copy.deepcopy(plain)
    rows = dict.fromkeys(ROLES, Dynamic(granularity=PerRow()))
    rule = Rule(match="experts.*", scalings=rows, formats={"grad_output": "e4m3fn"})  # as torchao
    recipe = Recipe(rules=(rule,))
    unclamp.convert(model, recipe, skip=["shared.*"])
    outputs, inputs = [], []
    for one in (plain, model):
        torch.manual_seed(1)
        x = torch.randn(512, 256, requires_grad=True)
        output = one(x)
        F.mse_loss(output, torch.ones_like(output)).backward()
        outputs.append(output.detach())
        inputs.append(x.grad)
    assert sqnr_db(*outputs) >= 26.5
    assert sqnr_db(*inputs) >= 29.0
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert sqnr_db(one.grad, other.grad) >= 21.0
