"""What an answer costs, and which answer stays: a smaller budget never takes the place of more."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from truths.trainings import SPIKE, Case, counting_steps, explain, record
from unclamp.analysis.explanation import Explanation
from unclamp.explain import Limits, explain_spike
from unclamp.explain.text import print_explanation

SERIES = Case(paths=((3.0, 1.0),))
WRITTEN = f"explain-{SPIKE}.json"


def written(run: Path) -> Explanation:
    return Explanation.from_dict(json.loads((run / WRITTEN).read_text()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose spike was explained whole."""
    run = tmp_path_factory.mktemp("finished") / "run"
    record(SERIES, run)
    explain(SERIES, run, replays=60)
    return run


def test_a_smaller_budget_shows_the_answer_from_before_and_what_it_cost(finished: Path) -> None:
    before = written(finished)
    assert before.override is not None
    with counting_steps() as done:
        small = explain(SERIES, finished, replays=9)
    assert done == [0]
    assert written(finished) == before
    assert (small.named, small.sites, small.replays) == (before.named, before.sites, before.replays)
    assert f"which cost {before.replays} replays, more than the 9 asked for now." in small.words()
    within = explain(SERIES, finished, replays=before.replays)
    assert within == before


def test_the_same_budget_again_replays_only_what_nothing_changed(finished: Path) -> None:
    """The plain replay says that answers from before are of use, and screening is one of them."""
    before = written(finished)
    with counting_steps() as done:
        again = explain(SERIES, finished, replays=60)
    assert done == [before.last - before.snapshot_step + 1]
    assert again.to_dict() == before.to_dict() | {
        "replay_s": again.replay_s,
        "step_s": again.step_s,
    }


def test_steps_are_told_beside_replays(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished.parent / "copied"
    record(SERIES, run)
    with counting_steps() as done:
        found = explain(SERIES, run, replays=60)
    assert found.steps == done[0]
    print_explanation(found, Console(width=200))
    said = f"{found.replays} replays of at most 60 with {found.steps} steps in all, "
    assert said in capsys.readouterr().out


def test_an_answer_is_the_same_under_a_budget_whatever_was_asked_before(tmp_path: Path) -> None:
    """What another question replayed costs nothing, and counts for the budget where it is used."""
    for name in ("one", "two"):
        record(SERIES, tmp_path / name)
    explain(SERIES, tmp_path / "one", replays=60)
    with counting_steps() as done:
        after = explain(SERIES, tmp_path / "one", group="layer", replays=8)
    at_once = explain(SERIES, tmp_path / "two", group="layer", replays=8)
    assert after.replays == at_once.replays <= 8
    assert done[0] < at_once.steps
    assert [(s.name, s.share) for s in after.sites] == [(s.name, s.share) for s in at_once.sites]
    assert after.notes == at_once.notes


def test_another_question_takes_the_place_of_an_answer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record(SERIES, run)
    first = explain(SERIES, run, replays=60)
    by_layer = explain(SERIES, run, replays=8, group="layer")
    assert written(run) == by_layer
    record(SERIES, tmp_path / "other")
    (run / WRITTEN).write_text(json.dumps(first.to_dict() | {"identity": "of another run"}))
    small = explain(SERIES, run, replays=8)
    assert written(run) == small
    assert small.replays <= 8


def test_an_interrupted_larger_budget_leaves_the_answer_from_before(tmp_path: Path) -> None:
    run = tmp_path / "run"
    record(SERIES, run)
    before = explain(SERIES, run, replays=9)
    (cache,) = (run / "explain-cache").glob("*.json")
    cache.unlink()

    def stop(found: Explanation) -> None:
        if found.replays == 5 and found.status == "running":
            raise KeyboardInterrupt

    functions: dict[str, Any] = {"build": partial(SERIES.build), "step": SERIES.step}
    found = explain_spike(run, **functions, limits=Limits(replays=60), on_progress=stop)
    assert found.status == "interrupted"
    assert found.replays == before.replays
    assert written(run) == before
    whole = explain(SERIES, run, replays=60)
    assert written(run) == whole
    assert whole.named == SERIES.culprits
