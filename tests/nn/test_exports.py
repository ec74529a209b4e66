"""What files for others hold of a converted model: the weights of the plain one."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD
from transformers import LlamaConfig, LlamaForCausalLM

import unclamp
from unclamp import Recipe


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        vocab_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module) -> None:
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(16).reshape(2, 8)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model: LlamaForCausalLM, path: Path) -> dict[str, Tensor]:
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def test_save_pretrained_writes_the_keys_of_the_plain_model(tmp_path: Path) -> None:
    model = llama()
    plain = saved(model, tmp_path / "plain").keys()
    unclamp.convert(model, Recipe())
    train(model)
    assert any("unclamp_" in key for key in model.state_dict())
    assert saved(model, tmp_path / "mine").keys() == plain
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert saved(twin, tmp_path / "twin").keys() == plain
    again = LlamaForCausalLM.from_pretrained(tmp_path / "mine")
    weights = {k: v for k, v in model.state_dict().items() if "unclamp_" not in k}
    assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())


def test_modules_that_are_put_elsewhere_after_the_conversion_are_left_out_too(tmp_path) -> None:
    model = llama()
    plain = saved(model, tmp_path / "plain").keys()
    attention: Any = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    unclamp.convert(nn.ModuleDict({"wrapped": model}), Recipe())
    attention.q_proj = attention.q_proj[0]
    assert saved(model, tmp_path / "mine").keys() == plain


def test_reverting_takes_the_names_out_of_the_models_own_list(tmp_path: Path) -> None:
    model = llama()
    before = set(model._keys_to_ignore_on_save or ())
    unclamp.convert(model, Recipe())
    saved(model, tmp_path)
    unclamp.revert(model)
    assert set(model._keys_to_ignore_on_save or ()) == before


class LoraLinear(nn.Module):
    """As PEFT's layer: it names those of its modules that are the adapter's."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_what_lies_in_an_adapter_saves_weights_alone_and_the_base_all() -> None:
    model = nn.Sequential(LoraLinear(nn.Linear(6, 8)), nn.Linear(8, 4))
    assert len(unclamp.convert(model, Recipe()).converted) == 2
    unclamp.revert(model)
    recipe = Recipe().override("lora_*.*", weight="delayed")  # which takes the adapter in
    assert len(unclamp.convert(model, recipe).converted) == 4
    keys = model.state_dict().keys()
    assert {key for key in keys if "lora_" in key} == {
        "0.lora_A.default.weight",
        "0.lora_B.default.weight",
    }
    assert sum(key.startswith("0.base_layer.unclamp_") for key in keys) == 7
    assert sum(key.startswith("1.unclamp_") for key in keys) == 7
    model.load_state_dict(model.state_dict())


def test_a_module_that_an_adapter_copied_after_the_conversion_saves_weights_alone() -> None:
    head = nn.Sequential(nn.Linear(6, 8))
    unclamp.convert(head, Recipe())
    wrapper = nn.Module()
    wrapper.original_module = head[0]
    wrapper.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(head[0])})
    keys = nn.ModuleDict({"lm_head": wrapper}).state_dict().keys()
    assert [key for key in keys if "modules_to_save" in key] == [
        "lm_head.modules_to_save.default.weight",
        "lm_head.modules_to_save.default.bias",
    ]
    assert "lm_head.original_module.unclamp_input_scale" in keys


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_pefts_own_files_hold_no_key_of_ours_and_what_it_merges_is_not_clamped(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(llama(), config)
    unclamp.convert(model, Recipe())
    train(model)
    assert [key for key in peft.get_peft_model_state_dict(model) if "unclamp_" in key] == []
    model.save_pretrained(tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(written) == 5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(100)
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        merged(input_ids=torch.arange(16).reshape(2, 8))
    sites = {str(site.name): site for site in unclamp.evaluation_counts(merged).sites}
    weights = [site for name, site in sites.items() if "q_proj" in name and "weight" in name]
    assert [(site.saturated, site.recast) for site in weights] == [(0, 1)]
    assert not any("unclamp_" in key for key in saved(merged, tmp_path / "merged"))
