"""An observed model is the plain one, and its counts are those of FP8."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import unclamp
from unclamp import (
    ConvertError,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerRow,
    Recipe,
    RecipeError,
    SiteName,
    UnclampWarning,
)
from unclamp.formats import E4M3FN
from unclamp.nn import Fp8Linear, find_ledgers
from unclamp.reference import float32, is_saturated, round_to_format, scale_from_amax


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 6)).to(dtype)


def train(model, sizes=(1, 1, 40, 1), dtype=torch.float32):
    optimizer = AdamW(model.parameters(), lr=0.01)
    losses = []
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        loss = model(torch.randn(5, 12).to(dtype) * size).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [None, Recipe.uniform(Dynamic(granularity=PerRow()))], ids=str)
def test_losses_and_weights_are_those_of_the_plain_model(dtype, recipe):
    model, twin = plain(dtype), plain(dtype)
    with unclamp.observe(model, recipe):
        observed = train(model, dtype=dtype)
    expected = train(twin, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(observed, expected, strict=True))
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_counts_equal_a_recount_with_the_scalar_reference():
    model = plain()
    observation = unclamp.observe(model, Recipe(input=Delayed(history_len=2)), skip=["2"])
    optimizer = SGD(model.parameters(), lr=0.0)
    history: list[float] = []
    saturated = underflowed = 0
    for step, size in enumerate([1.0, 3.0, 40.0, 1e-4]):
        torch.manual_seed(step)
        x = torch.randn(5, 12) * size
        model(x).sum().backward()
        optimizer.step()
        amax = float(x.abs().max())
        scale = scale_from_amax(max(history[:2], default=amax), E4M3FN)
        scaled = [float32(v * scale) for v in x.flatten().tolist()]
        saturated += sum(is_saturated(v, E4M3FN) for v in scaled)
        underflowed += sum(v != 0 and round_to_format(v, E4M3FN) == 0 for v in scaled)
        history.insert(0, amax)
    (site,) = [site for site in observation.sites() if site.role == "input"]
    assert (site.fqn, site.casts, site.elements) == ("0", 4, 240)
    assert (site.saturated, site.underflowed) == (saturated, underflowed)
    assert saturated > 0
    assert underflowed > 0
    assert site.clamped_steps == 2
    observation.stop()


def test_the_state_dict_is_that_of_the_plain_model():
    model, twin = plain(), plain()
    with unclamp.observe(model):
        train(model, sizes=(1,))
        state = copy.deepcopy(model.state_dict())
        assert list(state) == list(twin.state_dict())
        twin.load_state_dict(state)
        model.load_state_dict(twin.state_dict())


def test_stop_gives_the_plain_model_back_and_keeps_the_figures():
    model = plain()
    weights = list(model.parameters())
    observation = unclamp.observe(model)
    assert isinstance(model[0], Fp8Linear)
    assert "only observed" in repr(model)
    train(model)
    before = observation.sites()
    observation.stop()
    observation.stop()
    assert type(model[0]) is nn.Linear
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    train(model)
    assert observation.sites() == before
    assert any(site.saturated for site in before)
    assert "FP8 would have clamped" in str(observation)


def test_an_exception_ends_the_observation():
    model = plain()
    with pytest.raises(ZeroDivisionError), unclamp.observe(model):
        raise ZeroDivisionError
    assert type(model[0]) is nn.Linear


def test_a_model_is_observed_or_converted_and_not_both():
    model = plain()
    with unclamp.observe(model):
        with pytest.raises(ConvertError, match="observed already"):
            unclamp.convert(model, Recipe())
        with pytest.raises(ConvertError, match="observed already"):
            unclamp.observe(model)
    unclamp.convert(model, Recipe())
    with pytest.raises(ConvertError, match="not converted"):
        unclamp.observe(model)


def test_a_model_without_linear_layers_says_so():
    with pytest.warns(UnclampWarning, match="the model has no linear layer"):
        observation = unclamp.observe(nn.ReLU())
    assert observation.sites() == []
    assert "0 layers" in str(observation)
    observation.stop()


def test_an_observed_run_is_recorded_and_says_that_it_is_one(tmp_path):
    model = plain()
    with unclamp.observe(model), unclamp.Recorder(model, tmp_path / "run") as recorder:
        optimizer = SGD(model.parameters(), lr=0.01)
        for size in (1, 1, 50):
            model(torch.ones(2, 12) * size).sum().backward()
            optimizer.step()
            recorder.step(loss=0.0)
    with unclamp.RunLog.open(tmp_path / "run") as log:
        assert log.header.observed
        assert log.casts().num_rows == 3 * 6
        assert sum(log.casts()["saturated"].to_pylist()) > 0


def test_switching_changes_what_is_observed():
    model = plain()
    with unclamp.observe(model) as observation:
        unclamp.switch(model, "*", scaling=Dynamic())
        train(model)
    assert not any(site.saturated for site in observation.sites())


def test_a_dead_rule_is_warned_about():
    with pytest.warns(UnclampWarning, match="nope"):
        unclamp.observe(plain(), skip=["nope"]).stop()


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiled_it_counts_the_same():
    torch._dynamo.reset()
    eager, compiled = plain(), plain()
    with unclamp.observe(eager) as one, unclamp.observe(compiled) as other:
        train(eager)
        train(torch.compile(compiled, backend="aot_eager", fullgraph=True))
        assert find_ledgers(compiled)[0].updates == 4
    assert one.sites() == other.sites()
    torch._dynamo.reset()


def test_made_in_inference_mode_it_still_counts():
    model = plain()
    with torch.inference_mode():
        observation = unclamp.observe(model)
    train(model)
    assert any(site.saturated for site in observation.sites())
    observation.stop()


def test_clamp_error_is_the_mean_over_steps_that_clamped_as_a_log_has_it(tmp_path):
    model = plain()
    with unclamp.observe(model) as observation, unclamp.Recorder(model, tmp_path / "run") as log:
        optimizer = SGD(model.parameters(), lr=0.01)
        for size in (1, 1, 50, 1, 500):
            model(torch.ones(2, 12) * size).sum().backward()
            optimizer.step()
            log.step(loss=0.0)
    with unclamp.RunLog.open(tmp_path / "run") as run:
        rows = run.sql(
            "SELECT fqn, role, avg(saturated_error) AS error FROM casts JOIN sites USING (site) "
            "WHERE saturated > 0 GROUP BY ALL"
        ).to_pylist()
    expected = {(row["fqn"], row["role"]): row["error"] for row in rows}
    found = {(s.fqn, s.role): s.clamp_error for s in observation.sites() if s.saturated}
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["0", "input"] == pytest.approx(((49 / 50) ** 2 + (9 / 10) ** 2) / 2, rel=1e-3)


def test_words_count_in_singular_and_small_shares_are_not_zero():
    model = nn.Linear(64, 64)
    optimizer = SGD(model.parameters(), lr=0.0)
    with unclamp.observe(model) as observation:
        x = torch.ones(64, 64)
        x[0, 0] = 1e-9
        model(x).sum().backward()
        optimizer.step()
    assert str(observation) == (
        "observed 1 layer for 1 step: FP8 would have clamped 0 of 12,288 elements, at 0 of 3 "
        "sites, and lost 0.00814 % to underflow"
    )


def outlying(model, steps: int = 6) -> None:
    """Train: the input of layer "0" has one huge row at the last step, all else stays small."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(steps):
        x = torch.ones(8, 16)
        x[0] = 1000.0 if step == steps - 1 else 1.0
        model(x).square().mean().backward()
        optimizer.step()


def squashed() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 4))


def test_the_worst_sites_become_overrides_with_their_figures():
    base = Recipe(weight=Dynamic()).override("2", grad_output=HighPrecision())
    with unclamp.observe(squashed(), base) as observation:
        outlying(observation._model)
    sites = {(site.fqn, site.role): site for site in observation.sites()}
    # Only the last step clamps: 7 rows of 16 ones and one of 1000, of which 1 is left.
    squares = 7 * 16 + 16 * 1000.0**2
    error = 16 * 999.0**2 / squares
    assert sites["0", "input"].clamp_error == pytest.approx(error, rel=1e-3)
    recipe = observation.recipe(threshold=0.5)
    assert recipe == base.at_sites(
        [SiteName("0", "input")], Dynamic(), notes={"0": recipe.rules[0].note}
    )
    note = recipe.rules[0].note
    assert (
        "input: clamp error 99.8 %, 16 elements clamped in 1 of 6 steps, overshoot 1000.00x" in note
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert observation.recipe(threshold=0.5, scaling="guarded").rules[0].scalings == {
        "input": Guarded()
    }


def test_a_recipe_made_of_an_observation_no_longer_clamps_there():
    with unclamp.observe(squashed()) as before:
        outlying(before._model)
    assert before.sites()[0].saturated == 16
    with unclamp.observe(squashed(), before.recipe(threshold=0)) as after:
        outlying(after._model)
    assert [site for site in after.sites() if site.saturated] == []


def test_a_threshold_nobody_reaches_leaves_the_recipe_as_it_was():
    base = Recipe.uniform(Guarded())
    with unclamp.observe(squashed(), base) as observation:
        outlying(observation._model)
    assert observation.recipe(threshold=0.0) == base
    for wrong in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(RecipeError, match="threshold from 0 to 1"):
            observation.recipe(threshold=wrong)


def test_a_scaling_that_does_not_exist_is_refused_though_nothing_clamped():
    with unclamp.observe(nn.Linear(4, 4)) as observation:
        with pytest.raises(unclamp.RecipeError, match="did you mean 'dynamic'"):
            observation.recipe(scaling="dynmic")
        assert observation.recipe(scaling="dynamic") == Recipe()
