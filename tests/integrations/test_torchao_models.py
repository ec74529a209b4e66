"""Models that torchao has converted: counted beside its casts, and left alone by name.

The truth is the model that torchao made, untouched by us, and casts by torchao's own functions.
"""

import copy
import dataclasses
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import unclamp
from unclamp import Dynamic, HighPrecision, Recipe
from unclamp.nn import find_ledgers
from unclamp.quiet import quiet_imports
from unclamp.scaling import PerRow, PerTensor

pytest.importorskip("torchao")
# torchao's own, of what it registers and loads.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WIDTH = 16
STEPS = 5


class Net(nn.Module):
    """Two layers that torchao takes, and a head that it was told to leave."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.down(torch.relu(self.up(x))))


def made(name: str = "tensorwise", **changes: Any) -> Any:
    """A config of torchao's that needs no GPU."""
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig.from_recipe_name(name)
    return dataclasses.replace(config, **({"emulate": True} | changes))


def converted(config: Any = None) -> Net:
    """The model as torchao makes it, the same each time."""
    from torchao.float8 import convert_to_float8_training

    torch.manual_seed(0)
    net = Net()
    return convert_to_float8_training(
        net, config=config or made(), module_filter_fn=lambda _, fqn: fqn != "lm_head"
    )


def train(model: Any) -> list[Tensor]:
    """Train some steps; return the losses, and each gradient of the last one."""
    generator = torch.Generator().manual_seed(0)
    optimizer = SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        x = torch.randn(4, WIDTH, generator=generator) * 2.0 ** (step % 2)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None)]


# ---- observed ----------------------------------------------------------------------------------


@pytest.mark.cell("torchao", "updates once a step")
@pytest.mark.cell("torchao", "save format clean")
@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_an_observed_model_computes_torchaos_bits_and_counts_beside_them(name: str) -> None:
    alone, model = converted(made(name)), converted(made(name))
    keys = list(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    expected = train(alone)
    with unclamp.observe(model) as observation:
        assert list(observation.report.converted) == ["up", "down", "lm_head"]
        found = train(model)
        assert list(model.state_dict()) == keys
        (ledger,) = find_ledgers(model)
        assert ledger.updates == STEPS
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    sites = {(s.fqn, s.role): s for s in observation.sites()}
    assert len(sites) == 9
    assert all(site.casts == STEPS for site in sites.values())
    assert sites["up", "input"].elements == STEPS * 4 * WIDTH
    assert sites["up", "input"].saturated > 0  # delayed, and every other batch is twice as large
    assert [type(m) for m in model.modules()] == kinds


def test_what_is_counted_is_what_torchaos_tensors_are() -> None:
    model = converted()
    seen: dict[str, list[float]] = {"input": [], "grad_output": []}
    model.down.register_forward_pre_hook(
        lambda _, args: seen["input"].append(float(args[0].detach().abs().amax()))
    )
    model.down.register_full_backward_hook(
        lambda _, __, grads: seen["grad_output"].append(float(grads[0].abs().amax()))
    )
    with unclamp.observe(model):
        train(model)
        (ledger,) = find_ledgers(model)
        histories = {
            site.role: history[:STEPS].tolist()
            for site, history in zip(ledger.sites, ledger.amax_history, strict=False)
            if site.fqn == "down"
        }
    for role, amaxes in seen.items():
        assert histories[role] == amaxes[::-1], role


@pytest.mark.cell("torchao", "exception")
def test_a_run_of_an_observed_model_is_recorded_and_an_error_ends_it(tmp_path: Path) -> None:
    model = converted()
    optimizer = SGD(model.parameters(), lr=0.05)

    def run() -> None:
        with unclamp.Recorder(model, tmp_path / "run") as recorder:
            for step in range(3):
                if step == 2:
                    raise ValueError("broken batch")
                loss = model(torch.randn(4, WIDTH)).square().mean()
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss)

    with unclamp.observe(model), pytest.raises(ValueError, match="broken batch"):
        run()
    with unclamp.RunLog.open(tmp_path / "run") as log:
        names = log.sql("SELECT DISTINCT fqn FROM sites ORDER BY fqn").to_pydict()["fqn"]
        assert log.header.status == "failed"
    assert names == ["down", "lm_head", "up"]


@pytest.mark.cell("torchao", "compile")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_model_computes_its_own_bits_and_is_counted() -> None:
    torch.compiler.reset()
    alone, model = converted(), converted()
    expected = train(torch.compile(alone, backend="aot_eager"))
    with unclamp.observe(model) as observation:
        found = train(torch.compile(model, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    casts = {(s.fqn, s.role): s.casts for s in observation.sites()}
    assert casts == {
        (fqn, role): STEPS
        for fqn in ("up", "down", "lm_head")
        for role in ("input", "weight", "grad_output")
    }


@pytest.mark.cell("torchao", "accumulation")
def test_microsteps_count_for_one_step() -> None:
    model = converted()
    optimizer = SGD(model.parameters(), lr=0.05)
    with unclamp.observe(model) as observation:
        for size in (1.0, 3.0, 2.0, 5.0):
            model(torch.full((2, WIDTH), size)).sum().backward()
            if size in (3.0, 5.0):
                optimizer.step()
                optimizer.zero_grad()
        (ledger,) = find_ledgers(model)
        assert ledger.updates == 2
        first = ledger.amax_history[0][:2].tolist()
    assert first == [5.0, 3.0]
    assert {s.casts for s in observation.sites()} == {4}


def test_coverage_shows_torchaos_layers_as_linear_ones() -> None:
    model = converted()
    found = unclamp.coverage(model, torch.randn(4, WIDTH))
    shown = {p.fqn: (p.state, p.why) for p in found.products}
    assert list(shown) == ["up", "down", "lm_head"]
    assert {state for state, _ in shown.values()} == {"left out"}
    assert shown["up"][1].startswith("torchao's Float8Linear")
    sizes = {p.fqn: p.sizes for p in found.products}
    plain = unclamp.coverage(Net(), torch.randn(4, WIDTH))
    assert sizes == {p.fqn: p.sizes for p in plain.products}
    assert found.flops == plain.flops


# ---- converted ---------------------------------------------------------------------------------


def test_convert_leaves_torchaos_layers_and_the_one_it_was_told_to_leave() -> None:
    model = converted()
    with pytest.warns(unclamp.UnclampWarning, match="no layer is in FP8 by unclamp: up, down"):
        report = unclamp.convert(model, Recipe())
    assert not report.converted
    why = report.skipped
    assert list(why) == ["up", "down", "lm_head"]
    assert (
        why["up"]
        == why["down"]
        == ("torchao's Float8Linear, which casts by itself: left to torchao")
    )
    assert "told to leave this one (module_filter_fn)" in why["lm_head"]
    assert "'^lm_head'" in why["lm_head"]
    alone = converted()
    assert all(torch.equal(a, b) for a, b in zip(train(model), train(alone), strict=True))


@pytest.mark.parametrize("glob", ["lm_head", "^lm_head"])
def test_a_rule_that_names_the_layer_takes_it_in(glob: str) -> None:
    model = converted()
    report = unclamp.convert(model, Recipe().override(glob, input="dynamic"))
    assert list(report.converted) == ["lm_head"]
    assert train(model)
    assert find_ledgers(model)[0].updates == STEPS


def test_a_rule_for_all_names_no_layer() -> None:
    with pytest.warns(unclamp.UnclampWarning) as said:
        report = unclamp.convert(converted(), Recipe().override("*", input="dynamic"))
    assert not report.converted
    assert any("no layer is in FP8 by unclamp" in str(each.message) for each in said)


def test_layers_beside_none_of_torchaos_are_converted_as_ever() -> None:
    assert len(unclamp.convert(Net(), Recipe()).converted) == 3


# ---- weights of other kinds --------------------------------------------------------------------


def test_int8_weights_of_torchao_are_left_alone_and_named() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = Net()
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda _, fqn: fqn in ("up", "down"))
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        before = model.down(torch.relu(model.up(x)))
    with pytest.warns(unclamp.UnclampWarning, match="the model is quantised") as said:
        report = unclamp.convert(model, Recipe())
    assert len(said) == 1
    assert str(said[0].message).endswith("little worth it is left, lm_head")
    assert list(report.converted) == ["lm_head"]
    name = type(model.up.weight).__name__
    assert report.skipped["up"] == f"its weight is a {name}, which holds other data than it shows"
    with torch.no_grad():
        assert torch.equal(model.down(torch.relu(model.up(x))), before)


def test_weights_that_fsdp_gathers_in_torchaos_codes_are_left_alone_and_named() -> None:
    model = converted(made(enable_fsdp_float8_all_gather=True))
    with pytest.warns(unclamp.UnclampWarning):
        observation = unclamp.observe(model, skip=["lm_head"])
    assert set(observation.report.skipped) == {"up", "down", "lm_head"}
    assert "which holds other data than it shows" in observation.report.skipped["up"]


# ---- its settings as a recipe ------------------------------------------------------------------


def mapped(config: Any) -> tuple[Recipe, list[str]]:
    from unclamp.integrations import torchao

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recipe = torchao.recipe(config)
    return recipe, [str(each.message) for each in said]


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("is_fast", [False, True])
def test_each_of_torchaos_own_configs_is_a_recipe(name: str, is_fast: bool) -> None:
    recipe, said = mapped(made(name, emulate=not is_fast))
    grains = PerTensor() if name == "tensorwise" else PerRow()
    scaling = Dynamic(grains, power_of_two=name != "tensorwise")
    assert (recipe.input, recipe.weight, recipe.grad_output) == (scaling, scaling, scaling)
    assert recipe.input_format == recipe.weight_format == "e4m3fn"
    assert recipe.grad_output_format == ("e5m2" if name == "tensorwise" else "e4m3fn")
    # Of its own configs the output alone is summed up fast.
    assert recipe.output == ("hopper_fast" if is_fast else "float32")
    assert recipe.grad_input == "float32"
    assert recipe.grad_weight == ("float32" if "gw_hp" not in name else HighPrecision())
    assert [("weight is cast axiswise for output and tensorwise" in each) for each in said] == (
        [True] if "gw_hp" in name else []
    )


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_a_layer_by_the_recipe_is_torchaos_layer(name: str) -> None:
    config = made(name)
    theirs = converted(config)
    torch.manual_seed(0)
    ours = Net()
    unclamp.convert(ours, mapped(config)[0], skip=["lm_head"])
    for one, other in zip(train(theirs), train(ours), strict=True):
        # The same products: sums of float32 in another order.
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_what_is_none_of_a_recipes_is_named() -> None:
    config = made(enable_fsdp_float8_all_gather=True, pad_inner_dim=True)
    recipe, (message,) = mapped(config)
    assert recipe == mapped(made())[0]
    assert "enable_fsdp_float8_all_gather=True" in message
    assert "gather_codes" in message
    assert "pad_inner_dim=True" in message


def test_a_gemm_that_torchao_does_not_cast_for_is_in_high_precision() -> None:
    from torchao.float8.config import CastConfig, ScalingType

    off = CastConfig(scaling_type=ScalingType.DISABLED)
    config = made(
        cast_config_grad_output=off,
        cast_config_weight_for_grad_input=off,
        cast_config_input_for_grad_weight=off,
        cast_config_grad_output_for_grad_weight=off,
    )
    recipe, said = mapped(config)
    assert (recipe.grad_input, recipe.grad_weight) == (HighPrecision(), HighPrecision())
    assert (recipe.input, recipe.grad_output) == (Dynamic(), HighPrecision())
    assert said == []


@pytest.mark.parametrize("given", ["rowwise", None, object()])
def test_what_is_no_config_is_refused(given: object) -> None:
    from unclamp.integrations import torchao

    with pytest.raises(unclamp.RecipeError, match="Float8LinearConfig"):
        torchao.recipe(given)


# ---- what torchao says at import ---------------------------------------------------------------


def test_a_command_prints_its_json_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2,
              "max_position_embeddings": 16}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "unclamp", "coverage", "--hf-model", str(path), "--json"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["products"]


def test_commands_that_need_no_model_do_not_import_torchao() -> None:
    code = (
        "import sys; from unclamp.cli import main; sys.argv = ['unclamp', 'doctor', '--json']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torchao' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_only_what_torchao_says_at_import_is_left_out(caplog: Any) -> None:
    quiet_imports()
    quiet_imports()
    logger = logging.getLogger("torchao")
    logger.warning("Failed to load a library: it is not for this machine")
    logger.warning("a layer was left out")
    assert [record.getMessage() for record in caplog.records] == ["a layer was left out"]
    before = copy.copy(logger.filters)
    quiet_imports()
    assert logger.filters == before
