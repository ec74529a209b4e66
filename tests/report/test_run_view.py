"""What the data of a run's page say, against a run in which everything is planted."""

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from truths.runs import CLAMP_STEPS, SPIKE, write_large, write_planted
from truths.sides import write_side
from unclamp.analysis import associate, clamped_gradients
from unclamp.analysis.prices import cast_prices
from unclamp.errors import UnclampError
from unclamp.report import build_view
from unclamp.report.charts import run_figure
from unclamp.report.evidence import CAUTION, read_explanations
from unclamp.report.html import write_page
from unclamp.report.runs import RunView, event_text
from unclamp.report.status import OBSERVED, ago
from unclamp.report.text import print_view
from unclamp.runlog import Header, RunLog, RunLogWriter
from unclamp.runlog.windows import LONG_STEPS, MOST_WINDOWS


@pytest.fixture(scope="module")
def run(planted_run: Path) -> RunView:
    view = build_view(planted_run).run
    assert view is not None
    return view


def test_the_planted_spike_is_found_with_onset_and_end(run: RunView) -> None:
    (spike,) = run.spikes
    assert (spike["onset"], spike["end"], spike["series"]) == (SPIKE, SPIKE + 2, "loss")
    assert spike["height"] == pytest.approx(2.5, rel=0.02)


def test_a_site_adds_up_to_what_was_recorded(run: RunView) -> None:
    site = run.sites[0]
    assert (site.fqn, site.role) == ("model.layers.0.down", "input")
    assert (site.saturated, site.clamped_casts, site.rows) == (10, 2, 200)
    assert site.clamp_error == pytest.approx(0.375)
    assert site.overshoot == 2.0
    assert site.worst_step == CLAMP_STEPS[0]
    assert site.underflow_share == pytest.approx(0.01)
    assert (site.sqnr_db_min, site.sqnr_db_mean) == (20.0, 21.5)
    others = {(s.fqn, s.role): s for s in run.sites[1:]}
    weight = others["model.layers.0.down", "weight"]
    assert (weight.recasts, weight.clamp_error, weight.sqnr_db_min) == (1, None, None)
    gradient = others["model.layers.1.up", "grad_output"]
    assert (gradient.nonfinite, gradient.switched) == (1, [160])


def test_a_panel_holds_the_range_of_its_scale_and_what_was_lost(run: RunView) -> None:
    panel = run.panels[0]
    assert len(panel.amax) == len(run.window_steps) == 200
    assert (panel.amax[147], panel.amax[148]) == (112.0, 896.0)
    assert panel.top[148] == 448.0
    assert panel.bottom[148] == pytest.approx(2.0**-9, rel=1e-4)
    assert (panel.clamp[148], panel.clamp[150]) == (0.005, 0.0)
    assert panel.sqnr[100] == 22.0
    assert panel.sqnr[101] is None
    histogram = panel.histogram
    assert histogram is not None
    assert histogram.step == 150
    assert histogram.exponent == [-3, 6]
    assert histogram.latest == [600, 450]
    assert histogram.total == [2400, 1500]
    assert run.panels[1].histogram is None
    assert run.panels[1].recast[9] == 1


def test_the_heat_map_has_the_sites_that_clamped(run: RunView) -> None:
    assert list(run.heat) == ["model.layers.0.down input"]
    assert [i for i, share in enumerate(run.heat["model.layers.0.down input"]) if share] == [
        *CLAMP_STEPS
    ]


def test_events_say_what_happened(run: RunView) -> None:
    said = {event.kind: event.text for event in run.events}
    assert said["switch"] == "model.layers.1.up grad_output delayed → dynamic"
    assert said["snapshot"] == "path: snap-140"
    assert event_text("odd", "no json") == "no json"
    assert event_text("switch", '{"sites": 3}') == "sites: 3"


def test_json_is_strict_and_has_every_site(planted_run: Path) -> None:
    data = json.loads(json.dumps(build_view(planted_run).to_dict(), allow_nan=False))
    assert len(data["run"]["sites"]) == 3
    assert data["run"]["spikes"][0]["onset"] == SPIKE


def test_a_long_run_is_read_from_summaries_and_says_the_same(tmp_path: Path) -> None:
    steps = LONG_STEPS + 300
    view = build_view(write_planted(tmp_path / "run", steps=steps)).run
    assert view is not None
    assert view.window_size % 100 == 0
    assert len(view.window_steps) <= MOST_WINDOWS
    site = view.sites[0]
    assert (site.saturated, site.clamped_casts, site.rows) == (10, 2, steps)
    assert site.clamp_error == pytest.approx(0.375)
    assert (site.worst_step, site.overshoot, site.sqnr_db_min) == (148, 2.0, 20.0)
    panel = view.panels[site.site]
    at = view.window_steps.index(100)
    assert (panel.amax[at], panel.clamp[at]) == (896.0, 10 / 100_000)
    assert panel.histogram is not None
    assert panel.histogram.since >= steps - 1_001


def test_a_run_without_steps_casts_or_loss_has_a_page(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "empty", header=Header(unclamp_version="test")):
        pass
    view = build_view(tmp_path / "empty")
    assert view.run is not None
    assert (view.run.sites, view.run.curves, view.run.spikes) == ([], {}, [])
    text = write_page(view, tmp_path / "page.html").read_text()
    assert "No cast was recorded." in text
    with RunLogWriter(tmp_path / "bare", header=Header(unclamp_version="test")) as writer:
        writer.add("steps", {"step": [3, 4], "time_s": [0.0, 1.0]})
    view = build_view(tmp_path / "bare")
    assert view.run is not None
    assert "The loss was not recorded." in view.run.sentences
    assert "No cast was recorded. Whether it was in FP8 is not in the log." in view.run.sentences
    json.dumps(view.to_dict(), allow_nan=False)


def test_a_nan_loss_is_a_spike_and_strict_json(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="test")) as writer:
        loss = [2.0] * 40 + [float("nan")] * 3
        writer.add("steps", {"step": range(43), "loss": loss, "time_s": [0.0] * 43})
    view = build_view(tmp_path / "run")
    assert view.run is not None
    assert view.run.spikes[0]["kind"] == "nonfinite"
    assert "not finite" in view.run.sentences[-2]
    json.dumps(view.to_dict(), allow_nan=False)
    write_page(view, tmp_path / "page.html")


def test_only_the_worst_sites_of_a_large_run_have_panels_and_a_glob_adds_some(
    tmp_path: Path,
) -> None:
    path = write_large(tmp_path / "run")
    view = build_view(path).run
    assert view is not None
    assert len(view.sites) == 1680
    assert len(view.panels) == 60
    worst = [site.site for site in view.sites[:60]]
    assert sorted(view.panels) == sorted(worst)
    view = build_view(path, sites=["layers.79.*", "model.layers.78.k input"]).run
    assert view is not None
    assert len(view.panels) == 60 + 21 + 1
    with pytest.raises(UnclampError, match=r"'layers.99.\*' matches no site"):
        build_view(path, sites=["layers.99.*"])


@pytest.mark.parametrize(
    ("status", "words"),
    [("finished", []), ("interrupted", ["interrupted"]), ("failed", ["failed"])],
)
def test_notes_say_how_the_run_ended(status: str, words: list[str], tmp_path: Path) -> None:
    view = build_view(write_planted(tmp_path / "run", steps=20, status=status))
    assert len(view.notes) == len(words)
    assert all(word in note for word, note in zip(words, view.notes, strict=True))
    assert (view.scenarios[0].arms[0].final_loss is None) == (status != "finished")


def test_a_killed_run_says_when_it_last_wrote(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "run", steps=20, status="running")
    assert "going on" in build_view(path).notes[0]
    hours = time.time() - 3 * 3600
    for part in path.glob("*/*.parquet"):
        os.utime(part, (hours, hours))
    assert "Running or killed: last record 3 h ago." in build_view(path).notes[0]
    assert [ago(s) for s in (5, 600, 7200, 400_000)] == ["5 s ago", "10 min ago", "2 h ago",
                                                         "5 days ago"]  # fmt: skip


def test_missing_rows_and_an_observed_run_are_said(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "run", steps=20, status="failed")
    header = json.loads((path / "run.json").read_text())
    header["observed"] = True
    header["missing"] = "everything since noon, because of a full disk"
    (path / "run.json").write_text(json.dumps(header))
    notes = build_view(path).notes
    assert any("rank 0 could not write everything since noon" in note for note in notes)
    assert OBSERVED in notes


ASSOCIATION: dict[str, Any] = {
    "verdict": "named",
    "sentences": ["Clamping at one site comes before 3 of 4 spikes."],
    "sites": [
        {"site": 0, "fqn": "model.layers.0.down", "role": "input", "lag": 1, "hits": 3,
         "expected_hits": 0.25, "p": 0.002, "loss_change": 1.5, "low": 1.1, "high": 1.9,
         "by": "<odd>"},
        {"fqn": "elsewhere", "role": "weight"},
    ],
}  # fmt: skip


def test_the_association_is_a_table_and_the_caution_is_always_there(
    planted_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_page(build_view(planted_run), tmp_path / "page.html").read_text()
    assert "Did spikes follow clamping?" in text
    assert "2605.26189" in text
    monkeypatch.setattr("unclamp.report.runs.read_association", lambda log, **_: ASSOCIATION)
    text = write_page(build_view(planted_run), tmp_path / "page.html").read_text()
    assert ASSOCIATION["sentences"][0] in text
    assert "+110 % to +190 %" in text
    assert "&lt;odd&gt;" in text
    assert CAUTION in text
    assert "2605.26189" in CAUTION


def test_replays_are_shown_whatever_keys_they_lack(tmp_path: Path) -> None:
    path = write_planted(tmp_path / "run", steps=20)
    full = {
        "reproduced": True, "clamping_share": 0.93, "verdict": "clamping",
        "words": "Un-clamped, the spike is gone.",
        "sites": [{"fqn": "model.layers.0.down", "role": "input", "share": 0.6, "low": 0.5,
                   "high": 0.7}],
        "override": {"toml": '[[override]]\nmatch = "layers.0.down"'},
        "counterfactuals": [{"name": "actual", "losses": {"10": 2.0, "11": 5.0}}],
    }  # fmt: skip
    (path / "explain-11.json").write_text(json.dumps(full))
    (path / "explain-12.json").write_text(
        json.dumps({"verdict": "unclear", "counterfactuals": [3, {"name": "actual"}]})
    )
    (path / "explain-13.json").write_text("[")
    assert [found.name for found in read_explanations(path)] == [
        f"explain-{i}" for i in (11, 12, 13)
    ]
    text = write_page(build_view(path), path / "report.html").read_text()
    assert "Un-clamped, the spike is gone." in text
    assert "50 % to 70 %" in text  # as the paragraph of an explanation writes shares
    assert 'id="replay-0"' in text
    assert "[[override]]" in text
    assert "explain-11.json cannot be read whole" in text
    assert "explain-13.json cannot be read: " in text


def test_a_slow_query_prints_no_progress_into_the_json(planted_run: Path) -> None:
    with RunLog.open(planted_run) as log:
        log.windows()
        assert log.sql("SELECT current_setting('enable_progress_bar') AS on_").to_pylist() == [
            {"on_": False}
        ]


def test_one_log_gives_one_report(planted_run: Path) -> None:
    assert build_view(planted_run).to_dict() == build_view(planted_run).to_dict()


def test_of_very_many_events_some_are_drawn_and_the_rest_counted(tmp_path: Path) -> None:
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="test")) as writer:
        writer.add("steps", {"step": range(1001), "loss": [2.0] * 1001, "time_s": [0.0] * 1001})
        at = list(range(1001))
        writer.add("events", {"step": at, "kind": ["snapshot"] * 1001, "data": ["{}"] * 1001})
        writer.add("events", {"step": [1000], "kind": ["rewind"], "data": ['{"to": 900}']})
    view = build_view(tmp_path / "run").run
    assert view is not None
    snapshots = [event.step for event in view.events if event.kind == "snapshot"]
    assert snapshots == list(range(0, 1001, 6))
    assert view.events_left_out == {"snapshot": 1001 - len(snapshots)}
    assert [e.text for e in view.events if e.kind == "rewind"] == ["to: 900"]


def test_sites_of_several_ranks_are_one_row_and_their_loss_a_mean(tmp_path: Path) -> None:
    header = Header(unclamp_version="test", world_size=2, run_id="one")
    site = {"site": [0], "fqn": ["a"], "role": ["input"], "format": ["e4m3fn"],
            "scaling": ["delayed"], "format_max": [448.0]}  # fmt: skip
    cast = {"step": [0], "site": [0], "scale": [1.0], "elements": [10], "underflowed": [0],
            "nonfinite": [0], "recast": [0], "microsteps": [1]}  # fmt: skip
    for rank in (0, 1):
        with RunLogWriter(tmp_path / "run", header=header, rank=rank) as writer:
            writer.add("sites", site)
            writer.add("steps", {"step": [0], "loss": [2.0 + rank], "time_s": [0.0]})
            more = {
                "amax": [448.0 * (1 + rank)],
                "saturated": [rank],
                "saturated_error": [rank / 2],
            }
            writer.add("casts", cast | more)
    view = build_view(tmp_path / "run").run
    assert view is not None
    (row,) = view.sites
    assert (row.rows, row.clamped_casts, row.overshoot) == (2, 1, 2.0)
    assert row.clamp_error == 0.5
    assert view.curves["loss"].value == [2.5]
    assert view.panels[0].amax == [896.0]


def test_a_slow_divergence_is_said_drawn_and_in_the_json(tmp_path: Path) -> None:
    """The loss is level for 600 steps and then rises by 0.3 % a step, which is no spike."""
    losses = [2.0 + 0.01 * (i % 7) for i in range(600)] + [2.0 * 1.003**i for i in range(400)]
    path = write_side(tmp_path / "run", losses)
    view = build_view(path)
    assert view.run is not None
    assert view.run.spikes == []
    (drift,) = view.to_dict()["run"]["divergences"]
    assert 590 <= drift["onset"] <= 620
    assert (drift["end"], drift["recovery"]) == (999, None)
    assert drift["rate"] == pytest.approx(0.003, rel=0.1)
    first = view.run.sentences[0]
    assert first.startswith(f"The loss: slow divergence from step {drift['onset']} on, by 0.")
    assert first.endswith("It did not come back.")
    assert view.verdict == [first]
    shapes = run_figure(view.run).layout.shapes
    (band,) = [shape for shape in shapes if shape.name == "slow divergence"]
    assert (band.x0, band.x1) == (drift["onset"] - 0.5, 999.5)
    buffer = io.StringIO()
    print_view(view, Console(file=buffer, width=80))
    assert " ".join(first.split()) in " ".join(buffer.getvalue().split())
    calm = build_view(write_side(tmp_path / "calm", losses[:600])).run
    assert calm is not None
    assert calm.divergences == []
    assert not any("divergence" in sentence for sentence in calm.sentences)


def test_a_negative_verdict_on_the_page_says_from_which_step_it_holds(tmp_path: Path) -> None:
    run = write_planted(tmp_path / "run")
    (run / "explain-150.json").write_text(json.dumps({
        "format": "unclamp explanation", "version": 1, "run": "run", "onset": 150, "last": 152,
        "height": 2.5, "level": 2.0, "snapshot_step": 140, "status": "finished",
        "reproduced": True, "clamping_share": 0.01, "verdict": "not clamping",
    }))  # fmt: skip
    page = write_page(build_view(run), tmp_path / "page.html").read_text()
    assert re.search(r"<b>verdict</b>not clamping from step \d+ on<", page)


def test_clamped_rows_that_are_held_say_the_same_as_those_that_are_read(tmp_path: Path) -> None:
    run = write_planted(tmp_path / "run")
    with RunLog.open(run) as log, RunLog.open(run) as held:
        held.hold_clamped()
        assert cast_prices(held) == cast_prices(log)
        assert clamped_gradients(held) == clamped_gradients(log)
        assert associate(held).to_dict() == associate(log).to_dict()
        count = "SELECT count(*) AS n FROM clamped_casts"
        (rows,) = held.sql(count)["n"].to_pylist()
        saturated = log.casts()["saturated"].to_pylist()
        assert rows == sum(value is None or value > 0 for value in saturated) > 0


def test_clamped_rows_of_a_run_that_goes_on_can_be_held_anew(tmp_path: Path) -> None:
    def casts(step: int, *saturated: int) -> dict[str, list[Any]]:
        numbers = ("site", "underflowed", "nonfinite", "recast", "saturated_error")
        same = {"amax": 1.0, "scale": 1.0, "elements": 8, "microsteps": 1}
        rows = dict.fromkeys(numbers, 0) | same
        return {name: [value] * len(saturated) for name, value in rows.items()} | {
            "step": [step + i for i in range(len(saturated))],
            "saturated": list(saturated),
        }

    count = "SELECT count(*) AS n FROM clamped_casts"
    with RunLogWriter(tmp_path / "run", header=Header(unclamp_version="test")) as writer:
        writer.add("casts", casts(0, 3, 0))
        writer.flush()
        with RunLog.open(tmp_path / "run") as log:
            log.hold_clamped()
            assert log.sql(count)["n"].to_pylist() == [1]
            writer.add("casts", casts(2, 4, 5))
            writer.flush()
            assert log.sql(count)["n"].to_pylist() == [1]
            log.hold_clamped()
            assert log.sql(count)["n"].to_pylist() == [3]
