"""An autopilot in a training: what it decides, switches, records, refuses and saves."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unclamp
from unclamp import (
    Autopilot,
    Backtest,
    ConvertError,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerBlock,
    Recipe,
    RecipeError,
    Recorder,
    Rule,
    RunLog,
    SiteName,
    backtest,
)
from unclamp.analysis.steering import Decision
from unclamp.nn import find_ledgers

STEPS = 40
OUTLIERS = (10, 16, 22)
RULE = Rule(ladder=(Delayed(4), Guarded(), Dynamic()), floor=8)
RECIPE = Recipe.uniform(Delayed(4))


def model_of(recipe: Recipe = RECIPE) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    unclamp.convert(model, recipe)
    return model


def batch(step: int) -> Tensor:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).clamp(-2, 2)
    x[0, 0] = 300.0 if step in OUTLIERS else 2.0
    return x


def train(
    model: nn.Module, path: Path, steps: range = range(STEPS), **pilot: Any
) -> tuple[list[float], list[Decision]]:
    """Train; return the losses and the decisions of an autopilot, where there is one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    with Recorder(model, path, inspect=None) as recorder:
        own = Autopilot(model, recorder, **pilot) if pilot else None
        for step in steps:
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(step, loss=loss)
            if own is not None:
                own.step()
            losses.append(loss.item())
    return losses, [] if own is None else own.decisions


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs `delayed`, without an autopilot, and `steered`."""
    folder = tmp_path_factory.mktemp("runs")
    train(model_of(), folder / "delayed")
    train(model_of(), folder / "steered", rule=RULE, untested=True)
    return folder


@pytest.fixture(scope="module")
def tested(runs: Path) -> Backtest:
    return backtest(runs / "delayed", RULE)


def clamped(path: Path) -> list[tuple[int, str, int]]:
    with RunLog.open(path) as log:
        rows = log.sql(
            "SELECT step, fqn, saturated FROM casts JOIN sites USING (rank, site) "
            "WHERE fqn = '0' AND role = 'input' AND (saturated > 0 OR recast > 0) ORDER BY step"
        ).to_pylist()
    return [(row["step"], row["fqn"], row["saturated"]) for row in rows]


def test_the_first_outlier_clamps_and_no_later_one(runs: Path) -> None:
    """By hand: the planted element is the one beyond a history of fours; two steps repeat it."""
    assert clamped(runs / "delayed") == [(step, "0", 1) for step in OUTLIERS]
    assert clamped(runs / "steered") == [(10, "0", 1), (16, "0", 0), (22, "0", 0)]


def test_it_decides_in_a_training_what_a_backtest_of_its_log_decides(
    runs: Path, tmp_path: Path, tested: Backtest
) -> None:
    _, decisions = train(model_of(), tmp_path / "run", backtest=tested)
    assert len(decisions) > 2
    assert {d.kind for d in decisions} == {"up", "down"}
    assert list(backtest(tmp_path / "run", RULE).runs[0].decisions) == decisions


def test_on_a_device_it_decides_a_step_late(tmp_path: Path) -> None:
    """As on a GPU: what step 10 decides is switched after step 11, and recorded as step 12's."""
    late = {"rule": RULE, "untested": True, "late": True}
    _, decisions = train(model_of(), tmp_path / "run", **late)
    found = backtest(tmp_path / "run", RULE, late=1).runs[0].decisions
    # The last step's casts are those that nobody has read yet.
    assert decisions == [d for d in found if d.step < STEPS - 1]
    with RunLog.open(tmp_path / "run") as log:
        switches = log.switches().to_pylist()
    assert sorted(s["step"] for s in switches) == sorted(d.step + 2 for d in decisions)
    assert (decisions[0].step, clamped(tmp_path / "run")[0]) == (10, (10, "0", 1))


def test_a_switch_governs_the_step_after_the_one_that_decided(runs: Path) -> None:
    with RunLog.open(runs / "steered") as log:
        events = log.sql("SELECT step, data FROM events WHERE kind = 'autopilot' ORDER BY step")
        switches = log.switches().to_pylist()
    first, *decided = [json.loads(text) for text in events["data"].to_pylist()]
    assert (first["steered"], first["left"], first["tested_on"]) == (6, 0, [])
    listed = [d for each in decided for d in each["decisions"]]
    found = [(d["step"] + 1, d["fqn"], d["role"]) for d in listed]
    assert sorted(found) == sorted((s["step"], s["fqn"], s["role"]) for s in switches)
    (up,) = [d for d in listed if (d["step"], d["fqn"], d["role"]) == (10, "0", "input")]
    assert (up["kind"], up["reason"], up["amax"]) == ("up", "clamped", 300.0)
    assert up["overshoot"] == pytest.approx(150.0, rel=1e-3)  # of elements of 2
    assert (up["before"], up["after"]) == ("delayed(4)", "guarded(2)")


def test_the_page_says_what_was_decided(runs: Path) -> None:
    from unclamp.report.recorded import read_run
    from unclamp.report.runs import event_text, read_run_view

    with RunLog.open(runs / "steered") as log:
        record, windows = read_run(log)
        view = read_run_view(log, record, windows)
        data = log.sql("SELECT data FROM events WHERE kind = 'autopilot' AND step = 11")
    text = event_text("autopilot", data["data"].to_pylist()[0])
    assert "0 input delayed → guarded (overshoot 150.00x, clamp error up to 98.7 %)" in text
    said = [sentence for sentence in view.sentences if "autopilot" in sentence]
    assert said[0].startswith(
        "An autopilot steered 6 sites by the rule ladder=delayed(4) > guarded(2)"
    )
    assert said[0].endswith("The rule was tried on no log before.")
    assert "autopilot" in {event.kind for event in view.events}


def test_a_rule_without_a_fitting_backtest_does_not_steer(tested: Backtest) -> None:
    model = model_of()
    with pytest.raises(RecipeError, match="a rule that was tried on a log of this model"):
        Autopilot(model)
    with pytest.raises(RecipeError, match="the backtest is of another rule"):
        Autopilot(model, rule=Rule(ladder=RULE.ladder), backtest=tested)
    other = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    unclamp.convert(other, RECIPE)
    with pytest.raises(RecipeError, match=r"of another model: its logs lack 3 sites of 6.*1 input"):
        Autopilot(other, backtest=tested)
    Autopilot(other, rule=RULE, untested=True).close()
    with Autopilot(model, backtest=tested) as pilot:
        assert (pilot.rule, pilot.left, pilot.reads) == (RULE, {}, 1.0)


def test_a_backtest_that_went_badly_is_warned_of(runs: Path) -> None:
    hasty = Rule(ladder=RULE.ladder, floor=0, casts=2, of=30)
    tested = backtest(runs / "delayed", hasty)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Autopilot(model_of(), backtest=tested).close()
    said = [str(each.message) for each in told]
    assert "left 1 cast clamped above" in said[0]
    assert "100 % of the switches up were false" in said[1]
    assert all(Path(each.filename) == Path(__file__) for each in told)


def test_a_backtest_comes_from_a_file_too(tested: Backtest, tmp_path: Path) -> None:
    tested.save(tmp_path / "tested.json")
    Autopilot(model_of(), backtest=tmp_path / "tested.json").close()


def test_sites_that_are_no_rung_are_left_and_named() -> None:
    recipe = Recipe.from_toml('[input]\nscaling = "delayed"\nhistory_len = 4\n'
                              '[weight]\nscaling = "dynamic"\n'
                              '[grad_output]\nscaling = "delayed"\nhistory_len = 8\n')  # fmt: skip
    pilot = Autopilot(model_of(recipe), rule=Rule(ladder=(Delayed(4), Guarded())), untested=True)
    assert pilot.left[SiteName("0", "weight")] == "dynamic is no rung of the ladder"
    assert len(pilot.left) == 4
    pilot.close()
    with pytest.raises(RecipeError, match=r"no site of the model has a scaling of the rule's"):
        Autopilot(model_of(recipe), rule=Rule(ladder=(Delayed(16), Guarded())), untested=True)
    with pytest.raises(ConvertError, match=r"call unclamp\.convert before"):
        Autopilot(nn.Linear(4, 4), untested=True)


def test_a_training_goes_on_from_a_checkpoint_as_if_it_had_not_ended(tmp_path: Path) -> None:
    """Decisions and losses after a restart, with scaling state and the autopilot's, bit for bit."""
    rule = {"rule": RULE, "untested": True}
    losses, decisions = train(model_of(), tmp_path / "whole", **rule)
    cut = 14
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    first = Autopilot(model, **rule)
    for step in range(cut):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        first.step()
    torch.save({"model": model.state_dict(), "pilot": first.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = model_of()
    again.load_state_dict(state["model"])
    second = Autopilot(again, **rule)
    second.load_state_dict(state["pilot"])
    scalings = [site.operand.scaling for site in find_ledgers(again)[0].sites]
    assert scalings.count(Guarded()) >= 1
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-3)
    after = []
    for step in range(cut, STEPS):
        loss = again(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        second.step(step)
        after.append(loss.item())
    assert after == losses[cut:]
    assert [*first.decisions, *second.decisions] == decisions
    with pytest.raises(RecipeError, match="another rule or other sites"):
        Autopilot(model_of(), rule=Rule(ladder=RULE.ladder), untested=True).load_state_dict(
            state["pilot"]
        )


def test_calm_training_is_bit_for_bit_that_without_an_autopilot(tmp_path: Path) -> None:
    """Nothing speaks against a margin of 8: nothing is switched, no number changes."""
    scaling = Delayed(4, margin=8)
    rule = Rule(ladder=(scaling, Guarded()))
    recipe = Recipe.uniform(scaling)
    plain, _ = train(model_of(recipe), tmp_path / "plain")
    steered, decisions = train(model_of(recipe), tmp_path / "steered", rule=rule, untested=True)
    assert (steered, decisions) == (plain, [])


def test_prices_that_are_handed_in_decide_too() -> None:
    """A site goes up to finer blocks and to high precision, and the training goes on."""
    ladder = (Delayed(4), Dynamic(), Dynamic(PerBlock(1, 16)), HighPrecision())
    model = model_of()
    pilot = Autopilot(model, rule=Rule(ladder=ladder, price=0.1, reads=2.0), untested=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for rung in range(1, 4):
        model(batch(rung)).square().mean().backward()
        optimizer.step()
        (up,) = pilot.step(prices={SiteName("2", "input"): 0.2, SiteName("0", "input"): 0.05})
        assert (str(up.site), up.reason, up.price) == ("2 input", "price", 0.2)
        assert find_ledgers(model)[0].sites[3].operand.scaling == ladder[rung]
    pilot.close()
