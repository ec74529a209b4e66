"""Attention in FP8 against float64 products of operands that are cast by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unclamp
from unclamp import (
    Delayed,
    Dynamic,
    HighPrecision,
    PerRow,
    Recipe,
    RecipeError,
    UnclampWarning,
)
from unclamp.names import ROLES
from unclamp.nn import find_ledgers, products_of
from unclamp.numerics import Stat

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
IN_FP8 = Recipe().override("*.qk", scaling="dynamic").override("*.pv", scaling="dynamic")
BY_HEAD = Recipe().override("*.qk.*", scaling="dynamic").override("*.pv.*", scaling="dynamic")


def hat(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """Return a tensor after torch's own cast, with its amax on the largest value, float64."""
    x = x.to(torch.float32)
    scale = torch.tensor(LARGEST[dtype]) / x.abs().amax()
    codes = (x * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    return codes.double() / scale.double()


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, *, hidden: Tensor, added: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return output and gradients of one attention `[B, H, L, D]`, operands cast at each product.

    What a query does not see is `hidden`; `added` is added to scores.
    """
    q_hat, k_hat, v_hat = hat(q), hat(k), hat(v)
    scores = q_hat @ k_hat.mT * scale + added
    p = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num()
    p_hat = hat(p)
    dy_hat = hat(dy, E5M2)
    dp, dv = dy_hat @ v_hat.mT, p_hat.mT @ dy_hat
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    ds_hat = hat(ds, E5M2)
    return p_hat @ v_hat, ds_hat @ k_hat, ds_hat.mT @ q_hat, dv


class Model(nn.Module):
    """Nothing but an attention."""

    def __init__(self, *, heads: int = 0) -> None:
        super().__init__()
        self.attn = unclamp.Attention(heads=heads)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        """Return the attention."""
        return self.attn(q * self.weight, k, v, **settings)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def drawn_all(heads: int = 4, keys: int = 4, length: int = 7, seen: int = 9) -> list[Tensor]:
    """Return queries, keys, values and a gradient of the output."""
    return [
        drawn(2, heads, length, 8, seed=1),
        drawn(2, keys, seen, 8, seed=2),
        drawn(2, keys, seen, 6, seed=3),
        drawn(2, heads, length, 6, seed=4).detach(),
    ]


def made(model: nn.Module, tensors: list[Tensor], **settings: Any) -> list[Tensor]:
    """Return output and gradients of an attention."""
    *operands, dy = tensors
    output = model(*operands, **settings)
    return [output, *torch.autograd.grad(output, operands, dy)]


def below(length: int, seen: int) -> Tensor:
    """Return what a causal query does not see, from the top left, as torch documents it."""
    return ~torch.ones(length, seen, dtype=torch.bool).tril()


def random_mask() -> Tensor:
    mask = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(5)) > 0.3
    mask[0, 0, 2] = False  # a query that sees nothing
    return mask


NOTHING = torch.zeros((), dtype=torch.bool)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"is_causal": True}, {"hidden": below(7, 9)}),
    "boolean mask": ({"attn_mask": random_mask()}, {"hidden": ~random_mask()}),
    "added mask": (
        {"attn_mask": drawn(4, 7, 9, seed=6).detach()},
        {"added": drawn(4, 7, 9, seed=6).detach().double()},
    ),
    "scale": ({"scale": 0.8}, {"scale": 0.8}),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_operands_cast_by_hand(case: str) -> None:
    settings, theirs = CASES[case]
    tensors = drawn_all()
    model = Model()
    unclamp.convert(model, IN_FP8)
    right = by_hand(*tensors, **{"hidden": NOTHING, "added": 0.0, "scale": 8**-0.5, **theirs})
    plain = made(Model(), tensors, **settings)
    for own, want, without in zip(made(model, tensors, **settings), right, plain, strict=True):
        largest = want.abs().max()
        assert (own - want).abs().max() < 2e-3 * largest
        assert (without - want).abs().max() > 1e-2 * largest  # the casts show


@pytest.mark.parametrize("recipe", [IN_FP8, BY_HEAD], ids=["tensor", "head"])
def test_grouped_queries_cast_keys_once_and_sum_their_gradients(recipe: Recipe) -> None:
    tensors = drawn_all(heads=4, keys=2)
    model = Model(heads=2)
    unclamp.convert(model, recipe)
    own = made(model, tensors, enable_gqa=True)
    q, k, v, dy = tensors
    settings = {"hidden": NOTHING, "added": 0.0, "scale": 8**-0.5}
    if recipe is IN_FP8:  # one product of keys, whose queries are rows
        q, dy = (t.reshape(2, 2, 14, t.shape[-1]) for t in (q, dy))
        right = [*by_hand(q, k, v, dy, **settings)]
    else:
        q, dy = (t.reshape(2, 2, 14, t.shape[-1]) for t in (q, dy))
        heads = [by_hand(*(t[:, i] for t in (q, k, v, dy)), **settings) for i in range(2)]
        right = [torch.stack(each, 1) for each in zip(*heads, strict=True)]
    for one, want in zip(own, right, strict=True):
        want = want.reshape(one.shape)
        assert (one - want).abs().max() < 2e-3 * want.abs().max()


def test_heads_are_products_of_their_own() -> None:
    model = Model(heads=4)
    report = unclamp.convert(model, BY_HEAD)
    assert list(report.converted) == [f"attn.{p}.{h}" for p in ("qk", "pv") for h in range(4)]
    assert not report.observed
    assert not report.unmatched
    tensors = drawn_all()
    with torch.no_grad():
        tensors[0][:, 2] *= 100
    made(model, tensors)
    (ledger,) = find_ledgers(model)
    amax = {s.name: a for s, a in zip(ledger.sites, ledger.pending[:, Stat.AMAX], strict=True)}
    for head in range(4):
        name = unclamp.SiteName(f"attn.qk.{head}", "input")
        assert amax[name] == tensors[0][:, head].abs().max()


def test_a_rule_may_name_one_head() -> None:
    model = Model(heads=4)
    report = unclamp.convert(model, Recipe().override("*.qk.1", scaling="dynamic"))
    assert list(report.converted) == ["attn.qk.1"]
    assert list(report.observed) == ["attn.qk.0", "attn.qk.2", "attn.qk.3", "attn.pv"]
    tensors = drawn_all()
    own, plain = made(model, tensors), made(Model(), tensors)
    for head in range(4):
        is_close = torch.allclose(own[0][:, head], plain[0][:, head], atol=1e-6)
        assert is_close == (head != 1)


GLOBS = {"*.qk": True, "^attn.qk": True, "qk": True, "*.[qp][kv]": True, "attn.q*": True}
GLOBS |= {"*": False, "attn.*": False, "attn*": False, "*.attn": False}


@pytest.mark.parametrize("glob", GLOBS)
@pytest.mark.filterwarnings("ignore::unclamp.UnclampWarning")
def test_only_rules_that_name_a_product_of_attention_compute_it(glob: str) -> None:
    model = Model()
    model.add_module("attn_out", nn.Linear(2, 2))
    report = unclamp.convert(model, Recipe(rules=Recipe().override(glob, input="dynamic").rules))
    assert ("attn.qk" in report.converted) == GLOBS[glob]
    assert ("attn.qk" in report.observed) != GLOBS[glob]


def test_rows_and_smoothing_are_refused_where_they_are_asked_for() -> None:
    rows = Dynamic(granularity=PerRow())
    for recipe in (Recipe().override("*.qk", input=rows), Recipe(weight="dynamic", smooth=True)):
        with pytest.raises(RecipeError, match=r"attn\.qk"):
            unclamp.convert(Model(), recipe.override("*.qk", input="dynamic"))
    model = Model()
    with pytest.warns(UnclampWarning, match=r"attn\.qk, attn\.pv are only counted"):
        report = unclamp.convert(model, Recipe.uniform(rows))
    granularity = report.observed["attn.qk"].operands["input"].scaling.granularity
    assert granularity.is_whole


SETTINGS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.3},
    "mask": {"attn_mask": random_mask()},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: unclamp.convert(model, Recipe()),
        unclamp.observe,
        lambda model: unclamp.convert(
            model, Recipe(rules=IN_FP8.rules, warmup_steps=5)
        ),
        lambda model: unclamp.convert(
            model, Recipe.uniform(HighPrecision()).override("*.qk", scaling="high_precision")
        ),
    ],
    ids=["only counted", "observed", "warm-up", "high precision"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:no layer is in FP8")
def test_where_nothing_is_cast_the_bits_are_those_of_torch(
    settings: str, prepare: Callable[[nn.Module], Any]
) -> None:
    tensors = drawn_all(keys=2 if settings == "grouped" else 4)
    model = Model()
    prepare(model)
    torch.manual_seed(0)
    own, state = made(model, tensors, **SETTINGS[settings]), torch.get_rng_state()
    torch.manual_seed(0)

    def plain(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **given)

    assert all(map(torch.equal, own, made(plain, tensors, **SETTINGS[settings])))  # pyright: ignore
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(7, 8), (2, 7, 8), (2, 4, 7, 8), (3, 2, 4, 7, 8)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    q, k, v = (drawn(*shape, seed=seed) for seed in range(3))
    model = Model()
    unclamp.convert(model, IN_FP8)
    output = model(q, k, v, is_causal=True)
    right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert output.shape == right.shape
    assert (output - right).abs().max() < 0.15 * right.abs().max()


def test_operands_of_two_bytes_stay_so() -> None:
    q, k, v = (drawn(2, 4, 7, 8, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    model = Model().bfloat16()
    unclamp.convert(model, IN_FP8)
    output = model(q, k, v)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output.sum(), (q, k, v))
    assert {g.dtype for g in gradients} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*(t.float() for t in (q, k, v))).dtype == torch.bfloat16


def test_dropout_drops_what_torch_would_and_keeps_the_mean() -> None:
    tensors = drawn_all()
    model = Model()
    unclamp.convert(model, IN_FP8)
    torch.manual_seed(0)
    outputs = torch.stack([made(model, tensors, dropout_p=0.4)[0] for _ in range(100)])
    right = made(model, tensors)[0]
    assert outputs.std(0).max() > 0.1
    assert (outputs.mean(0) - right).abs().max() < 0.25


def counts_of(model: nn.Module, stat: Stat = Stat.CASTS) -> dict[str, float]:
    """Return a statistic of every site since the last update."""
    (ledger,) = find_ledgers(model)
    return {
        str(site.name): float(value)
        for site, value in zip(ledger.sites, ledger.pending[:, stat], strict=True)
    }


def test_casts_count_in_backward_once_and_not_in_evaluations() -> None:
    model, tensors = Model(), drawn_all()
    unclamp.convert(model, IN_FP8)
    with torch.no_grad():
        model(*tensors[:3])
    model.eval()
    with torch.no_grad():
        model(*tensors[:3])
    model.train()
    assert set(counts_of(model).values()) == {0}
    assert unclamp.evaluation_counts(model).sites[0].casts == 1
    output = model(*tensors[:3])
    assert set(counts_of(model).values()) == {0}
    output.sum().backward()
    assert set(counts_of(model).values()) == {1}
    made(model, tensors)
    assert set(counts_of(model).values()) == {2}


@pytest.mark.parametrize("recipe", [IN_FP8, Recipe()], ids=["computed", "only counted"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_neither_bits_nor_counts(recipe: Recipe, use_reentrant: bool) -> None:
    tensors, found = drawn_all(), []
    for checkpoints in (False, True):
        model = Model()
        model.add_module("layer", nn.Linear(2, 2))
        unclamp.convert(model, recipe)

        def forward(*operands: Tensor, model: nn.Module = model) -> Tensor:
            return model(*operands, is_causal=True, dropout_p=0.2)

        def around(*operands: Tensor, run: Any = forward) -> Tensor:
            return checkpoint(run, *operands, use_reentrant=use_reentrant)

        *operands, dy = tensors
        torch.manual_seed(0)
        output = (around if checkpoints else forward)(*operands)
        for each in operands:
            each.grad = None
        output.backward(dy)
        counts = counts_of(model), counts_of(model, Stat.SQUARE)
        found.append(([output, *(each.grad for each in operands)], counts))
    (bits, counts), (others, more) = found
    assert all(map(torch.equal, bits, others))
    assert counts == more
    assert counts[0]["attn.qk input"] == 1


def test_a_delayed_scale_follows_from_the_step_before() -> None:
    model, tensors = Model(), drawn_all()
    recipe = Recipe(rules=Recipe().override("*.[qp][kv]", scaling=Delayed(history_len=2)).rules)
    unclamp.convert(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for factor in (1.0, 4.0, 1.0):
        q, *others, dy = tensors
        model(q * factor, *others).backward(dy)
        (ledger,) = find_ledgers(model)
        clamped = counts_of(model, Stat.SATURATED)["attn.qk input"]
        assert (clamped > 0) == (factor == 4.0)
        optimizer.step()
    own = {fqn: operands for fqn, operands, _ in products_of(model)}["attn.qk"]
    scale = ledger.scale_of(own.indices["input"])
    torch.testing.assert_close(scale, 448 / (4 * tensors[0].detach().abs().max()))


class Caller(nn.Module):
    """A block in a user's code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention of one head."""
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return unclamp.attention(self, q, k, v, is_causal=True).squeeze(1)


class NotCaller(nn.Module):
    """Has an attribute of that name, and calls something else."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Return a layer's output."""
        return self.attention(x)


def test_a_module_that_calls_attention_is_known_by_the_call() -> None:
    model = nn.Sequential(Caller(), NotCaller())
    x = torch.randn(2, 5, 8)
    before = model(x)
    assert torch.equal(model(x), before)
    report = unclamp.convert(model, IN_FP8)
    assert list(report.converted) == ["0.qk", "0.pv", "0.qkv", "1.attention"]
    assert isinstance(model[0], Caller)
    assert not torch.equal(model(x), before)
    unclamp.revert(model)
    assert type(model[0]) is Caller
    assert torch.equal(model(x), before)


def test_first_and_last_are_layers() -> None:
    model = nn.Sequential(Caller(), Caller())
    assert unclamp.first_and_last(model) == ["^0.qkv", "^1.qkv"]


def test_a_rule_for_heads_that_nobody_knows_matches_nothing() -> None:
    with pytest.warns(UnclampWarning, match=r"\*\.qk\.\*"):
        unclamp.convert(nn.Sequential(Caller()), Recipe().override("*.qk.*", scaling="dynamic"))


def test_a_recipe_of_accumulation_modes_and_gemms_in_high_precision() -> None:
    tensors = drawn_all()
    plain = made(Model(), tensors)
    modes = {
        "hopper": {"accumulate": "hopper"},
        "output": {"output": HighPrecision()},
        "grads": {"grad_input": HighPrecision(), "grad_weight": HighPrecision()},
    }
    for name, changed in modes.items():
        model = Model()
        recipe = Recipe().override("*.qk", scaling="dynamic", grad_output_format="e5m2", **changed)
        unclamp.convert(model, recipe)
        for own, want in zip(made(model, tensors), plain, strict=True):
            assert (own - want).abs().max() < 0.2 * want.abs().max()
        if name == "output":
            torch.testing.assert_close(made(model, tensors)[0], plain[0])


def test_state_is_saved_where_it_is_computed_alone() -> None:
    computed, counted = Model(), Model()
    counted.add_module("layer", nn.Linear(2, 2))
    unclamp.convert(computed, IN_FP8)
    unclamp.convert(counted, Recipe())
    made(computed, drawn_all())
    own = {f"attn.unclamp_{p}_{role}_scale" for p in ("qk", "pv") for role in ROLES}
    assert own < set(computed.state_dict())
    assert not any(".unclamp_qk" in key for key in counted.state_dict())
    other = Model()
    unclamp.convert(other, IN_FP8)
    other.load_state_dict(computed.state_dict())
