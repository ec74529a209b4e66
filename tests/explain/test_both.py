"""Clamping and underflow as causes of one spike: both shares and one remedy, by training anew."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from truths.both import BothCase
from truths.trainings import explain, record
from truths.underflows import HISTORY, OUTLIER, UnderflowCase, trained
from unclamp.analysis.counterfactual import Underflow
from unclamp.analysis.explanation import Explanation
from unclamp.explain.noise import Noise
from unclamp.explain.underflow import is_too
from unclamp.names import SiteName
from unclamp.recipe import Recipe
from unclamp.scaling import Dynamic, Guarded, PerBlock, Scaling

BLOCKS = Dynamic(granularity=PerBlock(1, 32))
FREE = Guarded(history_len=HISTORY)
EVEN = BothCase()
CLAMPED = BothCase(weight=2.5, decoys=3, seed=5)
SPLIT = BothCase(branches=2, seed=6)
Answers = Callable[[BothCase], tuple[list[float], Explanation]]


def explained(case: UnderflowCase, run: Path) -> tuple[list[float], Explanation]:
    losses = record(case, run, every=4, keep=6, after=8)  # pyright: ignore[reportArgumentType]
    return losses, explain(case, run)  # pyright: ignore[reportArgumentType]


def rise(losses: Sequence[float], found: Explanation) -> float:
    return sum(losses[found.onset : found.last + 1]) - (found.last - found.onset + 1) * found.level


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What `explained` returns of a case, made when first asked for."""
    return cache(lambda case: explained(case, tmp_path_factory.mktemp("both") / "run"))


@pytest.mark.parametrize("case", [EVEN, CLAMPED, pytest.param(SPLIT, marks=pytest.mark.slow)])
def test_of_two_causes_both_are_named_with_their_shares(case: BothCase, answers: Answers) -> None:
    losses, found = answers(case)
    whole = rise(losses, found)

    def gone(changed: dict[SiteName, Scaling]) -> float:  # by training anew
        return 1 - rise(trained(case, changed), found) / whole

    clamping = gone({case.clamping: FREE})
    underflow = gone(dict.fromkeys(case.underflowing, BLOCKS))
    assert min(clamping, underflow) > 0.2
    assert gone({case.clamping: FREE, **dict.fromkeys(case.underflowing, BLOCKS)}) > 0.97
    assert found.verdict == "clamping and underflow"
    assert found.clamping_share == pytest.approx(clamping, abs=0.03)
    assert found.underflow is not None
    assert found.underflow.share is not None
    assert found.underflow.share == pytest.approx(underflow, abs=0.03)
    shares = {SiteName(row.fqn, row.role): row.share for row in found.sites if row.role != "*"}
    assert shares[case.clamping] == pytest.approx(clamping, abs=0.03)
    assert sum(shares[site] for site in case.underflowing) == pytest.approx(underflow, abs=0.03)
    assert set(found.named) == set(case.culprits)
    said = f"clamping ({100 * clamping:.0f} %) and underflow ({100 * found.underflow.share:.0f} %)"
    assert found.stated == said
    assert "underflow is a cause too" in found.words()
    assert Explanation.from_dict(found.to_dict()) == found


@pytest.mark.parametrize("case", [EVEN, CLAMPED])
def test_the_remedy_of_both_removes_what_neither_alone_does(
    case: BothCase, answers: Answers
) -> None:
    losses, found = answers(case)
    assert found.override is not None
    assert found.override.removed is not None
    pasted = Recipe.from_toml(case.recipe.to_toml() + "\n" + found.override.toml)
    training = case.build(pasted)
    anew = [case.step(training, batch).item() for batch in case.batches()]
    removed = 1 - rise(anew, found) / rise(losses, found)
    assert removed > 0.9
    assert found.override.removed == pytest.approx(removed, abs=0.03)
    for site in case.culprits:
        alone = trained(case, {site: BLOCKS})
        assert 1 - rise(alone, found) / rise(losses, found) < 0.8


def test_where_one_is_next_to_nothing_the_other_is_the_cause(tmp_path: Path) -> None:
    """A clamp that the loss hardly reads, beside underflow; and the other way round."""
    for case, verdict in (
        (BothCase(weight=0.1, seed=7), "underflow"),
        (BothCase(weight=2.5, parts=(0.3,), seed=8), "clamping"),
    ):
        losses, found = explained(case, tmp_path / f"run-{verdict}")
        free = trained(case, {case.clamping: FREE})
        clamping = 1 - rise(free, found) / rise(losses, found)
        assert clamping < 0.05 if verdict == "underflow" else clamping > 0.95
        assert found.verdict == verdict
        culprits = case.underflowing if verdict == "underflow" else [case.clamping]
        assert found.named == culprits


@pytest.mark.parametrize(
    ("share", "freed", "gone", "moved", "is_both"),
    [
        (0.4, 0.5, 0.95, 0.0, True),
        (0.05, 0.5, 0.95, 0.0, False),
        (0.4, 0.05, 0.95, 0.0, False),
        # Blocks mend some steps and ruin others.
        (0.4, 0.5, 0.55, 0.0, False),
        # Chaos moves as much.
        (0.4, 0.5, 0.95, 0.42, False),
        (None, 0.5, 0.95, 0.0, False),
    ],
)
def test_both_shares_must_be_more_than_their_tests_need(
    share: float | None, freed: float, gone: float, moved: float, is_both: bool
) -> None:
    found = Underflow(by_step={OUTLIER: 1.0}, elevated=3, removed=1.0, share=share)
    noise = Noise(moved=(moved,) * 19)
    assert is_too(found, freed=freed, gone=gone, noise=noise) == is_both
