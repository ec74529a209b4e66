"""What an association says: of observed runs, of sites that it clears, and where it cannot tell."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from test_cli_associate import write_run
from truths.arrays import Planted, plant, plant_culprit
from truths.runs import write_planted
from unclamp.analysis import Association, associate
from unclamp.analysis.association import CLEARED, associate_series
from unclamp.analysis.sentences import change_in_words
from unclamp.errors import AnalysisError
from unclamp.runlog import RunLog


def ask(run: Planted, spikes: list[tuple[int, int]], *, is_observed: bool = False) -> Association:
    return associate_series(
        run.clamping(), run.loss, spikes=spikes, names=run.names, is_observed=is_observed
    )


def short_run(onsets: tuple[int, ...], *, errors: tuple[int, ...]) -> Planted:
    """Return 90 steps in which the first of nine sites alone clamps, at the steps `errors`."""
    run = plant(0, sites=9, steps=90, spikes=1)
    run.errors[:] = 0
    run.errors[0, list(errors)] = 0.1
    run.loss[list(onsets)] *= 2
    return run


def test_clamping_that_was_only_observed_is_never_blamed() -> None:
    run = plant(3, sites=60, steps=2000)
    plant_culprit(run, 6, seed=3)
    found = ask(run, run.spikes, is_observed=True)
    assert (found.verdict, found.is_observed) == ("named", True)
    assert found.sentences[0].startswith("Nothing was cast in this training: FP8 was only observed")
    text = " ".join(found.sentences)
    for words in ("Evidence", "replay", "Harmless", "cause", "can also do harm"):
        assert words not in text
    assert "would have clamped before" in text
    run.errors[:] = 0
    silent = ask(run, run.spikes, is_observed=True).sentences
    assert silent[1].startswith("FP8 would have clamped nothing at any")


def test_an_observed_run_is_known_by_its_header(tmp_path: Path) -> None:
    for observed in (True, False):
        path = write_planted(tmp_path / str(observed), observed=observed)
        with RunLog.open(path) as log:
            found = associate(log)
        assert found.is_observed == observed
        assert ("Nothing was cast" in found.sentences[0]) == observed


def test_only_sites_with_a_small_worst_bound_are_called_harmless() -> None:
    run = plant(11, sites=60, steps=2000)
    run.errors[4] = 0.01 * (np.random.default_rng(0).random(2000) < 0.4)
    found = ask(run, run.spikes)
    cleared = [site for site in found.sites if site.cleared]
    assert cleared
    assert all(s.bound is not None and s.bound <= CLEARED and s.by is None for s in cleared)
    assert all(s.hits < found.spikes for s in cleared)
    worst = max(cleared, key=lambda site: site.bound or 0)
    harmless = next(s for s in found.sentences if s.startswith("Harmless"))
    assert "such bounds hold for all cleared sites at once in 95 % of runs." in harmless
    assert f"{worst.fqn} {worst.role}" in harmless
    assert change_in_words(worst.bound or 0, is_relative=True) in harmless
    assert "other" not in harmless
    left = [site for site in found.sites if not site.cleared]
    said = next(s for s in found.sentences if "neither named nor cleared" in s)
    assert said.startswith(f"{len(left)} site")
    assert f"{left[0].fqn} {left[0].role}" in said


def test_a_site_before_every_spike_is_not_harmless() -> None:
    run = plant(11, sites=60, steps=2000)
    run.errors[4] = 0.01
    found = ask(run, run.spikes)
    site = next(site for site in found.sites if site.site == 4)
    assert site.hits == found.spikes
    assert not site.cleared


@pytest.mark.parametrize("onsets", [(40, 60, 80), (44, 83)])
def test_few_spikes_with_clamping_before_each_cannot_be_told(onsets: tuple[int, ...]) -> None:
    run = short_run(onsets, errors=(10, *onsets))
    found = ask(run, [(onset, onset) for onset in onsets])
    assert found.verdict == "cannot tell"
    assert found.sites[0].hits == len(onsets)
    assert "No evidence" not in " ".join(found.sentences)
    assert not any(s.startswith("Harmless") for s in found.sentences)


def test_few_spikes_and_sites_that_the_loss_clears_are_no_evidence() -> None:
    run = plant(11, sites=3, steps=2000)
    run.errors[:] = 0
    run.errors[1] = 0.01 * (np.random.default_rng(0).random(2000) < 0.2)
    run.errors[1, run.onsets[0] - 9 : run.onsets[0] + 1] = 0
    found = ask(run, run.spikes[:2])
    assert found.spikes_needed is None
    assert [site.cleared for site in found.sites] == [True]
    assert found.verdict == "none"


def test_lags_longer_than_the_run_allows_are_refused() -> None:
    run = short_run((44,), errors=(10, 44, 60))
    for lag in (10, 100):
        with pytest.raises(AnalysisError, match="at most 9 in a run of 90 steps"):
            associate_series(run.clamping(), run.loss, spikes=[], names=run.names, max_lag=lag)
    tiny = plant(0, sites=3, steps=90, spikes=1)
    tiny = replace(tiny, loss=tiny.loss[:4], errors=tiny.errors[:, :4] + 0.1)
    assert ask(tiny, [(3, 3)]).verdict == "cannot tell"


def test_a_run_without_its_sites_is_a_sentence(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    shutil.rmtree(path / "sites")
    with RunLog.open(path) as log, pytest.raises(AnalysisError, match="folder `sites` is missing"):
        associate(log)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.2, "+120 %"),
        (0.0123, "+1.23 %"),
        (-0.5, "-50.0 %"),
        (0.0, "0 %"),
        (1e-9, "0 %"),
        (9.99, "+999 %"),
        (10.0, "11 times"),
        (12344.0, "12,345 times"),
    ],
)
def test_changes_have_no_exponents(value: float, words: str) -> None:
    assert change_in_words(value, is_relative=True) == words
