"""`unclamp.coverage`: each product of a step, its FLOPs, where it belongs; nothing changes."""

import copy
import logging
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import unclamp
from unclamp.covered import CoverageReport, CoveredProduct
from unclamp.names import Gemm
from unclamp.nn import find_ledgers


def product(coverage: CoverageReport, fqn: str) -> CoveredProduct:
    (found,) = [p for p in coverage.products if p.fqn == fqn]
    return found


def gemms(coverage: CoverageReport) -> dict[str, tuple[int, int, int]]:
    return {p.fqn: (p.output, p.grad_input, p.grad_weight) for p in coverage.products}


class Block(nn.Module):
    """Everything that has to be left as it was: dropout, batch norm, a state in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.down = nn.Linear(16, 8, bias=False)
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = F.dropout(self.norm(self.up(x)), 0.5, self.training)
        return self.down(self.last.relu())


def test_a_linear_layer_has_two_flops_for_each_weight_token_and_gemm() -> None:
    found = gemms(unclamp.coverage(Block(), torch.randn(6, 8)))
    size = 2 * 6 * 8 * 16
    assert found == {"up": (size, 0, size), "down": (size, size, size)}  # no gradient of a batch


def test_an_input_that_wants_a_gradient_costs_a_gemm_more() -> None:
    found = gemms(unclamp.coverage(Block(), torch.randn(6, 8, requires_grad=True)))
    assert found["up"] == (2 * 6 * 8 * 16,) * 3


def test_a_frozen_weight_costs_a_gemm_less() -> None:
    model = Block()
    model.down.weight.requires_grad_(False)
    size = 2 * 6 * 8 * 16
    assert gemms(unclamp.coverage(model, torch.randn(6, 8)))["down"] == (size, size, 0)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_shape(shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(*shape, 8)
    found = gemms(unclamp.coverage(nn.Linear(8, 5, bias=bias), x))
    size = 2 * (x.numel() // 8) * 8 * 5
    assert found == {"": (size, 0, size)}


def test_nothing_of_the_model_changes() -> None:
    model = Block().train()
    x = torch.randn(6, 8, requires_grad=True)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
    last, classes = model.last, [type(m) for m in model.modules()]
    wrapped = Branching(model)
    random, grad = torch.get_rng_state(), x.grad
    for asked in (model, wrapped):  # on shapes, and on data
        unclamp.coverage(asked, x)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert all(p.grad is grads[n][0] for n, p in model.named_parameters())
        assert all(torch.equal(grad, value) for grad, value in grads.values())
        assert model.training
        assert (model.calls, model.last) == (1, last)
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(torch.get_rng_state(), random)
        assert x.grad is grad
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Branching(nn.Module):
    """Goes a way that depends on its data."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() < 1e9 else self.other(x)


def test_a_model_that_depends_on_its_data_runs_with_them() -> None:
    assert unclamp.coverage(Block(), torch.randn(6, 8)).how == "fake"
    found = unclamp.coverage(Branching(Block()), torch.randn(6, 8))
    assert found.how == "real"
    assert set(gemms(found)) == {"inner.up", "inner.down"}
    other = unclamp.coverage(Branching(Block()), torch.full((6, 8), 1e12))
    assert set(gemms(other)) == {"other"}


def test_a_model_without_data_says_that_it_needs_them() -> None:
    with torch.device("meta"):
        model = Branching(Block())
    with pytest.raises(unclamp.UnsupportedError, match="meta device"):
        unclamp.coverage(model, torch.randn(6, 8))


def test_a_model_on_the_meta_device_is_as_one_with_data() -> None:
    with torch.device("meta"):
        model = Block()
    assert unclamp.coverage(model, torch.randn(6, 8)) == unclamp.coverage(
        Block(), torch.randn(6, 8)
    )
    assert all(p.is_meta for p in model.parameters())


def test_an_error_of_the_model_is_the_models() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        unclamp.coverage(Block(), torch.randn(6, 9))


def test_an_error_of_the_model_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Torch logs a trace of its own, twenty lines, where shapes do not fit."""
    with caplog.at_level(logging.DEBUG), pytest.raises(RuntimeError):
        unclamp.coverage(Block(), torch.randn(6, 9))
    assert not [r for r in caplog.records if r.exc_info]
    assert not logging.getLogger("torch._subclasses.fake_tensor").filters


def test_a_batch_by_names_that_is_given_as_one_is_told_how() -> None:
    with pytest.raises(TypeError, match="dict") as raised:
        unclamp.coverage(Block(), {"x": torch.randn(6, 8)})
    assert "unclamp.coverage(model, **batch)" in raised.value.__notes__[0]
    assert unclamp.coverage(Block(), **{"x": torch.randn(6, 8)}).flops


# ---- a converted model -------------------------------------------------------------------------


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("scaling", ["delayed", "dynamic", "guarded"])
@pytest.mark.parametrize("how", ["fake", "real"])
def test_histories_and_counts_of_a_converted_model_stay(scaling: str, how: str) -> None:
    model = Branching(Block()) if how == "real" else Block()
    unclamp.convert(model, unclamp.Recipe.uniform(scaling))
    trained(model)
    (ledger,) = find_ledgers(model)
    model(torch.randn(6, 8)).square().sum().backward()  # and something is pending
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pending, updates = ledger.pending.clone(), ledger.updates
    found = unclamp.coverage(model, torch.randn(6, 8))
    assert found.how == how
    assert {p.state for p in found.products} == {"converted"}
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(ledger.pending, pending)
    assert ledger.updates == updates
    trained(model, steps=1)
    assert ledger.updates == updates + 1


@pytest.mark.parametrize("scaling", ["delayed", "guarded", "dynamic"])
def test_a_converted_model_has_the_products_of_the_plain_one(scaling: str) -> None:
    plain = gemms(unclamp.coverage(Block(), torch.randn(6, 8)))
    model = Block()
    unclamp.convert(model, unclamp.Recipe.uniform(scaling))
    assert gemms(unclamp.coverage(model, torch.randn(6, 8))) == plain


def test_states_of_products() -> None:
    x = torch.randn(6, 8)
    assert {p.state for p in unclamp.coverage(Block(), x).products} == {"would be converted"}
    with unclamp.observe(model := Block()):
        assert {p.state for p in unclamp.coverage(model, x).products} == {"observed"}
    unclamp.convert(model, unclamp.Recipe(), skip=["down"])
    found = unclamp.coverage(model, x)
    assert {p.fqn: p.state for p in found.products} == {"up": "converted", "down": "left out"}
    assert product(found, "down").why == "the conversion left it out"
    assert found.share == pytest.approx(2 / 5)  # up has no grad_input


def test_what_the_recipe_leaves_in_high_precision_is_left_out() -> None:
    model = Block()
    high = unclamp.HighPrecision()
    recipe = unclamp.Recipe().override("down", input=high, weight=high, grad_output=high)
    unclamp.convert(model, recipe)
    found = product(unclamp.coverage(model, torch.randn(6, 8)), "down")
    assert (found.state, found.why) == ("left out", "the recipe leaves it in high precision")


def test_a_weight_that_another_module_reads_is_named() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight)

    model = Reads()
    unclamp.convert(model, unclamp.Recipe())
    found = product(unclamp.coverage(model, torch.randn(6, 8)), "layer")
    assert (found.state, found.why) == ("left out", "its weight is read outside of the layer")


def test_attention_is_observed_unless_a_rule_names_it() -> None:
    x = torch.randn(2, 5, 16)

    def states(**how: Any) -> dict[str, str]:
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        unclamp.convert(model, how.pop("recipe", unclamp.Recipe()), **how)
        return {
            p.fqn.removeprefix("self_attn."): p.state for p in unclamp.coverage(model, x).products
        }

    every = dict.fromkeys(["in_proj", "out_proj", "linear1", "linear2"], "converted")
    assert states() == {**every, "qk": "observed", "pv": "observed"}
    named = unclamp.Recipe().override("*.qk", input=unclamp.Dynamic())
    assert states(recipe=named) == {**every, "qk": "converted", "pv": "observed"}
    assert states(skip=["*.qk", "*in_proj"]) == {
        **every, "qk": "left out", "pv": "observed", "in_proj": "left out"
    }  # fmt: skip
    plain = unclamp.coverage(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), x)
    assert plain.share_of("would be converted", "would be observed") == 1.0
    assert product(plain, "self_attn.qk").state == "would be observed"


# ---- what is found, and where it belongs -------------------------------------------------------


class Sequence(nn.Module):
    """Calls one function of a module with an input."""

    def __init__(self, run: Any, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._run = run

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


FOUND = {
    "matmul": (lambda m, x: x @ m.w, (8, 5), "w", 2 * 6 * 8 * 5),
    "turned": (lambda m, x: (m.w @ x.t()).t(), (5, 8), "w", 2 * 6 * 8 * 5),
    "sliced": (lambda m, x: x @ m.w[:, 1:4], (8, 5), "w", 2 * 6 * 8 * 3),
    "cast": (lambda m, x: x.bfloat16() @ m.w.to(torch.bfloat16), (8, 5), "w", 2 * 6 * 8 * 5),
    "scaled": (lambda m, x: x @ (m.w / m.w.norm()), (8, 5), "w", 2 * 6 * 8 * 5),
    "unbound": (lambda m, x: sum(x @ w for w in m.w.unbind(0)), (3, 8, 5), "w", 3 * 2 * 6 * 8 * 5),
    "batched": (lambda m, x: torch.einsum("tk,ekn->etn", x, m.w), (3, 8, 5), "w", 3 * 480),
    "selected": (
        lambda m, x: torch.bmm(x[:, None], m.w[torch.arange(6) % 3]), (3, 8, 5), "w", 2 * 6 * 8 * 5
    ),
    "grouped": (
        lambda m, x: F.grouped_mm(x, m.w, offs=torch.tensor([2, 2, 6], dtype=torch.int32)),
        (3, 8, 8), "w", 2 * 6 * 8 * 8,
    ),
    "conv": (lambda m, x: F.conv1d(x[None], m.w, padding=1), (4, 6, 3), "w", 2 * 8 * 4 * 6 * 3),
    "depthwise": (lambda m, x: F.conv1d(x[None], m.w, groups=6), (6, 1, 3), "w", 2 * 6 * 6 * 3),
    "turned conv": (
        lambda m, x: F.conv_transpose1d(x[None], m.w, stride=2), (6, 4, 3), "w", 2 * 6 * 8 * 4 * 3
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_a_product_is_found_with_its_parameter(case: str) -> None:
    run, shape, name, flops = FOUND[case]
    x = torch.randn(6, 8, requires_grad=True)
    found = unclamp.coverage(Sequence(run, w=weight(*shape)), x)
    assert gemms(found) == {name: (flops,) * 3}
    assert found.products[0].state == "left out"


def test_the_output_of_a_recurrent_layer_is_named_by_its_weights() -> None:
    found = gemms(unclamp.coverage(nn.LSTM(8, 16, batch_first=True), torch.randn(2, 5, 8)))
    size = {"weight_ih_l0": 2 * 10 * 8 * 64, "weight_hh_l0": 2 * 10 * 16 * 64}
    assert {name: each[0] for name, each in found.items()} == size


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [5, 3, 8])
def test_attention_is_two_products(is_causal: bool, keys: int) -> None:
    def run(_: nn.Module, x: Tensor) -> Tensor:
        q = x.view(2, 5, 3, 4).transpose(1, 2)
        k = torch.cat([q, q], 2)[:, :, :keys]
        return F.scaled_dot_product_attention(q, k, k, is_causal=is_causal)

    found = gemms(unclamp.coverage(Sequence(run), torch.randn(2, 5, 12, requires_grad=True)))
    pairs = sum(min(i + 1, keys) if is_causal else keys for i in range(5))
    size = 2 * 2 * 3 * pairs * 4
    assert found == {"qk": (size,) * 3, "pv": (size,) * 3}


def test_attention_by_hand_is_named_too() -> None:
    def run(_: nn.Module, x: Tensor) -> Tensor:
        scores = (x @ x.transpose(1, 2) / 3).masked_fill(torch.ones(5, 5).triu(1).bool(), -9.0)
        return F.dropout(scores.softmax(-1, dtype=torch.float32), 0.1).to(x.dtype) @ x

    found = gemms(unclamp.coverage(Sequence(run), torch.randn(2, 5, 12, requires_grad=True)))
    assert found == {"qk": (2 * 2 * 5 * 5 * 12,) * 3, "pv": (2 * 2 * 5 * 5 * 12,) * 3}


def test_an_attention_that_is_not_known_says_how_it_would_be() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    found = unclamp.coverage(Own(), torch.randn(1, 2, 4, 8, requires_grad=True))
    assert {p.fqn for p in found.products} == {"qk", "pv"}
    assert all("unclamp.attention(self, q, k, v, ...)" in p.why for p in found.products)


def test_a_product_of_activations_without_a_softmax_has_no_other_name() -> None:
    found = unclamp.coverage(Sequence(lambda _, x: x @ x.t()), torch.randn(6, 8))
    assert [(p.fqn, p.why) for p in found.products] == [("matmul", "a product of two activations")]


def test_tied_weights_are_a_product_each() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    size = 2 * 6 * 8 * 8
    found = unclamp.coverage(Tied(), torch.randn(6, 8))
    assert gemms(found) == {"first": (size, 0, size), "second": (size,) * 3}
    assert {p.state for p in found.products} == {"would be converted"}


def test_a_layer_that_is_called_twice_is_one_product() -> None:
    layer = nn.Linear(8, 8)
    found = unclamp.coverage(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(6, 8))
    (only,) = found.products
    size = 2 * 6 * 8 * 8
    assert (only.calls, only.output, only.grad_input, only.grad_weight) == (
        2, 2 * size, size, 2 * size
    )  # fmt: skip


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_computes_again_is_left_out(use_reentrant: bool) -> None:
    block = Block()

    def run(m: Any, x: Tensor) -> Tensor:
        return checkpoint(m.block, m.block(x), use_reentrant=use_reentrant)  # pyright: ignore

    x = torch.randn(6, 8)
    found = unclamp.coverage(Sequence(run, block=block), x)
    plain = unclamp.coverage(Sequence(lambda m, x: m.block(m.block(x)), block=block), x)
    assert gemms(found) == gemms(plain)


def test_a_function_with_a_backward_of_its_own() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, v: Tensor) -> Tensor:  # pyright: ignore
            ctx.save_for_backward(x, w, v)
            return (x @ w) @ v

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
            x, w, v = ctx.saved_tensors
            h = x @ w  # again
            dh = dy @ v.t()
            return dh @ w.t(), x.t() @ dh, h.t() @ dy

    model = Sequence(lambda m, x: Double.apply(x, m.w, m.v), w=weight(8, 5), v=weight(5, 7))
    found = gemms(unclamp.coverage(model, torch.randn(6, 8, requires_grad=True)))
    assert found == {"w": (2 * 6 * 8 * 5,) * 3, "v": (2 * 6 * 5 * 7,) * 3}


def test_the_loss_is_what_is_differentiated() -> None:
    def run(m: Any, x: Tensor) -> dict[str, Tensor]:
        y = m.a(x)
        return {"loss": y.sum(), "other": m.b(x)}

    model = Sequence(run, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    size = 2 * 6 * 8 * 8
    assert gemms(unclamp.coverage(model, torch.randn(6, 8))) == {
        "a": (size, 0, size),
        "b": (size, 0, 0),
    }


def test_a_model_in_evaluation_is_one_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    names = {p.fqn for p in unclamp.coverage(layer, torch.randn(2, 5, 16)).products}
    assert names == {
        "self_attn.in_proj", "self_attn.qk", "self_attn.pv", "self_attn.out_proj", "linear1",
        "linear2",
    }  # fmt: skip


def test_it_counts_what_torch_counts() -> None:
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    x, y = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    found = unclamp.coverage(model, x, y)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, y).sum().backward()  # of others on a CPU it knows none
    assert found.flops == counter.get_total_flops()


def test_operators_of_others_are_named() -> None:
    with torch.library._scoped_library("covered_test", "FRAGMENT") as library:
        library.define("opaque(Tensor x) -> Tensor")
        library.impl("opaque", lambda x: x.clone(), "CompositeExplicitAutograd")
        torch.library.register_fake("covered_test::opaque", lambda x: x.clone(), lib=library)
        model = Sequence(lambda m, x: m.a(torch.ops.covered_test.opaque(x)), a=nn.Linear(8, 8))
        found = unclamp.coverage(model, torch.randn(6, 8))
    assert found.unknown == ("covered_test.opaque",)
    assert "of unknown FLOPs: covered_test.opaque" in str(found)


# ---- how it is said ----------------------------------------------------------------------------


def test_repeated_layers_are_one_row() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4))
    rows = unclamp.coverage(model, torch.randn(6, 8)).rows()
    assert [(row.name, row.count) for row in rows] == [("*", 3), ("3", 1)]
    assert sum(row.product.flops for row in rows) == 2 * 6 * (3 * 64 * 3 + 32 * 3 - 64)


def test_it_comes_back_from_its_dict() -> None:
    model = Block()
    unclamp.convert(model, unclamp.Recipe(), skip=["down"])
    found = unclamp.coverage(model, torch.randn(6, 8))
    assert CoverageReport.from_dict(found.to_dict()) == found
    with pytest.raises(ValueError, match=r"CoverageReport\.to_dict"):
        CoverageReport.from_dict({"products": [{}], "how": "fake", "unknown": []})


def test_the_sentence_says_what_is_left_out() -> None:
    def made(
        fqn: str, flops: int, state: Any, why: str = "", kind: str = "linear"
    ) -> CoveredProduct:
        return CoveredProduct(
            fqn=fqn, module="Linear", kind=kind, sizes=(1, 1, 1), calls=1, output=flops,
            grad_input=0, grad_weight=0, state=state, why=why,
        )  # fmt: skip

    found = CoverageReport(
        products=(
            made("a", 939, "converted"),
            made("b", 1, "left out", "on purpose", "router"),
            made("c", 60, "left out", "two activations", "attention"),
        )
    )
    assert found.sentence() == (
        "converted 93.9 % of the FLOPs; left out: attention 6 % (two activations), "
        "router 0.1 % (on purpose)"
    )
    thin = "an adapter's ({}); a rule that names it takes it in"
    several = CoverageReport(
        products=(
            made("0.base", 80, "converted"),
            made("0.lora_A", 6, "left out", thin.format("lora_A")),
            made("0.up", 5, "left out", "matches skip"),
            made("1.x.lora_A", 4, "left out", thin.format("lora_A")),
            made("0.lora_B", 5, "left out", thin.format("lora_B")),
        )
    )
    assert several.sentence() == (  # each reason once, without what would change it
        "converted 80 % of the FLOPs; left out: *.lora_A 6 %, *.x.lora_A 4 % (an adapter's "
        "(lora_A)), *.up 5 % (matches skip), *.lora_B 5 % (an adapter's (lora_B))"
    )
    assert CoverageReport(products=()).sentence() == "the step has no matrix product"
    shares: dict[Gemm, float] = {g: found.gemm_share(g) for g in ("output", "grad_input")}
    assert shares == {"output": 1.0, "grad_input": 0.0}


@pytest.mark.filterwarnings("ignore::UserWarning")  # it would rather be compiled
def test_flex_attention_is_two_products_too() -> None:
    def run(_: nn.Module, x: Tensor) -> Tensor:
        q = x.view(2, 128, 2, 16).transpose(1, 2)
        made = flex_attention(q, q, q)
        assert isinstance(made, Tensor)
        return made

    size = 2 * 2 * 2 * 128 * 128 * 16
    found = gemms(unclamp.coverage(Sequence(run), torch.randn(2, 128, 32)))
    assert found == {"qk": (size, 0, 0), "pv": (size, 0, 0)}  # on a CPU it has no backward


def test_modules_that_were_not_called_are_named() -> None:
    model = Branching(Block())
    found = unclamp.coverage(model, torch.randn(6, 8))
    assert found.idle == ("other",)
    assert found.sentence().endswith("; not called: other")
    attention = nn.MultiheadAttention(16, 2)  # which reads the weight of a module, without a call
    assert unclamp.coverage(attention, *3 * [torch.randn(2, 16)]).idle == ()


def test_a_forward_that_holds_on_to_the_model_is_not_run_for_its_copy() -> None:
    """TRL's fused head, hooks of accelerate: a closure, which no copy changes."""

    def patched(model: nn.Module) -> None:
        plain = model.forward

        def fused(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return plain(x)

        model.forward = MethodType(fused, model)

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    unclamp.convert(model, unclamp.Recipe())
    patched(model[1])
    patched(model)
    forward = model.forward
    calls: list[nn.Module] = []
    model[0].register_forward_pre_hook(lambda module, _: calls.append(module))
    report = unclamp.coverage(model, torch.randn(4, 16))
    assert [(p.fqn, p.state) for p in report.products] == [("0", "converted"), ("1", "converted")]
    assert model[0] not in calls
    assert model.forward is forward
