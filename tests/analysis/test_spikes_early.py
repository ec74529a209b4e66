"""Early noise is forgotten, and consecutive steps are evidence together."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.signal import lfilter

from truths.curves import HELD_OUT, early
from unclamp.analysis import Spike, SpikeDetector, find_spikes
from unclamp.analysis.spikes import rise_at
from unclamp.errors import AnalysisError
from unclamp.explain.watch import SpikeWatch


def noisy_batch(*, spike: bool) -> np.ndarray:
    """300 steps from about 4 to 2.5 with 4 % noise; step 18 is 4.03 between 3.05.

    With a spike steps 200 to 219 stay above 3.2, with a peak of 5.5.
    """
    at = np.arange(300)
    loss = 2.5 + 1.5 * np.exp(-at / 18)
    loss *= np.exp(0.04 * np.random.default_rng(3).standard_normal(300))
    loss[17:20] = 3.05, 4.03, 3.05
    if spike:
        loss[200:220] = np.concatenate([np.linspace(3.25, 5.5, 8), np.linspace(5.2, 3.25, 12)])
    return loss


def test_one_noisy_batch_among_the_first_does_not_hide_a_plain_spike() -> None:
    (spike,) = find_spikes(noisy_batch(spike=True))
    assert 200 <= spike.onset <= 202
    assert 217 <= spike.end <= 219
    assert spike.peak == 207
    assert spike.height == pytest.approx(5.5 / 2.5, rel=0.08)
    assert find_spikes(noisy_batch(spike=False)) == []


@pytest.mark.parametrize("kind", ["outlier", "outliers", "cliff", "noisy start", "shift"])
def test_what_the_first_steps_did_hides_no_later_spike(kind: str) -> None:
    """160 curves of 400 steps; what was found before was 0.43 to 0.97 of them."""
    found = 0
    for seed in range(HELD_OUT, HELD_OUT + 40):
        curve, onset = early(seed, kind=kind, height=1.6, length=20)
        found += any(s.onset <= onset + 19 and s.end >= onset for s in find_spikes(curve))
    assert found >= 38


def test_rare_steps_that_are_mildly_raised_hide_only_single_ones() -> None:
    """Every 20th step is 1.2 times the level; single ones may be of them, 20 in a row are not."""
    loss = 2.0 * np.exp(0.03 * np.random.default_rng(0).standard_normal(600))
    loss[::20] *= 1.2
    single = loss.copy()
    single[407] *= 1.3
    assert find_spikes(single) == []
    loss[400:420] *= 1.3
    assert [(s.onset, s.end) for s in find_spikes(loss)] == [(400, 419)]


def test_a_rise_that_several_steps_prove_begins_at_the_first() -> None:
    """What is told at a step depends on no later one; the onset may lie some steps back."""
    loss, online, detector = late_proof(), [], SpikeDetector()
    for i, value in enumerate(loss.tolist()):
        detector.update(value)
        online.append((detector.spike, i - detector.length + 1))
    (spike,) = (s for s in find_spikes(loss) if s.onset >= 250)
    told = next(i for i, (number, _) in enumerate(online) if number >= 0 and i >= 250)
    assert told > spike.onset
    assert online[told][1] == spike.onset
    early_answer = [s.onset for s in find_spikes(loss[: told + 1]) if s.onset >= 250]
    assert early_answer == [spike.onset]
    assert not [s for s in find_spikes(loss[:told]) if s.onset >= 250]


def late_proof() -> np.ndarray:
    """Noise with heavy tails that raise the limit for single steps, and a rise of ten steps."""
    noise = np.random.default_rng(5).standard_t(3, 400)
    loss = 2.0 * np.exp(0.03 * np.clip(noise, -6, 6))
    loss[250:260] = 2.0 * 1.33
    return loss


def test_the_watch_in_a_training_says_the_onset_that_the_list_says() -> None:
    loss = late_proof()
    watch = SpikeWatch()
    heard = [
        onset
        for n, value in enumerate(loss.tolist())
        if (onset := watch.hear(n, value)) is not None
    ]
    assert heard == [spike.onset for spike in find_spikes(loss)]
    for onset in heard:
        assert watch.spike_at(onset).onset == onset
    broken = SpikeWatch()
    loss[255] = math.nan
    assert [n for n, value in enumerate(loss.tolist()) if broken.hear(n, value) is not None]


def test_the_watch_counts_back_over_losses_that_are_not_finite() -> None:
    loss = late_proof()
    told = next(n for n in range(250, 260) if _heard(loss, n) is not None)
    assert told > 250
    loss = np.insert(loss, told, math.nan)
    watch = SpikeWatch()
    onsets = [onset for n, v in enumerate(loss.tolist()) if (onset := watch.hear(n, v)) is not None]
    assert 250 in onsets or told in onsets
    for onset in onsets:
        assert watch.spike_at(onset).onset <= onset


def _heard(loss: np.ndarray, at: int) -> int | None:
    watch = SpikeWatch()
    return [watch.hear(n, value) for n, value in enumerate(loss[: at + 1].tolist())][-1]


@pytest.mark.parametrize(
    ("values", "at", "end", "peak", "recovery", "height"),
    [
        ([2, 2, 3, 4, 2, 2], 12, 13, 13, 14, 2.0),
        ([2, 2, 3, 4, 3, 3], 12, 15, 13, None, 2.0),
        ([2, 2, 3, math.nan, 3, 1], 12, 14, 13, 15, math.inf),
        ([2, 2, 1, 4, 2, 2], 12, 12, 12, 14, 0.5),
        ([2, 2, None, 4, 2, 2], 13, 13, 13, 14, 2.0),
    ],
)
def test_any_step_is_a_rise_as_long_as_it_is_above(
    values: Sequence[float | None], at: int, end: int, peak: int, recovery: int, height: float
) -> None:
    found = rise_at(values, steps=range(10, 16), at=at, level=2.0)
    assert (found.onset, found.end, found.peak, found.recovery) == (at, end, peak, recovery)
    assert (found.height, found.level, found.number) == (height, 2.0, None)
    assert isinstance(found, Spike)


def test_a_step_without_a_loss_is_said() -> None:
    with pytest.raises(AnalysisError, match="no loss of step 9; it has those of 0 to 1"):
        rise_at([1.0, 2.0], steps=[0, 1], at=9, level=1.0)
    with pytest.raises(AnalysisError, match=r"no loss of step 0$"):
        rise_at([None], steps=[0], at=0, level=1.0)


def test_a_run_of_steps_is_one_event_where_a_loss_was_smoothed() -> None:
    """One outlier of the noise raises several steps of its average: 7 alarms in 10,000 steps."""
    alarms = 0
    for seed in range(12):
        noise = 0.15 * np.random.default_rng(seed).standard_t(3, 1500)
        curve = (2 + 3 * (1 + np.arange(1500) / 30) ** -0.7) * np.exp(noise)
        smoothed = lfilter([0.3], [1, -0.7], curve, zi=[0.7 * curve[0]])[0]
        alarms += len(find_spikes(smoothed))
    assert alarms <= 18
