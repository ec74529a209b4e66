"""nn.MultiheadAttention: the plain module's bits where nothing is cast, and else its products."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unclamp
from unclamp import Delayed, Guarded, PerRow, Recipe, UnsupportedError
from unclamp.nn import find_ledgers
from unclamp.numerics import Stat

ATTENTION = Recipe().override("*.qk", scaling="dynamic").override("*.pv", scaling="dynamic")
DYNAMIC = Recipe.uniform("dynamic")
IN_FP8 = Recipe(input="dynamic", weight="dynamic", grad_output="dynamic", rules=ATTENTION.rules)
MODULES: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "time first": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 10},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "weights of heads": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "both masks": {"key_padding_mask": PADDING, "attn_mask": CAUSAL < 0},
    "mask of heads": {"attn_mask": torch.eye(7, dtype=torch.bool).expand(8, 7, 7)},
}


class Model(nn.Module):
    """A multi-head attention under a name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 4, **settings)

    def forward(self, *inputs: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output and probabilities."""
        return self.attn(*inputs, **settings)


def inputs_of(attention: nn.MultiheadAttention, kind: str) -> list[Tensor]:
    """Return queries, keys and values of 2 sequences of 7: the same tensor, or two, or three."""
    generator = torch.Generator().manual_seed(1)
    widths = [attention.embed_dim, attention.kdim, attention.vdim]
    shape = (2, 7) if attention.batch_first else (7, 2)
    q, k, v = (torch.randn(*shape, w, generator=generator).requires_grad_() for w in widths)
    return {"self": [q, q, q], "cross": [q, k, k], "three": [q, k, v]}[kind]


def run(model: Model, inputs: list[Tensor], **settings: Any) -> list[Tensor]:
    """Return output, probabilities and all gradients of a step."""
    torch.manual_seed(2)
    output, weights = model(*inputs, **settings)
    wanted = list({id(t): t for t in inputs}.values()) + list(model.parameters())
    return [
        output,
        *([] if weights is None else [weights]),
        *torch.autograd.grad(output.square().sum(), wanted, allow_unused=True),
        torch.get_rng_state(),
    ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_where_nothing_is_cast_the_bits_are_the_plain_modules(call: str, kind: str) -> None:
    is_short = call in ("weights of heads", "causal", "mask of heads")
    for name in ["time first"] if is_short else MODULES:
        settings = MODULES[name]
        if "kdim" in settings and kind != "three":
            continue
        plain = Model(dropout=0.3 if name == "time first" else 0.0, **settings)
        inputs = inputs_of(plain.attn, kind)
        want = run(plain, inputs, **CALLS[call])
        warming, observed = copy.deepcopy(plain), copy.deepcopy(plain)
        unclamp.convert(warming, Recipe(rules=ATTENTION.rules, warmup_steps=3))
        unclamp.observe(observed)
        for model in (warming, observed):
            assert same(run(model, inputs, **CALLS[call]), want)
            (ledger,) = find_ledgers(model)
            assert (ledger.pending[:, Stat.CASTS] > 0).all()


@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_without_a_batch(batch_first: bool) -> None:
    plain = Model(batch_first=batch_first)
    x = torch.randn(7, 8)
    want = plain(x, x, x, key_padding_mask=PADDING[1])
    model = copy.deepcopy(plain)
    unclamp.observe(model)
    assert all(map(torch.equal, model(x, x, x, key_padding_mask=PADDING[1]), want))
    unclamp.revert(model)
    unclamp.convert(model, IN_FP8)
    for own, right in zip(model(x, x, x, key_padding_mask=PADDING[1]), want, strict=True):
        assert own.shape == right.shape
        assert 0 < (own - right).abs().max() < 0.2


def hat(x: Tensor) -> Tensor:
    """Return a tensor after torch's own cast to e4m3."""
    scale = 448 / x.detach().abs().amax()
    codes = (x.detach() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return x + (codes.float() / scale - x).detach()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hat(x), hat(weight), bias)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_in_fp8_it_is_the_composition_of_its_products(module: str, kind: str) -> None:
    settings = MODULES[module]
    if "kdim" in settings and kind != "three":
        pytest.skip("keys and values of other widths are other tensors")
    model = Model(**settings)
    plain = copy.deepcopy(model)
    report = unclamp.convert(model, IN_FP8)
    names = ["in_proj"] if "kdim" not in settings else ["q_proj", "k_proj", "v_proj"]
    assert sorted(report.converted) == sorted(f"attn.{n}" for n in (*names, "qk", "pv", "out_proj"))
    attn = plain.attn
    inputs = inputs_of(attn, kind)
    output, weights = model(*inputs)
    q, k, v = ((t.transpose(0, 1) if attn.batch_first else t) for t in inputs)
    if kind == "self":
        q, k, v = linear(q, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    elif "kdim" in settings:
        own = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
        biases = attn.in_proj_bias.chunk(3)
        q, k, v = (linear(*each) for each in zip((q, k, v), own, biases, strict=True))
    else:
        bias = attn.in_proj_bias
        sizes = [8, 16] if kind == "cross" else [8, 8, 8]
        own = attn.in_proj_weight.split(sizes)
        biases = [None] * 3 if bias is None else bias.split(sizes)
        made = [linear(*each) for each in zip((q, k, v), own, biases, strict=False)]
        q, k, v = made if kind == "three" else (made[0], *made[1].chunk(2, -1))
    if attn.bias_k is not None and attn.bias_v is not None:
        k, v = (
            torch.cat([t, one.expand(1, 2, 8), torch.zeros(1, 2, 8)])
            for t, one in ((k, attn.bias_k), (v, attn.bias_v))
        )
    q, k, v = (t.reshape(len(t), 2, 4, 2).permute(1, 2, 0, 3) for t in (q, k, v))
    p = (hat(q) @ hat(k).mT / math.sqrt(2)).softmax(-1)
    heads = (hat(p) @ hat(v)).permute(2, 0, 1, 3).reshape(7, 2, 8)
    right = linear(heads, attn.out_proj.weight, attn.out_proj.bias)
    right = right.transpose(0, 1) if attn.batch_first else right
    torch.testing.assert_close(output, right, atol=2e-3, rtol=0)
    torch.testing.assert_close(weights, p.mean(1), atol=1e-5, rtol=0)
    grads = torch.autograd.grad(output.sum(), list(model.parameters()))
    wants = torch.autograd.grad(right.sum(), list(plain.parameters()))
    for one, want in zip(grads, wants, strict=True):
        assert (one - want).abs().max() <= 0.15 * want.abs().max() + 1e-3


def test_evaluation_does_not_go_past_the_casts() -> None:
    encoder = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, dropout=0.0)
    plain, x = copy.deepcopy(encoder).eval(), torch.randn(2, 7, 8)
    model = nn.Sequential(encoder)
    report = unclamp.convert(model, IN_FP8)
    assert {"0.self_attn.in_proj", "0.self_attn.out_proj"} < set(report.converted)
    assert report.skipped == {}
    training = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), training)
        assert not torch.allclose(model(x), plain(x), atol=1e-5)
    unclamp.revert(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    unclamp.observe(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_an_attention_alone_keeps_off_its_own_fast_path() -> None:
    model = Model(batch_first=True).eval()
    x = torch.randn(2, 7, 8)
    with torch.no_grad():
        plain = model(x, x, x)[0]
        unclamp.convert(
            model, Recipe.uniform("high_precision").override("*.out_proj", input="dynamic")
        )
        assert 0 < (model(x, x, x)[0] - plain).abs().max() < 0.1


def test_parts_of_a_weight_have_no_histories_of_rows() -> None:
    model = Model()
    rows = Guarded(granularity=PerRow())
    unclamp.convert(model, Recipe(weight=rows))
    x, y = torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    model(x, x, x)
    with pytest.raises(UnsupportedError, match=r"attn\.in_proj: expected a scale a tensor"):
        model(x, y, y)


def test_what_is_skipped_is_left_to_torch() -> None:
    whole, part = Model(), Model()
    report = unclamp.convert(part, DYNAMIC, skip=["*.in_proj", "*.qk"])
    assert list(report.converted) == ["attn.out_proj"]
    assert list(report.observed) == ["attn.pv"]
    x = torch.randn(7, 2, 8)
    assert (part(x, x, x)[0] - whole(x, x, x)[0]).abs().max() > 0


@pytest.mark.filterwarnings("ignore:no layer is in FP8")
def test_a_skipped_attention_reads_its_last_layers_weight() -> None:
    for skip in (["attn"], ["*.in_proj", "*.[qp][kv]"]):
        report = unclamp.convert(Model(), DYNAMIC, skip=skip)
        assert report.converted == {}
        assert report.unmatched == {}
        assert "which never calls it" in report.skipped["attn.out_proj"]


def test_copies_pickles_and_files_hold_its_state() -> None:
    model = Model()
    unclamp.convert(model, Recipe(rules=Recipe().override("*.[qp][kv].*", scaling=Delayed()).rules))
    x = torch.randn(7, 2, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(x, x, x)[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = model.state_dict()
    assert state["attn.unclamp_qk_input_scale"].shape == (4,)
    loaded = Model()
    unclamp.convert(loaded, find_ledgers(model)[0].recipe or Recipe())
    loaded.load_state_dict(state)
    want = model(x, x, x)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x, x, x)[0], want)
    unclamp.revert(model)
    assert type(model.attn) is nn.MultiheadAttention
