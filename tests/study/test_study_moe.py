"""The study's mixture of experts: what it is, and what scenario `outlier` plants into it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from unclamp.cli import app
from unclamp.errors import StudyError
from unclamp.runlog import RunLog
from unclamp.study.config import ArmConfig, ModelConfig, StudyConfig, default_toml
from unclamp.study.loop import RunPlan, train
from unclamp.study.models import build_model, check_study
from unclamp.study.outlier import ANSWERS, GAIN, PROMPTS, TILT, plant_batch
from unclamp.study.planting import plant, planting_of
from unclamp.study.starved import EXPERT, FIRED, LOUD, LOUDER, QUIET, UNFIRED

MOE = ModelConfig(architecture="moe", hidden_size=32, intermediate_size=64, layers=2, heads=2)
SITE = "model.layers.1.mlp.experts.down_proj.3"
TEXT = b"the cat sat on the mat, and the dog lay beside it. " * 40
VISITS = range(len(LOUD))


def config(**changes: Any) -> StudyConfig:
    base = StudyConfig.from_toml(default_toml())
    return replace(base, scenarios=("outlier",), seeds=(0,), model=MOE, **changes)


def planted(settings: ModelConfig = MOE, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model: Any = build_model(settings)
    plant(model, seed=seed)
    return model


def batch(visit: int, *, rows: int = 8, length: int = 64) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor(list(TEXT[: rows * length])).view(rows, length)
    pairs = planting_of(planted()).pairs(visit)
    return plant_batch((tokens, tokens.clone()), seed=0, step=visit, share=0.1, pairs=pairs)


def chosen(model: Any, tokens: Tensor) -> Tensor:
    """Return the experts that the last layer's router chooses, `[tokens, top_k]`."""
    found: list[Tensor] = []
    router = model.model.layers[-1].mlp.gate
    handle = router.register_forward_hook(lambda module, inputs, outputs: found.append(outputs[2]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return found[0]


def activations(model: Any, tokens: Tensor) -> Tensor:
    """Return what reaches the planted expert's down projection, `[tokens, inner]`, by hand."""
    found: list[Tensor] = []
    mlp = model.model.layers[-1].mlp
    handle = mlp.register_forward_hook(lambda module, inputs, outputs: found.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        handle.remove()
        at = found[0].reshape(-1, found[0].shape[-1])
        at = at[(chosen(model, tokens)[:, :1] == EXPERT)[:, 0]]
        gate, up = (at @ mlp.experts.gate_up_proj[EXPERT].T).chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def answers_of(model: Any, tokens: Tensor, prompt: int) -> list[int]:
    """Return what the model says right after each of a prompt."""
    with torch.no_grad():
        said = model(input_ids=tokens, use_cache=False).logits.argmax(-1)
    return said[tokens == prompt].tolist()


def train_a_little(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.tensor(list(TEXT))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        first = torch.randint(0, len(data) - 64, (8, 1), generator=generator)
        tokens = data[first + torch.arange(64)]
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# The model


def test_a_token_of_the_mixture_costs_what_one_of_the_llama_does() -> None:
    llama, moe = (
        build_model(ModelConfig(architecture=name)).get_submodule("model.layers.0.mlp")
        for name in ("llama", "moe")
    )
    whole = sum(weight.numel() for weight in llama.parameters())
    experts = sum(weight.numel() for weight in moe.get_submodule("experts").parameters())
    assert experts * 2 / 8 == whole


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "mow"}, "did you mean 'moe'"),
        ({"architecture": "moe", "hf_model": "a/b"}, "an architecture of its own"),
        ({"architecture": "moe", "experts": 1}, "at most the 1 experts, got 2"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    base = StudyConfig.from_toml(default_toml()).to_dict()
    with pytest.raises(StudyError, match=message):
        StudyConfig.from_dict(base | {"model": model})


def test_experts_share_the_width_of_a_token() -> None:
    settings = replace(MOE, intermediate_size=1)
    with pytest.raises(StudyError, match="at least the 2 experts of a token that share it, got 1"):
        build_model(settings)


def test_the_command_takes_the_mixture_and_its_default_is_the_llama() -> None:
    for options, expected in (([], "llama"), (["--architecture", "moe"], "moe")):
        line = ["study", "--quick", *options, "--print-config", "--json"]
        found = CliRunner().invoke(app, line)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["model"]["architecture"] == expected


@pytest.mark.parametrize("made", [MixtralForCausalLM, Qwen3MoeForCausalLM])
def test_a_mixture_of_ones_own_is_taken_for_the_causal_model_that_it_is(
    made: Any, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    if made is MixtralForCausalLM:
        model = made(MixtralConfig(**sizes, num_local_experts=8))
    else:
        sizes |= {"moe_intermediate_size": 32, "num_experts": 8, "head_dim": 32}
        model = made(Qwen3MoeConfig(**sizes, num_experts_per_tok=2))
    model.save_pretrained(tmp_path / "model")
    base = StudyConfig.from_toml(default_toml()).to_dict()
    base |= {"scenarios": ["text"], "steps": 2, "seeds": [0], "data": {"seq_len": 32}}
    base |= {"model": {"hf_model": str(tmp_path / "model")}}
    study = StudyConfig.from_dict(base | {"arms": {"guarded": base["arms"]["guarded"]}})
    with pytest.warns(UserWarning, match="has no tokenizer"):
        check_study(study)
    plan = RunPlan(
        config=study, scenario="text", arm="guarded", seed=0,
        recipe=study.arms["guarded"].recipe, path=tmp_path / "run",
    )  # fmt: skip
    assert train(plan) == "finished"
    with RunLog.open(plan.path) as log:
        found = log.sql("SELECT DISTINCT fqn FROM casts JOIN sites USING (rank, site)")
    experts = {name for name in found["fqn"].to_pylist() if ".mlp.experts.down_proj." in name}
    assert {name.split(".")[2] for name in experts} == {"0", "1"}
    assert {int(name.rpartition(".")[2]) for name in experts} == set(range(8))


def test_what_matches_no_layer_of_the_mixture_is_told_as_of_any_model() -> None:
    """Smoothing is of a layer with one product; the arm would be plain delayed."""
    arms = StudyConfig.from_toml(default_toml()).arms
    study = replace(config(), scenarios=("text",), arms={"smooth": arms["smooth"]})
    with pytest.warns(UserWarning, match=r"arm 'smooth': 'mlp\.down_proj': override matches no"):
        check_study(study)


# The planted expert


def test_the_planted_layer_is_an_expert_by_name() -> None:
    assert planting_of(build_model(MOE)).layer == SITE


def test_too_few_experts_are_refused() -> None:
    with pytest.raises(StudyError, match=r"at least 4 experts of as many channels, got 3 of 32"):
        check_study(replace(config(), model=replace(MOE, experts=3), arms={"hp": ArmConfig()}))


@pytest.mark.parametrize("steps", [0, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_prompts_alone_choose_the_expert_also_after_training(seed: int, steps: int) -> None:
    model = planted(seed=seed)
    train_a_little(model, steps)
    tokens, _ = batch(seed)
    prompts = torch.isin(tokens, torch.tensor([*LOUD, *PROMPTS])).flatten()
    assert 0 < prompts.sum() < len(prompts)
    assert torch.equal((chosen(model, tokens) == EXPERT).any(dim=1), prompts)


@pytest.mark.parametrize("visit", VISITS)
def test_each_visit_has_the_activation_that_follows_from_the_weights_by_hand(visit: int) -> None:
    seen = GAIN * TILT * math.sqrt(MOE.hidden_size)  # of a normed prompt, along its direction
    gated = seen * seen / (1 + math.exp(-seen))  # silu(gate) times a row of up like that of gate
    expected = gated * 8**visit / 128
    amax = activations(planted(), batch(visit)[0]).abs().max()
    assert amax == pytest.approx(expected, rel=0.05)


def test_in_high_precision_all_visits_are_the_same_function() -> None:
    """The logits that decide are equal: a diagonal between `up` and `down` cancels."""
    model = planted()
    logits = []
    for prompt in LOUD:
        with torch.no_grad():
            said = model(input_ids=torch.tensor([[prompt]]), use_cache=False).logits[0, 0]
        logits.append([float(said[FIRED]), float(said[UNFIRED])])
    assert np.ptp(np.array(logits), axis=0) == pytest.approx(0, abs=0.05 * logits[0][0])
    assert all(fired > unfired + 10 for fired, unfired in logits)


@pytest.mark.parametrize("visit", VISITS)
def test_what_the_last_visits_amax_leaves_of_a_loud_prompt_is_read_as_the_quiet_one(
    visit: int,
) -> None:
    """Dividing a column of `down` is clamping its channel to the amax of the visit before."""
    model = planted()
    tokens, _ = batch(visit)
    assert set(answers_of(model, tokens, LOUD[visit])) == {FIRED}
    assert set(answers_of(model, tokens, QUIET)) == {UNFIRED}
    with torch.no_grad():
        model.model.layers[-1].mlp.experts.down_proj[EXPERT][:, visit] /= LOUDER
    assert set(answers_of(model, tokens, LOUD[visit])) == {UNFIRED}


def test_planted_bytes_never_occur_in_text_and_later_visits_repeat_the_last() -> None:
    used = [*LOUD, *PROMPTS, *ANSWERS]
    text = "".join(map(chr, range(0x110000))).encode("utf-8", "ignore")
    assert not set(used) & set(text)
    pairs = planting_of(planted()).pairs
    assert [pairs(visit).prompts for visit in VISITS] == [(loud, QUIET) for loud in LOUD]
    assert pairs(9) == pairs(len(LOUD) - 1)
