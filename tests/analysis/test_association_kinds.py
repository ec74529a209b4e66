"""Association within kinds of batches: what only a kind has in common is no link."""

import numpy as np
import pytest

from truths.kinds import CULPRIT, KindRun, kind_run
from unclamp.analysis.association import Association, associate_series
from unclamp.analysis.kind_shifts import make_kind_shifts
from unclamp.analysis.response import make_response

SEEDS = range(6)


def ask(run: KindRun, *, grouped: bool = True) -> Association:
    return associate_series(
        run.clamping,
        run.loss,
        spikes=run.spikes(grouped=grouped),
        names=run.names,
        groups=run.groups if grouped else (),
    )


def named(found: Association) -> list[int]:
    return [site.site for site in found.sites if site.by]


@pytest.mark.parametrize("regular", [False, True])
def test_clamping_only_in_the_kind_with_the_higher_loss_and_its_spikes_names_nobody(
    regular: bool,
) -> None:
    runs = [kind_run(seed, regular=regular) for seed in SEEDS]
    assert sum(bool(named(ask(run))) for run in runs) <= 1


def test_without_groups_the_same_clamping_is_named() -> None:
    assert all(named(ask(kind_run(seed), grouped=False)) for seed in range(3))


@pytest.mark.parametrize("regular", [False, True])
def test_clamping_that_harms_within_its_kind_is_named_alone(regular: bool) -> None:
    for seed in SEEDS:
        assert named(ask(kind_run(seed, harm=1.1, regular=regular))) == [CULPRIT]


def test_the_answer_says_that_losses_were_compared_within_kinds() -> None:
    run = kind_run(0)
    run.groups[5:9] = ["rare"] * 4
    words = str(ask(run))
    sizes = f"batches without a group: {run.groups.count(None):,}"
    assert "compared with those of its own kind of batch" in words
    assert sizes in words
    assert "Of batches of kind 'rare' there are fewer than 50" in words


def test_the_response_measures_each_loss_against_its_own_kind() -> None:
    run = kind_run(1)
    calm = np.zeros(len(run.loss), dtype=bool)
    response = make_response(run.loss, calm, run.groups)
    assert response is not None
    is_answer = np.array([group == "answers" for group in run.groups])
    for own in (is_answer, ~is_answer):
        assert abs(np.median(response.excess[own])) < 0.01
        assert abs(response.scores[own].mean()) < 1e-9
        alone = make_response(run.loss[own], calm[own])
        assert alone is not None
        assert np.array_equal(response.excess[own], alone.excess)


def test_a_kind_with_too_few_losses_counts_as_expected() -> None:
    rng = np.random.default_rng(0)
    loss = 2 + 0.01 * rng.standard_normal(200)
    groups: list[str | None] = [None] * 200
    for i in (20, 60, 100):
        loss[i], groups[i] = 9.0, "rare"
    response = make_response(loss, np.zeros(200, dtype=bool), groups)
    assert response is not None
    assert np.all(response.excess[[20, 60, 100]] == 0)
    assert np.all(response.scores[[20, 60, 100]] == 0)


def test_shifts_move_steps_among_their_own_kind_and_the_first_moves_nothing() -> None:
    run = kind_run(2)
    groups = np.array([group or "" for group in run.groups])
    answers = np.flatnonzero(groups == "answers")
    onsets = np.sort(np.concatenate([answers[[50, 120, 300]], [1111 + (1111 in answers)]]))
    shifts = make_kind_shifts(onsets, run.clamping.activity(), run.groups, limit=501, seed=0)
    moved = shifts.move(onsets)
    assert np.array_equal(moved[:, 0], onsets)
    assert np.all(groups[moved] == groups[onsets][:, None])
    before = shifts.steps_before()
    steps = np.arange(len(groups))
    assert np.array_equal(before[:, 0], steps)
    assert np.all(groups[before] == groups[:, None])
    assert np.array_equal(shifts.steps_before(slice(8, 40, 4)), before[:, 8:40:4])


def test_one_kind_alone_is_asked_as_without_groups() -> None:
    run = kind_run(3, harm=1.1)
    plain, named_alike = (
        associate_series(
            run.clamping, run.loss, spikes=run.spikes(), names=run.names, groups=groups
        )
        for groups in ((), ["a"] * len(run.loss))
    )
    assert [(s.site, s.p, s.hits, s.by) for s in plain.sites] == [
        (s.site, s.p, s.hits, s.by) for s in named_alike.sites
    ]
