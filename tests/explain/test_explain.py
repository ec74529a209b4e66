"""Who caused a spike: planted truth, words, budgets, caches, the command, and going back."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import unclamp
from ctrl_c import with_ctrl_c
from patience import PATIENCE_S
from truths.trainings import SPIKE, STEPS, Case, counting_steps, explain, record
from unclamp.errors import ReplayError, UnclampWarning
from unclamp.explain import Explanation, Limits, Snapshots, explain_spike
from unclamp.explain.text import print_explanation
from unclamp.names import SiteName
from unclamp.recipe import Recipe
from unclamp.runlog import RunLog

SERIES = Case(paths=((3.0, 1.0),), decoys=2)
PARALLEL = Case(paths=((1.0,), (1.0,)), parts=(1.0, 0.7), decoys=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        SERIES,
        PARALLEL,
        Case(paths=((1.0, 1.0), (1.0,))),
        Case(scaling=unclamp.Static(scale=20.0)),
    ],
)
def test_the_planted_set_is_named(case: Case, tmp_path: Path) -> None:
    record(case, tmp_path / "run")
    found = explain(case, tmp_path / "run")
    assert found.reproduced
    assert found.verdict == "clamping"
    assert found.named == case.culprits
    assert found.clamping_share == pytest.approx(1.0, abs=0.05)
    whole = sum(site.share for site in found.sites if site.named) + found.rest_share
    assert whole == pytest.approx(found.clamping_share, abs=0.03)


def test_clamps_in_series_show_in_one_direction_only(tmp_path: Path) -> None:
    record(SERIES, tmp_path / "run")
    found = explain(SERIES, tmp_path / "run")
    first, second = sorted((s for s in found.sites if s.named), key=lambda s: s.fqn)
    assert first.only is not None
    assert second.only is not None
    assert second.last is not None
    assert first.only + second.only < 0.3  # one at a time recovers next to nothing
    assert second.last > 0.9
    assert first.share + second.share > 0.95


def test_gradients_that_clamp_at_the_spike_are_not_its_cause(tmp_path: Path) -> None:
    record(PARALLEL, tmp_path / "run")
    found = explain(PARALLEL, tmp_path / "run")
    gradients = [site for site in found.sites if site.role == "grad_output"]
    assert any(site.overshoot > 3 for site in gradients)
    assert all(abs(site.share) < 0.01 for site in gradients)


@pytest.mark.parametrize("other", ["bad batch", "learning rate"])
def test_another_cause_is_not_blamed_on_clamping(other: str, tmp_path: Path) -> None:
    case = Case(other=other, paths=((0.0,), (0.0,)), decoys=2)
    record(case, tmp_path / "run")
    found = explain(case, tmp_path / "run")
    assert found.verdict == "not clamping"
    assert found.named == []
    assert found.override is None
    assert found.clamped_sites >= 4
    assert set(found.others) == {"blocks", "high_precision"}
    assert "clamping is not the cause" in found.words()
    assert "most of it is not FP8 at all" in found.words()


def test_the_override_mends_the_run_it_was_made_for(tmp_path: Path) -> None:
    record(SERIES, tmp_path / "run")
    found = explain(SERIES, tmp_path / "run")
    assert found.override is not None
    assert found.override.scaling == "dynamic"
    assert found.override.removed == pytest.approx(1.0, abs=0.02)
    pasted = Recipe.from_toml(SERIES.recipe.to_toml() + "\n" + found.override.toml)
    assert found.override.python is not None
    names: dict[str, Any] = {"recipe": SERIES.recipe, "unclamp": unclamp}
    exec(found.override.python, names)
    assert pasted == names["recipe"]
    training = SERIES.build(pasted)
    losses = [SERIES.step(training, batch).item() for batch in SERIES.batches()]
    assert losses[SPIKE] < 1.2


def test_what_is_written_is_what_is_returned(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run")
    seen: list[Explanation] = []
    found = explain_spike(
        tmp_path / "run", build=partial(Case().build), step=Case().step, on_progress=seen.append
    )
    written = json.loads((tmp_path / "run" / f"explain-{SPIKE}.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert [s.replays for s in seen] == sorted(s.replays for s in seen)
    assert [s.status for s in seen][-2:] == ["running", "finished"]
    names = [one["name"] for one in written["counterfactuals"]]
    assert names[0] == "actual"
    assert all(str(SPIKE) in one["losses"] for one in written["counterfactuals"])
    assert {"reproduced", "clamping_share", "verdict", "sites", "override"} <= set(written)
    assert {"fqn", "role", "share", "low", "high"} <= set(written["sites"][0])


def test_a_larger_budget_goes_on_and_gives_what_it_would_have_given_at_once(
    tmp_path: Path,
) -> None:
    case = Case(paths=((3.0, 1.0),))
    for name in ("one", "two"):
        record(case, tmp_path / name)
    small = explain(case, tmp_path / "one", replays=9)
    assert small.replays <= 9
    assert any("budget of 9 replays is spent" in note for note in small.notes)
    with counting_steps() as done:
        larger = explain(case, tmp_path / "one", replays=60)
    again = small.steps // small.replays  # of the plain replay, which says whether others hold
    assert done[0] == larger.steps - small.steps + again
    at_once = explain(case, tmp_path / "two", replays=60)
    assert [(s.name, s.share) for s in larger.sites] == [(s.name, s.share) for s in at_once.sites]
    assert larger.named == at_once.named == case.culprits


def test_answers_that_the_version_before_kept_are_used(tmp_path: Path) -> None:
    """It kept them by the name of their question."""
    case, run = Case(), tmp_path / "run"
    record(case, run)
    first = explain(case, run)
    (cache,) = (run / "explain-cache").glob("*.json")
    kept = json.loads(cache.read_text())["answers"]
    before = {one["question"]["name"]: one for one in kept}
    assert "unclamped: paths.0.1 input" in before
    cache.write_text(json.dumps({"answers": before}))
    with counting_steps() as done:
        again = explain(case, run)
    assert done == [2 * first.steps // first.replays]  # plain, and screening, which it did not keep
    assert again.sites == first.sites


@pytest.mark.slow
def test_sampling_stays_within_the_budget_and_near_the_truth(tmp_path: Path) -> None:
    case = Case(paths=((1.0, 1.0), (1.0, 1.0), (1.0,)), decoys=2)
    record(case, tmp_path / "run")
    exact = explain(case, tmp_path / "run", replays=150)
    (tmp_path / "run" / "explain-cache").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / f"explain-{SPIKE}.json").unlink()
    sampled = explain(case, tmp_path / "run", replays=60)
    assert sampled.replays <= 60
    truth = {site.name: site.share for site in exact.sites if site.named}
    assert len(truth) == 5
    for site in sampled.sites:
        if site.name in truth:
            assert site.how == "shapley"
            assert site.low - 0.03 <= truth[site.name] <= site.high + 0.03
            assert site.share == pytest.approx(truth[site.name], abs=0.08)
    assert sampled.named == exact.named == case.culprits


def test_sites_can_be_grouped(tmp_path: Path) -> None:
    record(PARALLEL, tmp_path / "run")
    found = explain(PARALLEL, tmp_path / "run", group="layer")
    named = {site.fqn for site in found.sites if site.named}
    assert named == {"paths.0.*", "paths.1.*"}
    by_role = explain(PARALLEL, tmp_path / "run", group="role")
    assert [(s.fqn, s.role) for s in by_role.sites if s.named] == [("*", "input")]
    assert by_role.sites[0].share == pytest.approx(1.0, abs=0.05)


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ReplayError, match="4 replays or more, got 3"):
        Limits(replays=3)
    with pytest.raises(ReplayError, match="did you mean 'layer'"):
        Limits(group="layers")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReplayError, match="1 leading site"):
        Limits(leading=0)


def test_few_leading_sites_are_made_more_until_they_do_what_all_do(tmp_path: Path) -> None:
    case = Case(paths=((1.0,), (1.0,), (1.0,)), decoys=3)
    record(case, tmp_path / "run")
    found = explain(case, tmp_path / "run", leading=2)
    assert found.named == case.culprits


# ---- in a training loop ----------------------------------------------------------------------


def rewound(case: Case, run: Path, **settings: Any) -> tuple[list[tuple[int, float]], list[Any]]:
    training = case.build()
    done: list[tuple[int, float]] = []
    with (
        unclamp.Recorder(training.model, run) as recorder,
        Snapshots(
            training,
            run,
            build=partial(case.build),
            step=case.step,
            every=5,
            keep=3,
            after=1,
            on_spike="explain",
            recorder=recorder,
            **settings,
        ) as snapshots,
    ):
        for n, batch in snapshots.follow(case.batches()):
            loss = case.step(training, batch)
            recorder.step(n, loss=loss)
            snapshots.after(n, loss)
            done.append((n, loss.item()))
    with RunLog.open(run) as log:
        return done, log.events().to_pylist()


def test_a_training_goes_back_and_goes_on_mended(tmp_path: Path) -> None:
    case = Case()
    done, events = rewound(case, tmp_path / "run")
    steps = [n for n, _ in done]
    assert steps == [*range(SPIKE + 2), *range(30, STEPS)]
    first, second = (loss for n, loss in done if n == SPIKE)
    assert first > 3
    assert second < 1.3
    # Until the spike the mended steps are those of before: the scale is another, little else.
    assert done[SPIKE + 2][1] == pytest.approx(done[30][1], rel=0.02)
    kinds = [event["kind"] for event in sorted(events, key=lambda e: e["step"])]
    assert sorted(kinds) == ["explain", "rewind", "snapshot", "spike", "switch"]
    (rewind,) = (json.loads(e["data"]) for e in events if e["kind"] == "rewind")
    assert rewind["to"] == 30
    assert [SiteName.from_dict(site) for site in rewind["sites"]] == case.culprits


def test_a_spike_of_another_cause_changes_nothing(tmp_path: Path) -> None:
    case = Case(other="bad batch", paths=((0.0,),), dropout=0.1)
    done, events = rewound(case, tmp_path / "run")
    plain = record(case, tmp_path / "plain")
    assert [loss for _, loss in done] == plain
    assert "rewind" not in {event["kind"] for event in events}
    (told,) = (json.loads(e["data"]) for e in events if e["kind"] == "explain")
    assert told["verdict"] == "not clamping"


def test_a_run_goes_back_only_so_often(tmp_path: Path) -> None:
    done, events = rewound(Case(), tmp_path / "run", max_rewinds=0)
    assert len(done) == STEPS
    assert {event["kind"] for event in events} == {"explain", "snapshot", "spike"}


def test_what_cannot_be_explained_does_not_end_a_training(tmp_path: Path) -> None:
    case, training = Case(), Case().build()
    other = Case(paths=((1.0, 1.0),))
    snapshots = Snapshots(
        training,
        tmp_path,
        build=partial(other.build),
        step=case.step,
        every=5,
        after=1,
        on_spike="explain",
    )
    done: list[int] = []

    def train() -> None:
        for n, batch in snapshots.follow(case.batches()):
            snapshots.after(n, case.step(training, batch))
            done.append(n)

    with pytest.warns(UnclampWarning, match="not explained: expected the build"):
        train()
    snapshots.close()
    assert done == list(range(STEPS))


def test_explaining_in_place_needs_functions() -> None:
    with pytest.raises(ReplayError, match="needs the build and step functions"):
        Snapshots(Case().build(), "unused", on_spike="explain")


# ---- the command -----------------------------------------------------------------------------

BUILD, STEP = "truths.trainings:default_build", "truths.trainings:step"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "unclamp", "explain", *map(str, arguments)]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment()
    )


def environment() -> dict[str, str]:
    """Return one in which another process finds the planted cases."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_the_command_explains(tmp_path: Path) -> None:
    record(Case(), tmp_path / "run")
    done = command(tmp_path / "run", "--build", BUILD, "--step", STEP, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "clamping"
    assert found["override"]["sites"] == [{"fqn": "paths.0.1", "role": "input"}]


def test_what_is_printed_fits_80_columns(tmp_path: Path) -> None:
    record(SERIES, tmp_path / "run")
    out = io.StringIO()
    print_explanation(explain(SERIES, tmp_path / "run"), Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "[[override]]" in out.getvalue()
    assert out.getvalue().count("paths.0.1 input") == 2


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = command(tmp_path / "none")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_an_interrupted_command_leaves_the_answer_so_far_and_goes_on(tmp_path: Path) -> None:
    case = Case(paths=((1.0, 1.0), (1.0, 1.0), (1.0,)), decoys=4)
    record(case, tmp_path / "run")
    module = "truths.trainings:many_build"
    line = [sys.executable, "-m", "unclamp", "explain", str(tmp_path / "run"), "--json"]
    process = subprocess.Popen(
        [*line, "--build", module, "--step", STEP],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=with_ctrl_c,
    )
    path = tmp_path / "run" / f"explain-{SPIKE}.json"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if path.exists() and json.loads(path.read_text())["replays"] > 10:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, stderr = process.communicate(timeout=PATIENCE_S)
    assert b"Traceback" not in stderr
    assert process.returncode == 130
    assert json.loads(out)["status"] == json.loads(path.read_text())["status"] == "interrupted"
    again = explain_spike(tmp_path / "run", build=module, step=STEP)
    assert again.status == "finished"
    assert again.named == case.culprits
