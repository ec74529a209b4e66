import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from unclamp import (
    ConvertError,
    Delayed,
    Dynamic,
    Fp8Linear,
    HighPrecision,
    Recipe,
    RecipeError,
    UnclampWarning,
    convert,
    revert,
)
from unclamp.nn import find_ledgers
from unclamp.nn.candidates import check_devices
from unclamp.numerics import Stat


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class Renamed(nn.Linear):
    """As torchtitan has them: another class with the forward of `nn.Linear`."""


class Special(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


NAMES = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head"]
TOKENS = torch.arange(10).reshape(2, 5)


def classes(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def test_every_linear_layer_is_converted_and_the_embedding_reported() -> None:
    report = convert(Model(), Recipe())
    assert list(report.converted) == NAMES
    assert report.skipped == {"embed": "not a linear layer (Embedding)"}
    assert report.unmatched == {}


def test_each_layer_gets_what_the_recipe_says() -> None:
    recipe = Recipe().override("layers.0.*", input=Dynamic(margin=1), weight_format="e5m2")
    model = Model()
    report = convert(model, recipe)
    for fqn in NAMES:
        plan = recipe.plan(fqn)
        assert report.converted[fqn] == plan
        layer = model.get_submodule(fqn)
        assert isinstance(layer, Fp8Linear)
        assert {r: layer.sites.operand(r) for r in layer.sites.indices} == plan.operands
        assert layer.sites.fqn == fqn


def test_modules_and_parameters_keep_their_identity() -> None:
    model = Model()
    modules, parameters = list(model.modules()), list(model.parameters())
    convert(model, Recipe())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    revert(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_an_optimizer_made_before_stays_valid() -> None:
    model = Model()
    optimizer = AdamW(model.parameters(), lr=0.1)
    convert(model, Recipe())
    before = model.layers[0].get_submodule("up").get_parameter("weight").clone()
    model(TOKENS).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.layers[0].get_submodule("up").get_parameter("weight"), before)
    assert find_ledgers(model)[0].updates == 1


@pytest.mark.filterwarnings("ignore:no layer is in FP8")
@pytest.mark.parametrize("recipe", [Recipe(), Recipe.uniform(HighPrecision())])
def test_revert_gives_classes_keys_and_outputs_back(recipe: Recipe) -> None:
    model = Model()
    before = classes(model), list(model.state_dict()), model(TOKENS), repr(model)
    convert(model, recipe)
    assert classes(model) != before[0]
    report = revert(model)
    assert list(report.reverted) == NAMES
    assert (classes(model), list(model.state_dict())) == before[:2]
    assert torch.equal(model(TOKENS), before[2])
    assert repr(model) == before[3]
    assert vars(model.lm_head).keys() == vars(nn.Linear(6, 10)).keys()


def test_a_model_can_be_converted_again_after_revert() -> None:
    model = Model()
    convert(model, Recipe())
    revert(model)
    convert(model, Recipe.uniform(Dynamic()))
    (ledger,) = find_ledgers(model)
    assert len(ledger.sites) == 15
    assert ledger.updates == 0


def test_reverting_an_unconverted_model_does_nothing() -> None:
    model = Model()
    assert revert(model).reverted == ()


def test_skipped_layers_are_left_alone_and_say_why() -> None:
    model = Model()
    report = convert(model, Recipe(), skip=["lm_head", "layers.1.*"])
    assert report.skipped["lm_head"] == "matches skip 'lm_head'"
    assert report.skipped["layers.1.up"] == "matches skip 'layers.1.*'"
    assert type(model.lm_head) is nn.Linear
    assert list(report.converted) == NAMES[:2]


def test_a_subclass_of_linear_is_left_alone_and_says_why() -> None:
    report = convert(nn.Sequential(Special(3, 3), nn.Linear(3, 3)), Recipe())
    assert "a forward of its own (Special)" in report.skipped["0"]
    assert list(report.converted) == ["1"]


def test_a_skipped_attention_leaves_its_output_projection_alone() -> None:
    skip = ["in_proj", "qk", "pv"]
    with pytest.warns(UnclampWarning, match="no layer is in FP8"):
        report = convert(nn.MultiheadAttention(4, 2), Recipe(), skip=skip)
    assert report.converted == {}
    assert "never calls it" in report.skipped["out_proj"]
    assert "NonDynamicallyQuantizableLinear" in report.skipped["out_proj"]


def test_a_weight_of_another_dtype_is_left_alone_and_says_why() -> None:
    with pytest.warns(UnclampWarning, match="no layer is in FP8"):
        report = convert(nn.Linear(3, 3, dtype=torch.float64), Recipe())
    assert "torch.float64" in report.skipped[""]


def test_a_layer_with_its_own_forward_is_left_alone_and_says_why() -> None:
    layer = nn.Linear(3, 3)
    forward = layer.forward
    layer.forward = lambda input: forward(input)
    with pytest.warns(UnclampWarning, match="no layer is in FP8"):
        report = convert(layer, Recipe())
    assert "forward is replaced" in report.skipped[""]
    assert type(layer) is nn.Linear


def test_other_modules_with_a_matrix_are_reported() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Bilinear(2, 2, 2), nn.LayerNorm(4))
    with pytest.warns(UnclampWarning, match="no layer is in FP8"):
        report = convert(model, Recipe())
    assert report.skipped == {
        "0": "not a linear layer (Conv2d)",
        "1": "not a linear layer (Bilinear)",
    }


UNMATCHED: list[tuple[dict[str, Any], str, str]] = [
    ({"rule": "layer.*"}, "layer.*", "matches no linear layer"),
    ({"rule": "embed"}, "embed", "matches no linear layer"),
    ({"skip": ["lm_haed"]}, "lm_haed", "skip glob matches no linear layer"),
    ({"rule": "lm_head", "skip": ["lm_head"]}, "lm_head", "only layers that were skipped"),
]


@pytest.mark.parametrize(("given", "glob", "why"), UNMATCHED)
def test_what_matched_nothing_warns_and_is_reported(
    given: dict[str, Any], glob: str, why: str
) -> None:
    recipe = Recipe()
    if "rule" in given:
        recipe = recipe.override(given["rule"], input=Dynamic())
    with pytest.warns(UnclampWarning, match=r"linear layers: layers\.0\.up"):
        report = convert(Model(), recipe, skip=given.get("skip", []))
    assert why in report.unmatched[glob]
    assert repr(glob) in str(report)


@pytest.mark.parametrize(("given", "glob", "why"), UNMATCHED)
def test_strict_raises_and_leaves_the_model_alone(
    given: dict[str, Any], glob: str, why: str
) -> None:
    recipe = Recipe()
    if "rule" in given:
        recipe = recipe.override(given["rule"], input=Dynamic())
    model = Model()
    before = classes(model), list(model.state_dict())
    with pytest.raises(ConvertError, match=f"{re.escape(repr(glob))}.*{why}"):
        convert(model, recipe, skip=given.get("skip", []), strict=True)
    assert (classes(model), list(model.state_dict())) == before
    assert find_ledgers(model) == []


def test_a_warning_made_an_error_leaves_the_model_alone() -> None:
    model = Model()
    with pytest.raises(UnclampWarning):
        convert(model, Recipe(), skip=["nothing"])
    assert find_ledgers(model) == []


def test_a_rule_in_the_shadow_of_earlier_ones_is_reported() -> None:
    recipe = Recipe().override("layers.*", input=Dynamic()).override("up", weight=Dynamic())
    with pytest.warns(UnclampWarning, match="never decides"):
        report = convert(Model(), recipe)
    assert report.unmatched == {"up": "override never decides: earlier rules match first"}


def test_a_skip_that_is_a_string_is_refused() -> None:
    with pytest.raises(ConvertError, match="'lm_head'"):
        convert(Model(), Recipe(), skip="lm_head")


def test_layers_on_several_devices_are_refused_with_a_way_out() -> None:
    here = {"a": torch.device("cpu"), "b": torch.device("cpu"), "m": torch.device("meta")}
    check_devices(here)
    with pytest.raises(ConvertError, match=r"a on cpu.* c on cuda:1|c on cuda:1.* a on cpu"):
        check_devices({**here, "c": torch.device("cuda", 1)})


def test_a_second_convert_converts_nothing_and_keeps_the_state() -> None:
    model = Model()
    convert(model, Recipe())
    (ledger,) = find_ledgers(model)
    rows = len(ledger.sites)
    with pytest.warns(UnclampWarning, match="5 layers were converted already"):
        report = convert(model, Recipe.uniform(Dynamic()))
    assert report.converted == {}
    assert all("already converted" in report.skipped[fqn] for fqn in NAMES)
    assert find_ledgers(model) == [ledger]
    assert len(ledger.sites) == rows


def test_a_second_convert_adds_what_the_first_left_and_keeps_its_state() -> None:
    model = Model()
    convert(model, Recipe.uniform(Delayed(history_len=2)), skip=["lm_head"])
    optimizer = AdamW(model.parameters())
    model(TOKENS).sum().backward()
    optimizer.step()
    (ledger,) = find_ledgers(model)
    history, scale = ledger.amax_history.clone(), ledger.scale.clone()
    with pytest.warns(UnclampWarning, match="4 layers were converted already"):
        report = convert(model, Recipe.uniform(Delayed(history_len=5)))
    assert list(report.converted) == ["lm_head"]
    assert find_ledgers(model) == [ledger]
    assert torch.equal(ledger.amax_history[:12, :2], history)
    assert torch.equal(ledger.scale[:12], scale)
    model(TOKENS).sum().backward()
    optimizer.step()
    assert ledger.updates == 2
    assert (ledger.scale > 0).all()


def test_a_model_that_is_itself_linear_is_converted() -> None:
    model = nn.Linear(4, 3)
    report = convert(model, Recipe())
    assert list(report.converted) == [""]
    assert "(the model itself)" in str(report)
    assert isinstance(model, Fp8Linear)
    assert "unclamp_input_scale" in model.state_dict()
    model.load_state_dict(model.state_dict())
    revert(model)
    assert type(model) is nn.Linear


def test_tied_weights_stay_tied_and_have_sites_of_their_own() -> None:
    model = Model()
    model.layers[1].get_submodule("up").weight = model.layers[0].get_submodule("up").weight
    model.lm_head.weight = model.embed.weight
    convert(model, Recipe())
    assert model.lm_head.weight is model.embed.weight
    optimizer = AdamW(model.parameters())
    for _ in range(2):
        model(TOKENS).square().sum().backward()
        optimizer.step()
    (ledger,) = find_ledgers(model)
    assert len(ledger.sites) == 15
    assert (ledger.scale > 0).all()


def test_a_module_registered_twice_is_converted_and_reverted_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = convert(model, Recipe())
    assert list(report.converted) == ["0"]
    assert len(find_ledgers(model)[0].sites) == 3
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert revert(model).reverted == ("0",)
    assert type(shared) is nn.Linear


def test_a_shared_module_round_trips_its_scaling_state() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert(model, Recipe())
    model(torch.ones(2, 4)).sum().backward()
    AdamW(model.parameters()).step()
    (ledger,) = find_ledgers(model)
    before = ledger.scale.clone()
    state = model.state_dict()
    ledger.scale.zero_()
    model.load_state_dict(state)
    assert torch.equal(ledger.scale, before)


def test_hooks_and_attributes_survive_convert() -> None:
    model = nn.Linear(4, 3)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    vars(model)["note"] = "kept"
    convert(model, Recipe())
    model(torch.ones(4))
    assert calls == [1]
    assert vars(model)["note"] == "kept"


def test_training_mode_and_frozen_parameters_survive() -> None:
    model = Model().eval()
    model.lm_head.requires_grad_(False)
    convert(model, Recipe())
    assert not model.lm_head.training
    assert not model.lm_head.weight.requires_grad


def test_a_model_without_linear_layers_converts_to_nothing() -> None:
    with pytest.warns(UnclampWarning, match="the model has no linear layer"):
        report = convert(nn.ReLU(), Recipe())
    assert (report.converted, report.skipped, report.unmatched) == ({}, {}, {})
    assert find_ledgers(nn.ReLU()) == []


def test_parts_converted_apart_have_ledgers_of_their_own() -> None:
    model = Model()
    convert(model.layers[0], Recipe())
    convert(model.layers[1], Recipe())
    ledgers = find_ledgers(model)
    assert len(ledgers) == 2
    optimizer = AdamW(model.parameters())
    model(TOKENS).sum().backward()
    optimizer.step()
    assert [ledger.updates for ledger in ledgers] == [1, 1]


def test_reports_read_as_text() -> None:
    model = Model()
    text = str(convert(model, Recipe(weight=HighPrecision()), skip=["lm_head"]))
    assert text.startswith("converted 4 layers, skipped 2\n")
    assert "layers.0.up: input delayed e4m3fn, weight high_precision, grad_output" in text
    assert "skipped lm_head: matches skip 'lm_head'" in text
    assert str(revert(model)).startswith("reverted 4 layers\n  layers.0.up")


def test_a_scaling_is_no_recipe_and_the_error_says_what_is():
    with pytest.raises(RecipeError, match=r"Recipe\.uniform"):
        convert(nn.Linear(8, 8), Dynamic())  # pyright: ignore[reportArgumentType]


def test_tied_weights_are_cast_by_each_layer_that_uses_them():
    embed, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, nn.Linear(8, 8), head)
    report = convert(model, Recipe.uniform(Dynamic()))
    assert report.skipped == {"0": "not a linear layer (Embedding)"}
    assert list(report.converted) == ["1", "2"]
    assert model[2].weight is model[0].weight
    model(torch.arange(16)).sum().backward()
    (ledger,) = find_ledgers(model)
    assert ledger.pending[:, Stat.CASTS].tolist() == [1] * 6
    assert embed.weight.grad is not None


def test_a_layer_whose_state_lies_on_another_device_says_what_to_do():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    convert(model, Recipe())
    (ledger,) = find_ledgers(model)
    model[1].to("meta")  # a part of a model may be elsewhere without data
    assert model[0](torch.ones(2, 4)).shape == (2, 4)
    ledger.lay_out(ledger.sites, device=torch.device("meta"))  # stands for any second device
    with pytest.raises(ConvertError, match=r"0: its weight is on cpu and .* on meta.*convert each"):
        model[0](torch.ones(2, 4))
