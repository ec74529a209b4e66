"""PEFT's adapters over a converted base: names, bits, files, merging, several adapters.

The truth is the run of the same model in the other order, a plain model's files, and histories
that hooks of our own take down.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD

import unclamp
from unclamp import Recipe
from unclamp.nn import find_ledgers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT asks transformers for an attribute by its old name, and looks for a config of the hub.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning",
    "ignore:Could not find a config file:UserWarning",
    "ignore:Found missing adapter keys:UserWarning",
    "ignore:Already found a .peft_config. attribute:UserWarning",
)

IDS = torch.arange(32).reshape(2, 2, 8)
TARGETS = ["q_proj", "v_proj"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


def llama() -> Any:
    """A small model, the same each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        vocab_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def adapted(model: Any, **settings: Any) -> Any:
    """The model with an adapter, the same each time."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**({"r": 4, "target_modules": TARGETS} | settings))
    return peft.get_peft_model(model, config)


def train(model: Any, steps: int = 3, *, lr: float = 0.1, start: int = 0) -> list[float]:
    """Train by two microsteps a step; return the losses."""
    torch.manual_seed(start)
    model.train()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(start, start + steps):
        for ids in IDS.roll(step, 2):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def names(model: nn.Module) -> set[str]:
    return {
        site.fqn
        for ledger in find_ledgers(model)
        for index, site in enumerate(ledger.sites)
        if index not in ledger.gone
    }


def spoil(model: nn.Module) -> None:
    """Give the adapter such weights that a merged layer has a hundred times its size."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(100)


@pytest.fixture(scope="module")
def plain_names() -> set[str]:
    model = llama()
    unclamp.convert(model, Recipe())
    return names(model)


# ---- both orders -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_orders_have_the_names_and_the_bits(kind: str, plain_names: set[str]) -> None:
    settings = KINDS[kind]
    first = llama()
    unclamp.convert(first, Recipe())
    first = adapted(first, **settings)
    after = adapted(llama(), **settings)
    report = unclamp.convert(after, Recipe())
    copies = {"lm_head.modules_to_save.default"} if "modules_to_save" in settings else set()
    assert names(first) == names(after) == plain_names | copies
    assert names(after) == set(report.converted) | set(report.observed)
    assert train(first) == train(after)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, after.get_parameter(name)), name


@pytest.mark.cell("PEFT", "updates once a step")
@pytest.mark.cell("PEFT", "accumulation")
def test_the_frozen_base_learns_once_a_step_from_all_microsteps() -> None:
    model = adapted(llama())
    unclamp.convert(model, Recipe())
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    seen: list[float] = []
    hook = layer.base_layer.register_forward_pre_hook(
        lambda _, args: seen.append(float(args[0].detach().abs().amax()))
    )
    train(model, 5)
    hook.remove()
    (ledger,) = find_ledgers(model)
    assert ledger.updates == 5
    for site, history in zip(ledger.sites, ledger.amax_history, strict=False):
        if str(site.name) == "model.layers.1.self_attn.q_proj input":
            steps = [max(seen[2 * n : 2 * n + 2]) for n in range(5)]
            assert history[:5].tolist() == steps[::-1]
            break
    else:
        pytest.fail("no such site")


# ---- what is left out --------------------------------------------------------------------------


def test_an_adapters_layers_are_left_out_with_a_reason_unless_a_rule_names_them() -> None:
    model = adapted(llama())
    report = unclamp.convert(model, Recipe())
    left = {fqn: why for fqn, why in report.skipped.items() if "lora_" in fqn}
    assert len(left) == 8
    assert "'lora_A.*'" in left["model.layers.0.self_attn.q_proj.lora_A.default"]
    assert "left in high precision on purpose" in str(report)
    unclamp.revert(model)
    some = Recipe().override("q_proj.lora_A.*", input="dynamic").override("*", weight="dynamic")
    taken = unclamp.convert(model, some).converted
    assert [fqn for fqn in taken if "lora_" in fqn] == [
        f"model.layers.{n}.self_attn.q_proj.lora_A.default" for n in (0, 1)
    ]
    assert taken["model.layers.0.self_attn.q_proj.lora_A.default"].operands["input"].scaling == (
        unclamp.Dynamic()
    )
    assert train(model, 1)


@pytest.mark.parametrize(
    "glob", ["q_proj", "*.q_proj.base_layer", "base_model.model.*.q_proj.*", "self_attn.q_proj"]
)
def test_a_glob_means_the_base_layer_in_either_spelling(glob: str) -> None:
    model = adapted(llama())
    report = unclamp.convert(model, Recipe(), skip=[glob])
    layers = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert [fqn for fqn in report.skipped if fqn in layers] == layers
    assert len(report.converted) == 13
    unclamp.revert(model)
    unclamp.convert(model, Recipe())
    switched = unclamp.switch(model, glob, input="dynamic").switched
    assert [fqn for fqn in switched if fqn in layers] == layers
    assert len(switched) == 2


def test_what_is_left_out_by_name_is_so_in_its_copies_too() -> None:
    model = adapted(llama(), modules_to_save=["lm_head"])
    report = unclamp.convert(model, Recipe(), skip=["lm_head"])
    assert {fqn for fqn in report.skipped if "lm_head" in fqn} == {
        "lm_head",
        "lm_head.modules_to_save.default",
    }


def test_a_rule_for_a_site_of_a_log_names_the_layer_under_the_adapter() -> None:
    site = unclamp.SiteName("model.layers.1.self_attn.v_proj", "input")
    model = adapted(llama())
    report = unclamp.convert(model, Recipe().at_sites([site]))
    dynamic = [
        fqn
        for fqn, plan in report.converted.items()
        if plan.operands["input"].scaling == unclamp.Dynamic()
    ]
    assert dynamic == [site.fqn]


def test_what_dora_multiplies_past_the_casts_is_named() -> None:
    model = adapted(llama(), use_dora=True, lora_dropout=0.1)
    batch = {"input_ids": IDS[0], "labels": IDS[0]}
    report = unclamp.convert(model, Recipe(), example=batch)
    fqn = "model.layers.0.self_attn.q_proj"
    assert "past the casts" in report.skipped[f"{fqn}.lora_magnitude_vector.default"]
    assert report.coverage is not None
    states = {(p.fqn, p.state): p.why for p in report.coverage.products if p.fqn == fqn}
    assert states == {
        (fqn, "converted"): "",
        (fqn, "left out"): "its weight is read outside of the layer",
    }


# ---- weights that PEFT writes ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_no_evaluation_clamps_a_merged_weight(how: str, plain_names: set[str]) -> None:
    model = adapted(llama())
    unclamp.convert(model, Recipe())
    train(model, 2)
    spoil(model)
    merged = getattr(model, how)() or model
    merged.eval()
    unclamp.evaluation_counts(merged, reset=True)
    with torch.no_grad():
        merged(input_ids=IDS[0])
    weights = [s for s in unclamp.evaluation_counts(merged).sites if s.name.role == "weight"]
    assert [site.saturated for site in weights] == [0] * 15
    written = {s.name.fqn for s in weights if s.recast}
    assert written == {f"model.layers.{n}.self_attn.{t}" for n in (0, 1) for t in TARGETS}
    assert names(merged) == plain_names


def test_merging_and_taking_it_back_leaves_the_training_as_it_was() -> None:
    found = []
    for merges in (False, True):
        model = adapted(llama())
        unclamp.convert(model, Recipe())
        train(model, 2)
        if merges:
            weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
            model.merge_adapter()
            with torch.no_grad():
                model.eval()(input_ids=IDS[0])
            model.unmerge_adapter()
            for name, weight in weights.items():  # PEFT subtracts, which rounds
                model.get_parameter(name).data.copy_(weight)
        found.append(train(model, 2, start=2))
    assert found[0] == found[1]


def test_disabling_and_unloading_give_the_base(plain_names: set[str]) -> None:
    base = llama()
    unclamp.convert(base, Recipe())
    base.eval()
    model = adapted(copy.deepcopy(base)).eval()
    spoil(model)
    with torch.no_grad():
        expected = base(input_ids=IDS[0]).logits
        assert not torch.equal(model(input_ids=IDS[0]).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS[0]).logits, expected)
        unloaded = model.unload()
        assert torch.equal(unloaded(input_ids=IDS[0]).logits, expected)
    assert names(unloaded) == plain_names


def test_each_of_several_adapters_trains_and_what_rests_is_not_warned_of(tmp_path: Path) -> None:
    model = adapted(llama(), modules_to_save=["lm_head"])
    config = peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"])
    model.add_adapter("two", config)
    report = unclamp.convert(model, Recipe())
    heads = ["lm_head", *(f"lm_head.modules_to_save.{name}" for name in ("default", "two"))]
    assert [fqn for fqn in report.converted if "lm_head" in fqn] == heads
    with warnings.catch_warnings():
        warnings.simplefilter("error", unclamp.UnclampWarning)
        with unclamp.Recorder(model, tmp_path / "run") as recorder:
            for name in ("default", "two"):
                model.set_adapter(name)
                optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
                for _ in range(9):
                    loss = model(input_ids=IDS[0], labels=IDS[0]).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    recorder.step(loss=loss)
    with unclamp.RunLog.open(tmp_path / "run") as log:
        found = log.sql("SELECT DISTINCT fqn FROM sites WHERE fqn LIKE 'lm_head%' ORDER BY fqn")
    assert found.to_pydict()["fqn"] == heads


# ---- other adapters ----------------------------------------------------------------------------


OTHERS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt encoder": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "tokens": lambda: peft.LoraConfig(target_modules=TARGETS, trainable_token_indices=[1, 2]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_kinds_train(kind: str, plain_names: set[str]) -> None:
    model = peft.get_peft_model(llama(), OTHERS[kind]())
    report = unclamp.convert(model, Recipe())
    assert set(report.converted) | set(report.observed) == plain_names
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses = train(model, 9, lr=3.0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert moved <= {n for n, p in model.named_parameters() if p.requires_grad}
    assert losses[-1] != losses[-3]
    (ledger,) = find_ledgers(model)
    assert ledger.updates == 9


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.cell("PEFT", "save format clean")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_adapters_file_has_the_keys_of_a_plain_models(kind, order, tmp_path: Path) -> None:
    plain = adapted(llama(), **KINDS[kind])
    plain.save_pretrained(tmp_path / "plain")
    model = llama()
    if order == "before":
        unclamp.convert(model, Recipe())
    model = adapted(model, **KINDS[kind])
    if order == "after":
        unclamp.convert(model, Recipe())
    train(model, 1)
    model.save_pretrained(tmp_path / "mine")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "mine")]
    assert files[0].keys() == files[1].keys()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain.merge_and_unload().save_pretrained(tmp_path / "plain merged")
    whole = [load_file(tmp_path / n / "model.safetensors") for n in ("plain merged", "merged")]
    assert whole[0].keys() == whole[1].keys()


def parts(model: Any, folder: Path) -> None:
    """Save what a trainer of adapters saves, and the scaling state."""
    model.save_pretrained(folder)
    unclamp.ScalingState(model).save(folder / "unclamp_scaling_state.pt")


@pytest.mark.cell("PEFT", "resume bit for bit")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_training_goes_on_bit_for_bit_from_the_adapters_file(kind, order, tmp_path) -> None:
    model = adapted(llama(), **KINDS[kind])
    unclamp.convert(model, Recipe())
    train(model, 3)
    parts(model, tmp_path)
    expected = train(model, 3, start=3)

    base = llama()
    if order == "before":
        unclamp.convert(base, Recipe())
    again = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    if order == "after":
        unclamp.convert(again, Recipe())
    unclamp.ScalingState(again).load(tmp_path / "unclamp_scaling_state.pt")
    assert train(again, 3, start=3) == expected
    weights = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    states = [unclamp.ScalingState(m).state_dict() for m in (model, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# ---- compiled ----------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers, for a compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.cell("PEFT", "compile")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_adapter_has_the_names_and_the_bits_of_eager_mode() -> None:
    torch.compiler.reset()
    found = []
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    for compiles in (False, True):
        torch.manual_seed(0)
        net = Two()
        model: Any = adapted(net, target_modules=["up"])
        unclamp.convert(model, Recipe())
        if compiles:
            model = torch.compile(model, backend="aot_eager")
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for batch in x:
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert names(model) == {"up", "down"}
        (ledger,) = find_ledgers(model)
        found.append((losses, ledger.scale.tolist(), ledger.amax_history.tolist()))
    assert found[0] == found[1]


# ---- quantised bases ---------------------------------------------------------------------------


class Params4bit(nn.Parameter):
    """As bitsandbytes': two weights in a byte."""


class Linear4bit(nn.Linear):
    """As bitsandbytes': its weight is codes, and its forward its own."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.absmax = plain.weight.detach().abs().amax()
        codes = (plain.weight.detach() / self.absmax * 7 + 8).round().to(torch.uint8).reshape(-1, 1)
        self.weight = Params4bit(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.to(x.dtype) - 8) / 7 * self.absmax
        return x @ weight.reshape(self.out_features, self.in_features).T


def quantised() -> Any:
    """A model whose layers are all quantised, but the head, as transformers loads one."""
    model = llama()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, Linear4bit(module))
    return model


def test_of_a_quantised_base_one_sentence_says_that_little_is_left() -> None:
    model = adapted(quantised())
    with pytest.warns(unclamp.UnclampWarning) as said:
        report = unclamp.convert(model, Recipe())
    assert [str(each.message) for each in said] == [
        "the model is quantised (14 layers, such as model.layers.0.self_attn.q_proj: its weights "
        "are quantised (Linear4bit, uint8)), and FP8 needs weights in high precision: little worth "
        "it is left, lm_head"
    ]
    assert list(report.converted) == ["lm_head"]
    assert train(model, 2)


def test_of_a_wholly_quantised_base_one_sentence_says_that_nothing_is_left() -> None:
    model = adapted(quantised())
    with pytest.warns(unclamp.UnclampWarning) as said:
        unclamp.convert(model, Recipe(), skip=["lm_head"])
    (message,) = (str(each.message) for each in said)
    assert message.startswith("no layer is in FP8: the model is quantised (14 layers, such as ")
    assert message.endswith("nothing worth it is left")


def test_a_plain_layer_with_codes_for_a_weight_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    codes = torch.zeros(4, 4, dtype=torch.int8)
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    report = unclamp.convert(model, Recipe())
    assert report.skipped == {"0": "its weights are quantised (Linear, int8)"}


# ---- names that clash --------------------------------------------------------------------------


class Adapter(nn.Module):
    """As a layer of PEFT's around another one of PEFT's."""

    adapter_layer_names = ("lora_A",)

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_A["default"](x)


def test_adapters_around_adapters_keep_the_names_apart() -> None:
    model = nn.Sequential(Adapter(Adapter(nn.Linear(4, 4))))
    report = unclamp.convert(model, Recipe().override("lora_A.*", input="dynamic"))
    assert set(report.converted) == {
        "0",
        "0.lora_A.default",
        "0.base_layer.lora_A.default",
    }


# ---- experts, first and last -------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
def test_experts_whose_weights_an_adapter_replaces_are_named(order: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=16,
            intermediate_size=32,
            vocab_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    if order == "before":
        unclamp.convert(model, Recipe())
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    model = peft.get_peft_model(model, config)
    if order == "after":
        report = unclamp.convert(model, Recipe())
        why = {report.skipped[f"{experts}.{n}"] for n in (0, 1)}
        assert len(why) == 1
        assert "target_parameters" in why.pop()
        assert "model.layers.0.mlp.experts.down_proj.0" in report.converted
        assert train(model, 1)
        return
    with unclamp.Recorder(model, tmp_path / "run") as recorder:
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(10):
            loss = model(input_ids=IDS[0], labels=IDS[0]).loss
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    with unclamp.RunLog.open(tmp_path / "run") as log:
        (data,) = log.sql("SELECT data FROM events WHERE kind = 'uncast'").to_pydict()["data"]
    assert json.loads(data) == {"frozen": [f"{experts}.0", f"{experts}.1"]}


def test_first_and_last_are_the_bases_and_their_copies() -> None:
    model = adapted(llama(), target_modules=["q_proj", "lm_head"])
    assert unclamp.first_and_last(model) == ["^model.layers.0.self_attn.q_proj", "^lm_head"]
    model = adapted(llama(), modules_to_save=["lm_head"])
    skip = unclamp.first_and_last(model)
    assert skip == ["^model.layers.0.self_attn.q_proj", "^lm_head"]
    converted = unclamp.convert(model, Recipe(), skip=skip).converted
    assert [fqn for fqn in converted if "lm_head" in fqn] == []
