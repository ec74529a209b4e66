"""Logs that lack, repeat or contradict: the report says so, and says no more than is known."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from truths.rows import as_schema_1
from unclamp.report import build_view
from unclamp.report.arms import _worst, scenario_view
from unclamp.report.charts import embed, run_figure
from unclamp.report.html import write_page
from unclamp.report.recorded import RunRecord, read_run
from unclamp.report.runs import RunView
from unclamp.report.view import View
from unclamp.report.words import arm_row, association_row, site_row
from unclamp.runlog import Header, RunLog, RunLogWriter

EVIL = '"><script>alert(1)</script>'
NAN = float("nan")


def run_of(view: View) -> RunView:
    assert view.run is not None
    return view.run


def write_run(
    path: Path, loss: Sequence[float | None], *, metadata: Any = None, **site: Any
) -> Path:
    """Write a run of so many steps with one site, whose columns of casts may be given."""
    count = len(loss)
    casts = {"amax": 1.0, "scale": 448.0, "elements": 10, "saturated": 0, "underflowed": 0,
             "nonfinite": 0, "recast": 0, "saturated_error": 0.0, "microsteps": 1}  # fmt: skip
    fqn, every = site.pop("fqn", "a"), site.pop("every", 1)
    header = Header(unclamp_version="test", metadata=metadata or {})
    with RunLogWriter(path, header=header) as writer:
        writer.add("sites", {"site": [0], "fqn": [fqn], "role": ["input"], "format": ["e4m3fn"],
                             "scaling": ["delayed"], "format_max": [448.0]})  # fmt: skip
        writer.add("steps", {"step": range(count), "loss": loss, "time_s": [0.0] * count})
        at = list(range(0, count, every))
        rows = {name: [value] * len(at) for name, value in (casts | site).items()}
        writer.add("casts", {"step": at, "site": [0] * len(at), **rows})
    return path


def record_of(path: Path) -> RunRecord:
    with RunLog.open(path) as log:
        return read_run(log)[0]


def test_no_name_reaches_the_page_as_markup(planted_run: Path, tmp_path: Path) -> None:
    view = build_view(planted_run)
    scenario = scenario_view(EVIL, EVIL, {EVIL: {0: record_of(planted_run)}}, {})
    study = replace(view, run=None, scenarios=[scenario], runs={EVIL: {EVIL: [EVIL]}})
    text = write_page(study, tmp_path / "page.html").read_text()
    assert "<script>alert(1)" not in text
    assert 'id="heat-0-0"' in text
    assert 'id="loss-0"' in text
    with pytest.raises(ValueError, match="as an element's name"):
        embed(run_figure(run_of(view)), EVIL)


@pytest.mark.parametrize("seed", [None, "abc", [1], {"a": 1}, 1.5, 7])
def test_metadata_is_free(seed: Any, tmp_path: Path) -> None:
    metadata = {"seed": seed, "arm": None, "scenario": 3}
    path = write_run(tmp_path / "run", [2.0] * 30, metadata=metadata)
    text = write_page(build_view(path), tmp_path / "page.html").read_text()
    assert "The final loss is 2.0000" in text


def test_a_loss_of_some_steps_has_a_final_loss_and_a_line(tmp_path: Path) -> None:
    loss = [float(i) if i % 5 == 0 else None for i in range(100)]
    view = build_view(write_run(tmp_path / "run", loss))
    assert view.scenarios[0].arms[0].final_loss == (90 + 95) / 2
    assert run_of(view).sentences[-1].startswith("The final loss is 92.5000")
    curve = run_of(view).curves["loss"]
    assert curve.step == list(range(0, 100, 5))
    assert None not in curve.value
    assert view.scenarios[0].curves["run"].step == [float(i) for i in range(0, 100, 5)]


def test_a_loss_that_is_not_finite_is_said_and_is_not_a_missing_one(tmp_path: Path) -> None:
    for name, loss in (("all", [NAN] * 40), ("end", [2.0] * 39 + [float("inf")])):
        view = build_view(write_run(tmp_path / name, loss))
        said = " ".join(run_of(view).sentences)
        assert "The final loss is not finite" in said
        assert "not recorded" not in said
        assert arm_row(view.scenarios[0].arms[0], view.scenarios[0])[1] == "not finite"
        text = write_page(view, tmp_path / "page.html").read_text()
        assert "Neither loss nor gradient norm was recorded" not in text
        json.dumps(view.to_dict(), allow_nan=False)
    none = run_of(build_view(write_run(tmp_path / "none", [None] * 40)))
    assert "The loss was not recorded." in none.sentences
    assert none.curves == {}


def test_arms_whose_losses_are_zero_or_not_finite_have_no_false_ratio(tmp_path: Path) -> None:
    plain = replace(record_of(write_run(tmp_path / "run", [2.0] * 40, saturated=1)), planted=[5, 9])

    def arm_against(
        own: Sequence[float | None], other: Sequence[float | None]
    ) -> tuple[Any, list[str]]:
        runs = {
            "dynamic": {0: replace(plain, loss=list(other))},
            "a": {0: replace(plain, loss=list(own))},
        }
        view = scenario_view("text", "", runs, {})
        return view.arms[1], [*view.findings, *arm_row(view.arms[1], view)]

    zero: list[float | None] = [2.0] * 40
    zero[5] = 0.0
    arm, _ = arm_against([4.0] * 40, zero)
    assert arm.planted_ratio == (2.0, 2.0, 2.0)
    broken: list[float | None] = [2.0] * 40
    broken[9] = NAN
    _, said = arm_against(broken, [2.0] * 40)
    assert any("planted steps a loss" in line and "not finite" in line for line in said)
    assert not any("nan" in line for line in said)
    plain = replace(plain, planted=[])
    arm, said = arm_against([2.0] * 39 + [NAN], [2.0] * 40)
    assert any("the only seed the loss of a is not finite" in line for line in said)
    assert arm.planted_ratio is None


def test_the_worst_step_is_that_of_the_seed_with_the_largest_error(tmp_path: Path) -> None:
    run = record_of(write_run(tmp_path / "run", [2.0] * 3, saturated=1, saturated_error=0.1))
    (site,) = run.sites
    totals = replace(site.totals, worst_step=2, clamp_error_max=0.9)
    other = replace(run, sites=[replace(site, totals=totals)])
    for runs in ([run, other], [other, run]):
        (row,) = _worst(runs)
        assert row.worst_step == 2
        assert row.saturated == 6


def test_clamps_too_small_for_an_error_have_no_worst_step(tmp_path: Path) -> None:
    view = build_view(write_run(tmp_path / "run", [2.0] * 3, saturated=1, saturated_error=0.0))
    said = run_of(view).sentences
    assert "3 elements were clamped, in 3 of 3 recorded casts, at 1 of 1 site." in said
    assert not any("Most clamp error" in sentence for sentence in said)
    (row,) = view.scenarios[0].worst["run"]
    assert site_row(row)[-1] == "-"
    write_page(view, tmp_path / "page.html")


def test_a_root_model_has_a_name(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [2.0] * 3, fqn="", saturated=1, saturated_error=0.5)
    view = build_view(path, sites=["(the model itself) input"])
    assert any(
        "Most clamp error: (the model itself) input," in sentence
        for sentence in run_of(view).sentences
    )
    assert list(run_of(view).heat) == ["(the model itself) input"]
    assert site_row(view.scenarios[0].worst["run"][0])[0] == "(the model itself)"
    assert association_row({"fqn": "", "role": "input"})[0] == "(the model itself)"


def test_a_change_of_a_loss_below_zero_is_no_percentage() -> None:
    row = {"fqn": "a", "role": "input", "loss_change": 0.5, "low": 0.25, "high": 0.75}
    assert association_row(row)[6:8] == ["+50 %", "+25 % to +75 %"]
    assert association_row(row, is_relative=False)[6:8] == ["+0.5", "+0.25 to +0.75"]
    assert association_row({**row, "high": None})[7] == "-"


def write_stages(path: Path) -> Path:
    """Write two ranks that hold different modules, as the stages of a pipeline do."""
    header = Header(unclamp_version="test", world_size=2, run_id="one")
    for rank, fqn in enumerate(("first.down", "second.up")):
        with RunLogWriter(path, header=header, rank=rank) as writer:
            writer.add("sites", {"site": [rank], "fqn": [fqn], "role": ["input"],
                "format": ["e4m3fn"], "scaling": ["delayed"], "format_max": [448.0]})  # fmt: skip
            writer.add("steps", {"step": [0], "loss": [2.0], "time_s": [0.0]})
            writer.add("casts", {"step": [0], "site": [rank], "amax": [896.0], "scale": [1.0],
                "elements": [10], "saturated": [3 + rank], "underflowed": [0], "nonfinite": [0],
                "recast": [0], "saturated_error": [0.5], "microsteps": [1]})  # fmt: skip
    return path


@pytest.mark.parametrize("is_old", [False, True])
def test_the_stages_of_a_pipeline_are_named_each_with_its_own_counts(
    tmp_path: Path, is_old: bool
) -> None:
    path = write_stages(tmp_path / "run")
    if is_old:
        as_schema_1(path, world_size=2)
    view = build_view(path)
    run = run_of(view)
    counts = {"first.down": 3, "second.up": 4}
    assert view.notes == []
    assert {site.fqn: site.saturated for site in run.sites} == counts
    assert {panel.fqn for panel in run.panels.values()} == set(counts)
    assert {row.fqn: row.saturated for row in view.scenarios[0].worst["run"]} == counts
    assert set(run.heat) == {"first.down input", "second.up input"}
    assert "7 elements were clamped, in 2 of 2 recorded casts" in " ".join(run.sentences)
    text = write_page(view, tmp_path / "page.html").read_text()
    assert all(fqn in text for fqn in counts)


@pytest.mark.parametrize("saturated", [0, 2])
def test_of_sparse_rows_no_more_is_said_than_was_recorded(saturated: int, tmp_path: Path) -> None:
    cadence = {"casts": {"steps": 10, "or_clamped": False}, "inspect": None}
    path = write_run(tmp_path / "run", [2.0] * 100, metadata={"cadence": cadence}, every=10,
                     saturated=saturated, saturated_error=saturated / 4)  # fmt: skip
    as_schema_1(path)
    view = build_view(path)
    said = run_of(view).sentences
    (counted,) = [s for s in said if "clamped" in s and "Most" not in s]
    assert counted.endswith("1 site in the 10 recorded of 100 steps.")
    assert counted.startswith("Nothing was clamped") == (saturated == 0)
    page = write_page(replace(view, run=None), tmp_path / "page.html").read_text()
    calm = "Nothing was clamped in: run in the 10 recorded of 100 steps."
    assert (calm in page) == (saturated == 0)


@pytest.mark.parametrize(
    "cadence", [None, 3, {"casts": None}, {"casts": {"steps": 1}}, {"casts": {"steps": "x"}}]
)
def test_dense_rows_or_an_unknown_cadence_say_nothing_of_it(cadence: Any, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [2.0] * 30, metadata={"cadence": cadence})
    as_schema_1(path)
    assert "Nothing was clamped at any of 1 site." in run_of(build_view(path)).sentences
