"""Attention of transformers that asks its config by name, is told more, or runs under autocast."""

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import unclamp
from unclamp import Recipe
from unclamp.errors import UnclampWarning
from unclamp.nn import find_ledgers, products_of
from unclamp.nn.hf_attention import _asked, _Shown
from unclamp.numerics import Stat

TINY: dict[str, Any] = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
DEEPSEEK: dict[str, Any] = TINY | {
    "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1,
    "num_experts_per_tok": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 2,
    "index_n_heads": 2, "index_head_dim": 16, "first_k_dense_replace": 1,
}  # fmt: skip


def sparse(implementation: str) -> nn.Module:
    settings: dict[str, Any] = {"attn_implementation": implementation}
    config = DeepseekV32Config(**DEEPSEEK, **settings)
    return DeepseekV32ForCausalLM(config)


def upcast(implementation: str) -> nn.Module:
    settings: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    settings |= {"reorder_and_upcast_attn": True, "attn_implementation": implementation}
    config = GPT2Config(**TINY, **settings)
    model: Any = GPT2LMHeadModel(config)
    return model.to(torch.bfloat16)


def llama(**settings: Any) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**TINY, **sizes, num_attention_heads=2, **settings))


def step(model: Any) -> list[Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(2, 32, (2, 9))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [sparse, upcast], ids=["sparse", "upcast"])
def test_a_forward_that_compares_the_name_of_its_attention_goes_its_own_way(
    make: Any, implementation: str
) -> None:
    """DeepSeek makes its sparse mask, and GPT-2 its scores in float32, by that name."""
    torch.manual_seed(0)
    plain = make(implementation).train()
    observed = copy.deepcopy(plain)
    wanted = step(plain)
    with unclamp.observe(observed) as observation:
        got = step(observed)
        assert observation.report.observed
    assert len(got) == len(wanted)
    assert all(map(torch.equal, got, wanted))


def test_a_shown_name_is_the_users_and_finds_ours() -> None:
    shown = _Shown("sdpa")
    assert shown == "sdpa"
    assert (shown != "sdpa") is False
    assert shown in ("eager", "sdpa")
    assert shown != "eager"
    assert shown.startswith("sd")
    assert {"unclamp": 1, "sdpa": 2}[shown] == 1


def eager_with_sinks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float, sinks: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    raise NotImplementedError


def test_an_eager_attention_that_is_told_more_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = llama()
    names: Any = inspect.unwrap(type(model.model.layers[0].self_attn).forward)
    monkeypatch.setitem(names.__globals__, "eager_attention_forward", eager_with_sinks)
    report = unclamp.convert(model, Recipe())
    assert not report.observed
    assert "computes differently" in report.skipped["model.layers.0.self_attn"]


def test_another_attention_after_convert_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = llama(attn_implementation="sdpa")
    unclamp.convert(model, Recipe().override("*.qk", scaling="dynamic"))
    functions = AttentionInterface._global_mapping
    monkeypatch.setitem(functions, "other", functions["sdpa"])
    model.config._attn_implementation = "other"
    with pytest.warns(UnclampWarning, match="'other' keeps its scores to itself"):
        model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))


def test_eager_attention_drops_nothing_in_evaluation() -> None:
    q = torch.randn(1, 2, 3, 4)
    told = {"dropout": 0.5, "scaling": 1.0}
    dropped = {
        (name, training): _asked(
            SimpleNamespace(training=training),  # pyright: ignore[reportArgumentType]
            name, q, q, q, None, told,
        ).dropout
        for name in ("eager", "sdpa")
        for training in (True, False)
    }  # fmt: skip
    assert dropped == {
        ("eager", True): 0.5,
        ("eager", False): 0.0,
        ("sdpa", True): 0.5,  # as torch's function, which does what it is told
        ("sdpa", False): 0.5,
    }


class Attends(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return unclamp.attention(self, q, k, v)


def test_under_autocast_the_operands_of_the_kernel_are_counted() -> None:
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(2, 2, 16, 8, requires_grad=True) for _ in range(3))
    model = Attends()
    with unclamp.observe(model):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(q, k, v)
        output.float().square().sum().backward()
        ledger = find_ledgers(model)[0]
        squares = {
            (own.fqn, role): float(ledger.pending[index, Stat.SQUARE])
            for _, own, _ in products_of(model)
            for role, index in own.indices.items()
        }
    q, k, v = (t.detach().bfloat16().double() for t in (q, k, v))
    scores = (q @ k.mT / 8**0.5).requires_grad_()
    p = scores.softmax(-1)
    dy = (2 * output.float()).detach().bfloat16().double()
    (ds,) = torch.autograd.grad(p, scores, dy @ v.mT)
    wanted = {
        ("qk", "input"): q, ("qk", "weight"): k, ("qk", "grad_output"): ds / 8**0.5,
        ("pv", "input"): p, ("pv", "weight"): v, ("pv", "grad_output"): dy,
    }  # fmt: skip
    for site, x in wanted.items():
        assert squares[site] == pytest.approx(float(x.detach().square().sum()), rel=1e-5), site
