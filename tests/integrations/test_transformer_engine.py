"""Runs recorded from Transformer Engine's scaling state, against every cast that was made.

Transformer Engine needs a GPU, so a stand-in has its buffers and rules (`te_standin`). The truth
is what its casts saw: the tensor and the scale of each.
"""

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import unclamp
from integrations.te_standin import (
    TE,
    VERSIONS,
    Cast,
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    Linear,
    Model,
    Version,
)
from unclamp import RunLog, record_transformer_engine
from unclamp.cli import app
from unclamp.errors import RunLogError, UnclampWarning
from unclamp.formats import E4M3FN, E5M2

STEPS, PERIOD, LENGTH, WIDTH = 40, 9, 8, 16
Site = tuple[str, str]


@dataclass
class Trained:
    """A run, and what happened in it."""

    te: TE
    path: Path
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def casts(self) -> dict[tuple[int, Site], list[Cast]]:
        found = defaultdict(list)
        for cast in self.te.truth:
            if cast.tensor.abs().max() != 0:
                found[cast.step, site_of(cast)].append(cast)
        return dict(found)


ATTENTION = {"qkv", "s", "o", "dqkv", "do", "dp"}


def site_of(cast: Cast) -> Site:
    if cast.role not in ATTENTION:
        return cast.fqn, cast.role
    return f"{cast.fqn}.{cast.role}", "grad_output" if cast.role[0] == "d" else "input"


def format_of(site: Site) -> Any:
    return E5M2 if site[1] == "grad_output" else E4M3FN


def limit_of(site: Site) -> float:
    return format_of(site).overflow_limit


def is_clamped(cast: Cast) -> bool:
    finite = cast.tensor[cast.tensor.isfinite()]
    return bool(((finite * cast.scale).abs() > limit_of(site_of(cast))).any())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, WIDTH, generator=generator)
    if step % PERIOD == PERIOD - 1:
        x[0] *= 40.0  # an outlier that no history of four updates remembers
    return x, x.sum(1) / 4


def train(
    path: Path,
    version: Version,
    *,
    microbatches: int = 1,
    recipe: Any = None,
    steps: int = STEPS,
    evaluate: bool = False,
    most: int = 8,
) -> Trained:
    torch.manual_seed(0)
    te = TE(version)
    recipe = recipe or DelayedScaling(amax_history_len=LENGTH, margin=1)
    model = Model(te, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    done = Trained(te, path)
    with record_transformer_engine(model, path, microbatches=most) as recorder:
        for step in range(steps):
            te.step = step
            optimizer.zero_grad()
            total = torch.zeros(())
            for part in range(microbatches):
                x, y = batch(step * microbatches + part)
                with te.autocast(recipe):
                    out = model(x)
                loss = (out - y).square().mean() / microbatches
                loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recorder.step(step, loss=total, grad_norm=norm, lr=0.01)
            done.losses.append(float(total))
            done.norms.append(float(norm))
            if evaluate and step % 5 == 0:
                with torch.no_grad(), te.autocast(recipe):
                    model(batch(1000 + step)[0])
    return done


def rows_of(path: Path) -> dict[tuple[int, Site], dict[str, Any]]:
    with RunLog.open(path) as log:
        rows = log.sql(
            "SELECT * FROM casts JOIN sites USING (site, rank) ORDER BY step"
        ).to_pylist()
    return {(row["step"], (row["fqn"], row["role"])): row for row in rows}


@pytest.fixture(scope="module", params=[(v, k) for v in VERSIONS for k in (1, 3)],
                ids=lambda p: f"{p[0]}, {p[1]} microbatches".replace(" ", "-"))  # fmt: skip
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    version, microbatches = request.param
    return train(tmp_path_factory.mktemp("te") / "run", version, microbatches=microbatches)


@pytest.mark.cell("Transformer Engine", "updates once a step")
@pytest.mark.cell("Transformer Engine", "accumulation")
def test_each_row_tells_of_the_casts_that_were_made(trained: Trained):
    truth, rows = trained.casts(), rows_of(trained.path)
    assert rows.keys() == truth.keys()
    assert len({site for _, site in rows}) == 3 + 3 + 6 + 6 + 6
    for key, casts in truth.items():
        row = rows[key]
        assert row["microsteps"] == len(casts)
        assert row["amax"] == max(float(cast.tensor.abs().max()) for cast in casts)
        assert row["scale"] == pytest.approx(min(cast.scale for cast in casts), rel=1e-6)
        assert row["clamped"] == any(map(is_clamped, casts)), key
        top = format_of(key[1]).max / (row["amax"] * row["scale"])
        assert row["headroom_bits"] == pytest.approx(math.log2(top))
        nothing = ("elements", "saturated", "underflowed", "nonfinite", "saturated_error")
        assert {name: row[name] for name in nothing} == dict.fromkeys(nothing)
    clamped = sum(row["clamped"] for row in rows.values())
    assert 30 < clamped < len(rows)  # outliers clamp, and not everything does


def test_the_age_of_a_scale_is_that_of_the_amax_it_comes_from(trained: Trained):
    sequences: dict[Site, list[Cast]] = defaultdict(list)
    for cast in trained.te.truth:
        sequences[site_of(cast)].append(cast)
    rows = rows_of(trained.path)
    compared = 0
    for site, casts in sequences.items():
        amaxes = [float(cast.tensor.abs().max()) for cast in casts]
        for i, cast in enumerate(casts):
            is_last = i + 1 == len(casts) or casts[i + 1].step != cast.step
            if not is_last:
                continue
            window = amaxes[max(0, i - LENGTH) : i][::-1]
            age = 1 + window.index(max(window)) if window else None
            assert rows[cast.step, site]["scale_age"] == age
            compared += 1
    assert compared == len(rows)


@pytest.mark.cell("Transformer Engine", "loss as its own log")
def test_losses_and_norms_are_those_of_the_loop(trained: Trained):
    with RunLog.open(trained.path) as log:
        steps = log.steps().to_pylist()
        assert log.header.counts == "casts"
        assert log.header.metadata["framework"] == "Transformer Engine"
    assert [row["loss"] for row in steps] == trained.losses
    assert [row["grad_norm"] for row in steps] == trained.norms


def test_commands_read_the_run(trained: Trained, tmp_path: Path):
    """What each says is tried with `tests/report/test_uncounted_runs.py`; here that they work."""
    run, page = str(trained.path), str(tmp_path / "page.html")
    for arguments in (["spikes", run], ["associate", run], ["report", run, "--out", page]):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0, shown.output
    assert "recorded casts clamped, at" in shown.output
    assert "How many elements, and how much that removed, is not known." in Path(page).read_text()


def test_a_state_that_is_there_before_the_run_gives_its_recipe(tmp_path: Path):
    te = TE("2.x")
    layer = Linear(te, "0", 8, 8)
    model = nn.Sequential(layer)
    of_a_function = DelayedScaling(amax_compute_algo=lambda history: history.mean(0))
    for recipe, is_told in ((DelayedScaling(amax_history_len=3), True), (of_a_function, False)):
        layer.fp8_meta.pop("scaling_fwd", None)
        with te.autocast(recipe):
            model(torch.ones(4, 8))
        path = tmp_path / str(is_told)
        record_transformer_engine(model, path).close()
        with RunLog.open(path) as log:
            told = log.header.recipe
        assert (told is not None) == is_told
        assert told is None or unclamp.Recipe.from_dict(told).input == unclamp.Delayed(3)


@pytest.mark.parametrize("version", VERSIONS)
def test_evaluations_between_steps_are_no_casts_of_the_training(tmp_path: Path, version: Version):
    """Before the latest releases an evaluation updates scales, so that its amaxes are seen too."""
    done = train(tmp_path / "run", version, evaluate=True, steps=20)
    truth, rows = done.casts(), rows_of(done.path)
    assert rows.keys() == truth.keys()
    for key, casts in truth.items():
        if key[1][1] == "grad_output":
            assert rows[key]["clamped"] == any(map(is_clamped, casts))
    if version == "2.x":
        assert {row["microsteps"] for row in rows.values()} == {1}


def test_an_evaluation_that_changes_no_scale_leaves_its_amax_to_the_next_pass(tmp_path: Path):
    """The history's first row has the largest of both, and nobody can tell them apart."""
    te = TE("2.x")
    model = nn.Sequential(Linear(te, "0", 8, 8))
    trained = [10.0 + step for step in range(6)]
    evaluated = {2: 500.0, 4: 1.0}
    with record_transformer_engine(model, tmp_path / "run") as recorder:
        for step, size in enumerate(trained):
            if step in evaluated:
                with torch.no_grad(), te.autocast(DelayedScaling(amax_history_len=6)):
                    model(torch.full((4, 8), evaluated[step]))
            with te.autocast(DelayedScaling(amax_history_len=6)):
                out = model(torch.full((4, 8), size))
            out.sum().backward()
            recorder.step(step, loss=1.0)
    rows = rows_of(tmp_path / "run")
    own = [rows[step, ("0", "input")] for step in range(6)]
    both = [max(size, evaluated.get(step, 0.0)) for step, size in enumerate(trained)]
    assert [row["amax"] for row in own] == both
    assert [row["microsteps"] for row in own] == [1] * 6
    assert own[2]["clamped"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"amax_compute_algo": "most_recent"},
        {"fp8_format": Format.E4M3},
        {"amax_history_len": 1},
        {"amax_history_len": 2},
        {"amax_compute_algo": lambda history: history.mean(0)},
    ],
    ids=["most_recent", "E4M3", "one row", "two rows", "a function"],
)
def test_recipes(tmp_path: Path, version: Version, changes: dict[str, Any]):
    recipe = DelayedScaling(**{"amax_history_len": LENGTH, **changes})
    done = train(tmp_path / "run", version, recipe=recipe, steps=20)
    truth, rows = done.casts(), rows_of(done.path)
    assert rows.keys() == truth.keys()
    is_e4m3 = changes.get("fp8_format") is Format.E4M3
    for key, (cast,) in truth.items():
        limit = 464.0 if is_e4m3 else limit_of(key[1])
        clamped = bool(((cast.tensor * cast.scale).abs() > limit).any())
        assert rows[key]["clamped"] == clamped
        assert rows[key]["amax"] == pytest.approx(float(cast.tensor.abs().max()), rel=1e-6)
        assert rows[key]["format"] == ("e4m3fn" if is_e4m3 else format_of(key[1]).name)


def test_an_infinite_amax_freezes_the_scale_and_is_told(tmp_path: Path):
    te = TE("2.x")
    model = nn.Sequential(Linear(te, "0", 8, 8))
    with record_transformer_engine(model, tmp_path / "run") as recorder:
        for step in range(8):
            te.step = step
            x = torch.full((4, 8), 10.0 + 5.0 * step)
            if step == 2:
                x[0, 0] = math.inf
            with te.autocast(DelayedScaling(amax_history_len=3)):
                out = model(x)
            out.sum().backward()
            recorder.step(step, loss=1.0)
    rows = rows_of(tmp_path / "run")
    own = [rows[step, ("0", "input")] for step in range(8)]
    truth = [c.scale for c in te.truth if c.role == "input"]
    assert [row["scale"] for row in own] == pytest.approx(truth)
    assert own[2]["amax"] is None
    assert own[2]["clamped"] is None  # what its finite elements were nobody knows
    assert truth[3] == truth[4] == truth[5] == truth[2] != truth[6]  # the window holds the Inf
    assert [row["scale_age"] for row in own] == [None, 1, 1, 2, 3, 4, 1, 1]
    with RunLog.open(tmp_path / "run") as log:
        events = log.sql("SELECT step, data FROM events WHERE kind = 'nonfinite'").to_pylist()
    assert [event["step"] for event in events] == [2]
    assert '"fqn": "0"' in events[0]["data"]


def test_more_updates_than_are_looked_for_are_told(tmp_path: Path):
    recipe = DelayedScaling(amax_history_len=64)
    with pytest.warns(UnclampWarning, match="microbatches=4"):
        train(tmp_path / "run", "2.x", microbatches=7, recipe=recipe, steps=6, most=1)


def test_a_state_that_was_loaded_in_between_is_not_guessed_at(tmp_path: Path):
    te = TE("2.x")
    layer = Linear(te, "0", 8, 8)
    model = nn.Sequential(layer)
    recipe = DelayedScaling(amax_history_len=16)

    def record() -> None:
        with record_transformer_engine(model, tmp_path / "run") as recorder:
            for step in range(6):
                if step == 3:
                    state = layer.fp8_meta["scaling_fwd"]
                    state.amax_history.copy_(torch.rand(16, 3) + 5)
                    state.scale.fill_(7.0)
                te.step = step
                with te.autocast(recipe):
                    out = model(torch.full((4, 8), 2.0 + step))
                out.sum().backward()
                recorder.step(step, loss=1.0)

    with pytest.warns(UnclampWarning, match="loaded or reset"):
        record()
    rows = rows_of(tmp_path / "run")
    assert [step for step, site in rows if site == ("0", "input")] == [0, 1, 2, 4, 5]
    truth = {cast.step: cast.scale for cast in te.truth if cast.role == "input"}
    assert rows[4, ("0", "input")]["scale"] == pytest.approx(truth[4])
    with RunLog.open(tmp_path / "run") as log:
        unread = log.sql("SELECT step FROM events WHERE kind = 'unread'").to_pylist()
    assert unread == [{"step": 3}]


@pytest.mark.cell("Transformer Engine", "exception")
def test_an_exception_closes_the_run_as_failed(tmp_path: Path):
    def fails() -> None:
        with record_transformer_engine(Model(TE("2.x")), tmp_path / "run") as recorder:
            recorder.step(loss=math.nan)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with RunLog.open(tmp_path / "run") as log:
        assert log.header.status == "failed"
        assert math.isnan(log.steps()["loss"][0].as_py())


@pytest.mark.cell("Transformer Engine", "save format clean")
def test_the_model_is_left_as_it_was(tmp_path: Path):
    te = TE("2.x")
    model = Model(te)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    recorder = record_transformer_engine(model, tmp_path / "run")
    recorder.step(loss=1.0)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    recorder.close()


def test_recording_changes_no_number_of_the_training(tmp_path: Path):
    te, losses = TE("2.x"), []
    torch.manual_seed(0)
    model = Model(te, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(10):
        optimizer.zero_grad()
        x, y = batch(step)
        with te.autocast(DelayedScaling(amax_history_len=LENGTH, margin=1)):
            out = model(x)
        loss = (out - y).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert train(tmp_path / "run", "2.x", steps=10).losses == losses


def test_a_run_goes_on_and_its_first_scale_is_the_loaded_one(tmp_path: Path):
    te = TE("2.x")
    model = nn.Sequential(Linear(te, "0", 8, 8))
    recipe = DelayedScaling(amax_history_len=3)

    def steps(first: int, last: int) -> None:
        with record_transformer_engine(model, tmp_path / "run", resume=True) as recorder:
            for step in range(first, last):
                te.step = step
                with te.autocast(recipe):
                    out = model(torch.full((4, 8), 3.0 * 1.7**step))
                out.sum().backward()
                recorder.step(step, loss=float(step))

    steps(0, 4)
    steps(4, 8)
    rows = rows_of(tmp_path / "run")
    truth = {c.step: c for c in te.truth if c.role == "input"}
    assert [rows[s, ("0", "input")]["scale"] for s in range(8)] == pytest.approx(
        [truth[s].scale for s in range(8)]
    )
    assert rows[4, ("0", "input")]["scale_age"] == 1
    with RunLog.open(tmp_path / "run") as log:
        assert [attempt.first_step for attempt in log.attempts] == [0, 4]


def test_current_scaling_keeps_nothing_and_the_run_says_so(tmp_path: Path):
    te = TE("2.x")
    model = nn.Sequential(Linear(te, "0", 8, 8))
    with record_transformer_engine(model, tmp_path / "run") as recorder:
        with te.autocast(Float8CurrentScaling()):
            out = model(torch.ones(4, 8))
        out.sum().backward()
        with pytest.warns(UnclampWarning, match=r"1 of 1 .* \(Float8CurrentScaling\)"):
            recorder.step(loss=2.0)
        recorder.step(loss=1.0)  # said once
    with RunLog.open(tmp_path / "run") as log:
        assert log.steps()["loss"].to_pylist() == [2.0, 1.0]
        assert log.casts().num_rows == 0


def test_a_model_without_transformer_engine_is_refused(tmp_path: Path):
    with pytest.raises(RunLogError, match="none has an fp8_meta"):
        record_transformer_engine(nn.Linear(2, 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrappers_are_in_no_name(tmp_path: Path):
    te = TE("2.x")
    inner = nn.Module()
    inner._orig_mod = nn.ModuleDict({"up": Linear(te, "up", 8, 8)})
    outer = nn.Module()
    outer.module = inner
    layer = inner._orig_mod["up"]
    with record_transformer_engine(outer, tmp_path / "run") as recorder:
        with te.autocast(DelayedScaling()):
            out = layer(torch.ones(4, 8))
        out.sum().backward()
        recorder.step(loss=1.0)
    assert {site[0] for _, site in rows_of(tmp_path / "run")} == {"up"}


def test_the_name_is_public_and_loads_at_first_use():
    assert unclamp.record_transformer_engine is record_transformer_engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "record_transformer_engine" in unclamp.__all__
