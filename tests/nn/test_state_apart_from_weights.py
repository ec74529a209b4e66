"""`ScalingState`, and models whose state_dicts hold none of it.

The truth of a resume is the training that was never interrupted, and of a value that of the
model's own state_dict.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim.swa_utils import AveragedModel

from truths.kept import drive, fresh, train
from unclamp import (
    ConvertError,
    Delayed,
    Dynamic,
    PerBlock,
    PerRow,
    Recipe,
    ScalingState,
    convert,
    observe,
    switch,
    weights_only,
)
from unclamp.nn import find_ledgers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]
RECIPES = {
    "delayed": Recipe.uniform(Delayed(history_len=4)),
    "rows": Recipe(weight=Delayed(granularity=PerRow(), history_len=3)),
    "blocks": Recipe(weight=Delayed(granularity=PerBlock(2, 2), history_len=3)),
    "warm-up": Recipe(warmup_steps=5),
}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def goes_on_alike(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(train(a, 4, seed=5), train(b, 4, seed=5), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and same(
        ScalingState(a).state_dict(), ScalingState(b).state_dict()
    )


class WithAdapter(nn.Module):
    """As PEFT's layer: it names those of its modules that are the adapter's."""

    adapter_layer_names = ("added",)

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 8)
        self.added = nn.ModuleDict({"default": nn.Linear(6, 8, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.added["default"](x)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))


def apart(recipe: Recipe | None = None) -> nn.Sequential:
    model = plain()
    convert(model, recipe or RECIPES["delayed"], state="apart")
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_the_scaling_state_of_the_state_dict(recipe: str) -> None:
    model = fresh(RECIPES[recipe])
    train(model, 3)
    full = model.state_dict()
    want = {key: value for key, value in full.items() if key not in weights_only(full)}
    assert len(want) == 14
    assert same(ScalingState(model).state_dict(), want)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resume_with_weights_and_the_state_beside_goes_on_bit_for_bit(recipe, tmp_path) -> None:
    model = apart(RECIPES[recipe])
    train(model, 3)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    ScalingState(model).save(tmp_path / "scaling.pt")
    other = apart(RECIPES[recipe])
    train(other, 6, seed=9)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    ScalingState(other).load(tmp_path / "scaling.pt")
    assert find_ledgers(other)[0].count() == 3
    assert goes_on_alike(model, other)


def test_without_the_state_beside_it_a_resume_is_another_training() -> None:
    model, other = apart(), apart()
    train(model, 3)
    other.load_state_dict(model.state_dict())
    assert not goes_on_alike(model, other)


def test_a_model_with_its_state_apart_has_the_keys_of_the_plain_one() -> None:
    model, want = apart(), list(plain().state_dict())
    train(model, 2)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(each.state_dict()) == want
        assert list(get_model_state_dict(each)) == want
        assert len(ScalingState(each).state_dict()) == 14
    switch(model, scaling=Dynamic())
    assert list(model.state_dict()) == want
    plain().load_state_dict(model.state_dict())


def test_a_second_conversion_leaves_the_state_where_it_is_unless_it_says() -> None:
    model = plain()
    convert(model, Recipe(), skip=["2"], state="apart")
    convert(model, Recipe(), skip=["0"])
    assert list(model.state_dict()) == list(plain().state_dict())
    convert(model, Recipe(), state="model")
    assert len(model.state_dict()) == 3 + 14
    with pytest.raises(ConvertError, match=r'expected "model" or "apart" for state, got True'):
        convert(model, Recipe(), state=True)  # pyright: ignore


def test_a_plain_checkpoint_loads_strictly_and_one_with_the_state_brings_it() -> None:
    whole, model = fresh(), apart()
    train(whole, 3)
    full = whole.state_dict()
    model.load_state_dict(weights_only(full), strict=True)
    assert (find_ledgers(model)[0].scale == 0).all()
    model.load_state_dict(full, strict=True)
    assert goes_on_alike(copy.deepcopy(whole), model)
    third = apart()
    set_model_state_dict(third, weights_only(full))
    set_model_state_dict(third, full)
    assert find_ledgers(third)[0].count() == 3
    assert same(ScalingState(third).state_dict(), ScalingState(whole).state_dict())


def test_what_a_state_does_not_speak_of_stays() -> None:
    model, other = apart(), apart()
    drive(model, 2.0, 9.0, 3.0)
    drive(other, 5.0)
    state = ScalingState(model).state_dict()
    before = ScalingState(other).state_dict()
    some = {key: value for key, value in state.items() if key.startswith("0.unclamp_input")}
    ScalingState(other).load_state_dict(some)
    after = ScalingState(other).state_dict()
    assert len(some) == 2
    assert all(torch.equal(after[key], some.get(key, before[key])) for key in after)
    ScalingState(other).load_state_dict({})
    assert same(ScalingState(other).state_dict(), after)


def test_unknown_keys_are_named_and_change_nothing() -> None:
    model = apart()
    train(model, 2)
    state = ScalingState(model)
    before = state.state_dict()
    with pytest.raises(ConvertError, match=r"1 of 2 keys .* 7\.unclamp_input_scale; convert the"):
        state.load_state_dict(
            {"0.unclamp_input_scale": torch.ones(()), "7.unclamp_input_scale": torch.ones(())}
        )
    with pytest.raises(ConvertError, match=r"know: 0\.unclamp_inputs_scale"):
        state.load_state_dict({"0.unclamp_inputs_scale": torch.ones(())})
    with pytest.raises(ConvertError, match=r"2\.weight; these are no scaling state"):
        state.load_state_dict(model.state_dict())
    assert same(state.state_dict(), before)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    state = ScalingState(apart())
    (tmp_path / "text.pt").write_text("no file of torch")
    torch.save([1], tmp_path / "list.pt")
    for name in ("text.pt", "list.pt"):
        with pytest.raises(ConvertError, match=r"expected a file of unclamp\.ScalingState\.save"):
            state.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        state.load(tmp_path / "none.pt")


@pytest.mark.parametrize("model", [plain(), 3])
def test_a_model_without_layers_of_ours_is_refused(model: Any) -> None:
    with pytest.raises(ConvertError, match=r"ScalingState, got .*: call unclamp\.convert first"):
        ScalingState(model)


class OwnModule(nn.Module):
    """A module that is called so by its author, beside one of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.module(x))


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "average": AveragedModel,
    "DataParallel": lambda model: nn.DataParallel(model),
    "compile": lambda model: torch.compile(model),  # pyright: ignore
    "both": lambda model: AveragedModel(torch.compile(model)),  # pyright: ignore
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("make", [plain, OwnModule])
def test_wrappers_change_no_key_and_are_understood_when_loaded(make, wrap) -> None:
    model = make()
    convert(model, Recipe())
    train(model, 2)
    want = ScalingState(model).state_dict()
    wrapped = WRAPS[wrap](model)
    assert same(ScalingState(wrapped).state_dict(), want)
    other = make()
    convert(other, Recipe())
    full = wrapped.state_dict()
    with_wrappers = {k: v for k, v in full.items() if k.rpartition(".")[2].startswith("unclamp_")}
    ScalingState(other).load_state_dict(with_wrappers)
    assert same(ScalingState(other).state_dict(), want)
    third = make()
    convert(third, Recipe())
    into = ScalingState(WRAPS[wrap](third))
    into.load_state_dict(want)
    assert same(into.state_dict(), want)


def test_a_wrapped_name_that_could_be_two_layers_is_unknown() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(4, 4)}), "b": nn.Linear(4, 4)})
    model["a"]["_orig_mod"] = nn.Linear(4, 4)  # pyright: ignore
    convert(model, Recipe())
    keys = ScalingState(model).state_dict()
    assert {key.rpartition(".")[0] for key in keys} == {"a.module", "a", "b"}
    ScalingState(model).load_state_dict(keys)
    with pytest.raises(ConvertError, match=r"know: _orig_mod\.a\.unclamp_updates"):
        ScalingState(model).load_state_dict({"_orig_mod.a.unclamp_updates": torch.ones(())})


def test_layers_in_adapters_and_what_is_only_counted_are_part_of_it() -> None:
    model = nn.Sequential(WithAdapter(), nn.Linear(8, 4))
    convert(model, Recipe())
    train(model, 3)
    state = ScalingState(model).state_dict()
    adapters = {key for key in state if ".added." in key}
    assert not adapters & model.state_dict().keys()
    converted = [fqn for fqn, m in model.named_modules() if hasattr(m, "scaling_state")]
    assert len(state) == 7 * len(converted)
    twin = nn.Sequential(WithAdapter(), nn.Linear(8, 4))
    convert(twin, Recipe())
    twin.load_state_dict(model.state_dict())
    ScalingState(twin).load_state_dict(state)
    assert goes_on_alike(model, twin)


def test_a_state_of_adapters_alone_brings_their_updates() -> None:
    made = [nn.Sequential(WithAdapter()) for _ in range(2)]
    for model in made:
        convert(model, Recipe(warmup_steps=9), skip=["^0"])
    train(made[0], 3)
    ScalingState(made[1]).load_state_dict(ScalingState(made[0]).state_dict())
    assert find_ledgers(made[1])[0].count() == 3


def test_an_observed_model_goes_on_counting_as_if_nothing_had_been() -> None:
    def sites(models: list[nn.Module], seen: list[Any]) -> list[Any]:
        for model in models:
            drive(model, 4.0, 0.5)
        return [each.sites() for each in seen]

    models = [plain() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    seen = [observe(models[0])]
    drive(models[0], 2.0)
    seen[0].stop()
    first = plain()
    first.load_state_dict(models[0].state_dict())
    one, two = observe(first), None
    drive(first, 2.0)
    state = ScalingState(first).state_dict()
    assert not state.keys() & first.state_dict().keys()
    two = observe(models[1])
    ScalingState(models[1]).load_state_dict(state)
    assert same(ScalingState(models[1]).state_dict(), state)
    assert sites([first, models[1]], [one, two])[1] != []


def test_it_is_a_stateful_of_distributed_checkpoints(tmp_path: Path) -> None:
    model, other = apart(), apart()
    train(model, 3)
    state = ScalingState(model)
    assert isinstance(state, Stateful)
    with_state = {"model": model.state_dict(), "scaling": state}
    save_distributed(with_state, checkpoint_id=tmp_path, no_dist=True)
    weights = other.state_dict()
    into = {"model": weights, "scaling": ScalingState(other)}
    load_distributed(into, checkpoint_id=tmp_path, no_dist=True)
    assert goes_on_alike(model, other)


def test_it_is_read_with_weights_only_and_is_no_view(tmp_path: Path) -> None:
    model = apart()
    train(model, 2)
    saved = ScalingState(model).state_dict()
    torch.save(saved, tmp_path / "state.pt")
    train(model, 2)
    assert same(torch.load(tmp_path / "state.pt", weights_only=True), saved)
    assert not same(ScalingState(model).state_dict(), saved)


def test_evaluations_after_a_load_are_those_before_it() -> None:
    model, other = apart(), apart()
    train(model, 3)
    with torch.no_grad():
        for mine, its in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(its)
    ScalingState(other).load_state_dict(ScalingState(model).state_dict())
    x = torch.randn(5, 6) * 3
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))
