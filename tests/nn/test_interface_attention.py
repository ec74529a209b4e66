"""Attention of transformers' models: found at their interface, and left as it was around it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import unclamp
from unclamp import Recipe
from unclamp.nn import find_ledgers, hf_attention, products_of
from unclamp.nn.attend import AttentionProducts
from unclamp.numerics import Stat

ALONE = (
    Recipe()
    .override("*.qk", scaling="dynamic")
    .override("*.pv", scaling="dynamic")
    .override("*", scaling="high_precision")
)
TINY = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = TINY | {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def llama(**settings: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **settings))


def gemma2(**settings: Any) -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=4, sliding_window=4, **settings))


def gpt2(**settings: Any) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**TINY, n_embd=16, n_layer=1, n_head=4, **settings))


def bert(**settings: Any) -> nn.Module:
    sizes = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    return BertForMaskedLM(BertConfig(**sizes, **settings))


def t5(**settings: Any) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    settings["decoder_start_token_id"] = 0
    return T5ForConditionalGeneration(T5Config(**TINY, **sizes, **settings))


MODELS = {"llama": llama, "gemma2": gemma2, "gpt2": gpt2, "bert": bert, "t5": t5}
CASES = [(m, i) for m in MODELS for i in ("eager", "sdpa") if (m, i) != ("gemma2", "sdpa")]


def made(name: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](attn_implementation=implementation)


def step(model: nn.Module) -> list[Tensor]:
    """Return loss and gradients of a step on a padded batch, and the random state after it."""
    torch.manual_seed(1)
    ids, mask = torch.randint(2, 32, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [loss, *(g for g in grads if g is not None), torch.get_rng_state()]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_counting_changes_no_bit_of_a_model(name: str, implementation: str) -> None:
    plain = made(name, implementation)
    model = copy.deepcopy(plain)
    observation = unclamp.observe(model)
    assert all(map(torch.equal, step(model), step(plain)))
    attentions = [m for m in model.modules() if AttentionProducts.of(m).every]
    assert len(observation.report.observed) == 2 * len(attentions) == 2 * (3 if name == "t5" else 1)
    (ledger,) = find_ledgers(model)
    names = set(observation.report.observed)
    for site, casts in zip(ledger.sites, ledger.pending[:, Stat.CASTS], strict=True):
        assert site.fqn not in names or casts == 1


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_products_without_casts_are_the_attention_of_the_model(
    name: str, implementation: str
) -> None:
    plain = made(name, implementation).eval()  # dropout of scores that are made is another
    model = copy.deepcopy(plain)
    unclamp.convert(model, ALONE)
    in_fp8 = step(model)
    for _, own, _ in products_of(model):  # computed in the way of FP8, in high precision
        own.modes = dict.fromkeys(own.modes, "high_precision")
    close = step(model)
    assert model.config._attn_implementation == implementation  # pyright: ignore
    for one, want, cast in zip(close[:-1], step(plain)[:-1], in_fp8, strict=False):
        torch.testing.assert_close(one, want, atol=2e-5, rtol=1e-4)
        assert (cast - want).abs().max() < 0.3 * want.abs().max() + 1e-3
    assert not torch.equal(in_fp8[0], close[0])


def test_probabilities_come_as_they_did() -> None:
    model = made("llama", "eager").eval()
    ids = torch.arange(7)[None]
    plain = model(ids, output_attentions=True)
    unclamp.convert(model, ALONE)
    own = model(ids, output_attentions=True)
    assert own.attentions[0].shape == plain.attentions[0].shape
    torch.testing.assert_close(own.attentions[0], plain.attentions[0], atol=0.02, rtol=0.1)
    assert not torch.equal(own.attentions[0], plain.attentions[0])


def test_with_a_cache_it_generates() -> None:
    for implementation in ("eager", "sdpa"):
        model = made("llama", implementation).eval()
        ids = torch.arange(2, 8)[None]
        plain = model.generate(ids, max_new_tokens=4, do_sample=False)  # pyright: ignore
        unclamp.convert(model, ALONE)
        own = model.generate(ids, max_new_tokens=4, do_sample=False)  # pyright: ignore
        assert own.shape == plain.shape


def test_copies_pickles_and_files_are_the_models_own(tmp_path: Path) -> None:
    model = made("llama", "sdpa")
    recipe = Recipe().override("*.qk.*", scaling="delayed").override("*.pv", scaling="delayed")
    report = unclamp.convert(model, recipe)
    heads = [name for name in report.converted if ".qk." in name]
    assert heads == [f"model.layers.0.self_attn.qk.{head}" for head in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(2, 9)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    want = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, want)
        assert type(other.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)  # pyright: ignore
    model.save_pretrained(tmp_path)  # pyright: ignore
    assert "unclamp" not in (tmp_path / "config.json").read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].self_attn).__name__ == "LlamaAttention"
    unclamp.revert(model)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_other_kernels_are_left_out_by_name() -> None:
    model = made("llama", "sdpa")
    model.config._attn_implementation = "flex_attention"  # pyright: ignore
    report = unclamp.convert(model, Recipe())
    assert report.observed == {}
    assert "flex_attention" in report.skipped["model.layers.0.self_attn"]
    model = made("llama", "eager")
    unclamp.convert(model, ALONE)
    model.config._attn_implementation = "sdpa"  # pyright: ignore
    step(model)  # follows the user's choice


def test_an_error_in_the_forward_leaves_the_config_alone() -> None:
    model = made("llama", "eager")
    unclamp.convert(model, ALONE)
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    config = attention.config
    with pytest.raises(AttributeError, match="shape"):
        attention(None)
    assert attention.config is config
    assert hf_attention.implementation_of(attention) == "eager"
