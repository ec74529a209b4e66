"""What is recommended: what it removes of the spike, and what it adds at other steps."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import unclamp
from truths.levels import EARLY, ProtectedCase
from truths.trainings import SPIKE, STEPS, explain, losses_with, record
from unclamp.analysis.counterfactual import Change, Override
from unclamp.analysis.explanation import Explanation
from unclamp.explain import Snapshots
from unclamp.explain.findings import Findings
from unclamp.explain.game import Game, Window
from unclamp.explain.noise import Noise
from unclamp.explain.players import group_sites
from unclamp.explain.ranks import ALONE
from unclamp.explain.remedy import recommend
from unclamp.explain.replay import Trace
from unclamp.names import SiteName
from unclamp.recipe import Recipe
from unclamp.runlog import RunLog

WHO = SiteName("a", "input")


@pytest.mark.parametrize(
    ("early", "size"), [(64.0, 128.0), pytest.param(48.0, 96.0, marks=pytest.mark.slow)]
)
def test_what_mends_the_spike_and_ruins_another_step_is_no_remedy(
    early: float, size: float, tmp_path: Path
) -> None:
    case = ProtectedCase(early=early, size=size)
    losses = record(case, tmp_path / "run")
    anew = losses_with(case, case.culprits)
    level = losses[SPIKE - 1]
    removed, added = losses[SPIKE] - anew[SPIKE], anew[EARLY] - losses[EARLY]
    assert anew[SPIKE] < 1.1 * level  # by training anew it mends the spike,
    assert added > removed  # and makes a larger one three steps before
    found = explain(case, tmp_path / "run")
    assert found.verdict == "clamping"
    assert [row.name for row in found.sites if row.named] == [str(site) for site in case.culprits]
    assert found.override is None
    assert (
        f"No change of scaling is recommended: each that was tried at {case.culprits[0]} removes "
        "nothing, or adds as much at other steps."
    ) in found.words()
    assert f"at step {EARLY} the loss is higher" in found.words()


def test_what_a_remedy_adds_is_told_beside_what_it_removes(tmp_path: Path) -> None:
    case = ProtectedCase(early=44.0, size=128.0)
    losses = record(case, tmp_path / "run")
    found = explain(case, tmp_path / "run")
    assert found.override is not None
    pasted = Recipe.from_toml(case.recipe.to_toml() + "\n" + found.override.toml)
    training = case.build(pasted)
    anew = [case.step(training, batch).item() for batch in case.batches()]
    rise = losses[SPIKE] - losses[SPIKE - 1]
    removed, added = losses[SPIKE] - anew[SPIKE], anew[EARLY] - losses[EARLY]
    assert found.override.removed == pytest.approx(removed / rise, abs=0.03)
    assert found.override.added == pytest.approx(added / rise, abs=0.03)
    assert 0.1 < found.override.added < 0.5
    assert f"and adds {100 * found.override.added:.0f} % as much at other steps." in found.words()
    assert Override.from_dict(found.override.to_dict()) == found.override
    assert Explanation.from_dict(found.to_dict()) == found
    older = {key: value for key, value in found.override.to_dict().items() if key != "added"}
    assert Override.from_dict(older) == replace(found.override, added=0.0)


@pytest.mark.parametrize(("early", "goes_back"), [(30.0, True), (44.0, True), (58.0, False)])
def test_a_training_goes_back_only_where_that_does_more_good_than_harm(
    early: float, goes_back: bool, tmp_path: Path
) -> None:
    case = ProtectedCase(early=early, size=128.0)
    losses, anew = losses_with(case, []), losses_with(case, case.culprits)
    removed, added = losses[SPIKE] - anew[SPIKE], anew[EARLY] - losses[EARLY]
    rise = losses[SPIKE] - losses[SPIKE - 1]
    assert ((removed - added) / rise > 0.5) is goes_back  # by training anew
    training, run, done = case.build(), tmp_path / "run", 0
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
        ) as snapshots,
    ):
        for n, batch in snapshots.follow(case.batches()):
            loss = case.step(training, batch)
            recorder.step(n, loss=loss)
            snapshots.after(n, loss)
            done += 1
    with RunLog.open(run) as log:
        events = log.events().to_pylist()
    # The other step may be a spike of its own afterwards.
    at_spike = [event for event in events if event["step"] == SPIKE]
    (told,) = (json.loads(e["data"]) for e in at_spike if e["kind"] == "explain")
    assert told["verdict"] == "clamping"
    assert ("rewind" in {event["kind"] for event in at_spike}) is goes_back
    assert (done > STEPS) is goes_back


# ---- planted answers -------------------------------------------------------------------------


def recommended(
    kind: Change, answers: dict[str, list[float]], folder: Path, *, only: tuple[int, ...] = ()
) -> Explanation:
    """Recommend for one site, the loss of steps 0 to 4 being 1, 1, 1, 5, 5 as it was.

    Args:
        kind: How the site was mended to find it.
        answers: Losses of these steps, by the scaling of the site.
        folder: For the answers.
        only: Which steps of the spike count, if not both.
    """

    def trace(losses: list[float]) -> Trace:
        return Trace(
            losses=dict(enumerate(losses)), sites={}, underflowed=0, elements=1, seconds=0.0
        )

    def run(changes: dict[SiteName, Any], *, last: int) -> Trace:
        (scaling,) = changes.values()
        granularity = getattr(scaling, "granularity", None)
        is_blocks = type(granularity).__name__ == "PerBlock"
        return trace(answers["blocks" if is_blocks else type(scaling).__name__.lower()])

    replay: Any = SimpleNamespace(
        original=lambda site: unclamp.Delayed(), run=run, sites={WHO: None}, ranks=ALONE
    )
    game = Game(
        replay, Window(first=3, last=4, level=1.0), budget=20, cache=folder / "answers.json"
    )
    game.begin(trace([1.0, 1.0, 1.0, 5.0, 5.0]))
    if only:
        game.narrow(only, game.ask("blocks", [WHO]))
    found = Explanation(
        run="run",
        onset=3,
        last=4,
        height=5.0,
        level=1.0,
        snapshot_step=0,
        others={},
        underflowed={},
    )
    findings = Findings(found, path=folder / "found.json", on_progress=lambda found: None)
    findings.game = game
    findings.games[game] = 5
    recommend(
        game,
        findings,
        kind,
        group_sites([WHO], "site"),
        whole=game.removed(kind, [WHO]),
        noise=Noise(moved=(0.0, 0.0)),
        recipe=None,
    )
    return findings.found


@pytest.mark.parametrize(
    ("dynamic", "guarded", "scaling", "removed", "added"),
    [
        # Both steps of the spike rise by 4, so that 8 are the whole.
        ([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0], "dynamic", 1.0, 0.0),
        ([1.0, 9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0], "guarded", 1.0, 0.0),
        ([1.0, 3.0, 3.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0, 2.0], "guarded", 0.75, 0.0),
        ([1.0, 3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 4.0, 4.0], "dynamic", 1.0, 0.25),
        ([1.0, 0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 4.0, 4.0], "dynamic", 1.0, 0.0),
    ],
)
def test_the_scaling_that_leaves_least_is_chosen_harm_at_other_steps_included(
    dynamic: list[float],
    guarded: list[float],
    scaling: str,
    removed: float,
    added: float,
    tmp_path: Path,
) -> None:
    found = recommended("unclamped", {"dynamic": dynamic, "guarded": guarded}, tmp_path)
    assert found.override is not None
    assert found.override.scaling == scaling
    assert found.override.removed == pytest.approx(removed)
    assert found.override.added == pytest.approx(added)


def test_the_note_says_what_a_share_is_of(tmp_path: Path) -> None:
    """Of step 4 alone three quarters go in blocks, and of the spike less."""
    blocks = [1.0, 1.0, 1.0, 5.0, 2.0]
    answers = {"blocks": blocks, "delayed": blocks, "dynamic": blocks, "guarded": blocks}
    found = recommended("blocks", answers, tmp_path, only=(4,))
    (note,) = (note for note in found.notes if note.startswith("As "))
    assert note.startswith("As 75 % of the rise of these steps goes in blocks, the set is the")
