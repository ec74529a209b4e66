"""Published definitions against hand-computed values and against naive code of their sources."""

import math

import numpy as np
import pytest
import torch

from unclamp.analysis import DEFINITIONS, find_spikes, spike_score
from unclamp.analysis.definitions import (
    judge_megatron,
    judge_olmo,
    judge_olmo_core,
    judge_zclip,
    number_runs,
)


def noisy(steps: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed, so that every definition has something to find."""
    return 5 + 0.3 * np.random.default_rng(seed).standard_t(2.5, steps)


def test_olmo_needs_seven_deviations_of_the_1000_values_before() -> None:
    """Alternating 1 and 3: mean 2, variance 1000/999; seven deviations are 7.0035."""
    calm = np.tile([1.0, 3.0], 500)
    limit = 2 + 7 * math.sqrt(1000 / 999)
    for value, count in [(limit + 1e-6, 1), (limit - 1e-6, 0)]:
        series = np.append(calm, value)
        assert len(find_spikes(series, method="olmo")) == count
        assert spike_score(series) == pytest.approx(count / 1001)
    below = np.append(calm, 4 - limit - 1e-6)
    assert spike_score(below) == pytest.approx(1 / 1001)
    assert find_spikes(below, method="olmo") == []


def test_olmo_equals_a_naive_loop() -> None:
    values = noisy(2500)
    spiky, away = [], 0
    for i in range(1000, 2500):
        window = values[i - 1000 : i]
        bound = 7 * np.std(window, ddof=1)
        spiky.append(values[i] >= window.mean() + bound)
        away += abs(values[i] - window.mean()) >= bound
    assert ((judge_olmo(values).spike >= 0)[1000:] == spiky).all()
    assert sum(spiky) > 0
    assert spike_score(values) == away / 2500
    assert math.isnan(spike_score(values[:1000]))


def test_olmo_core_equals_its_rolling_lists_in_torch() -> None:
    values = noisy(1000, seed=1)
    losses: list[torch.Tensor] = []
    skipped = []
    for value in values.tolist():
        losses.append(torch.tensor(value, dtype=torch.float64))
        losses = losses[-129:]
        if len(losses) < max(2, 128 // 2):
            skipped.append(False)
            continue
        std, mean = torch.std_mean(torch.stack(losses[:-1]))
        skipped.append(not bool((losses[-1] - mean) <= 6 * std))
    assert ((judge_olmo_core(values).spike >= 0) == skipped).all()
    assert sum(skipped) > 0


def test_olmo_core_begins_at_the_64th_value() -> None:
    for calm, found in [(62, 0), (63, 1)]:
        series = [1.0 + 0.01 * (i % 2) for i in range(calm)] + [9.0]
        assert len(find_spikes(series, method="olmo-core")) == found


def test_zclip_equals_the_published_recursion() -> None:
    norms = np.abs(noisy(1000, seed=2))
    mean = sum(norms[:25]) / 25
    var = sum((x - mean) ** 2 for x in norms[:25]) / 25
    clipped = [False] * 25
    for norm in norms[25:]:
        z = (norm - mean) / (var**0.5 + 1e-6)
        clipped.append(z > 2.5)
        effective = mean + (2.5 * var**0.5) / (z / 2.5) if z > 2.5 else norm
        mean = 0.97 * mean + 0.03 * effective
        var = 0.97 * var + 0.03 * (effective - mean) ** 2
    assert ((judge_zclip(norms).spike >= 0) == clipped).all()
    assert sum(clipped) > 5


def test_zclip_by_hand() -> None:
    """25 values 1 and 3: mean 1.96, variance 0.9984, so 2.5 deviations end at 4.458."""
    calm = [1.0, 3.0] * 12 + [1.0]
    assert find_spikes([*calm, 4.45], method="zclip") == []
    (spike,) = find_spikes([*calm, 4.47], method="zclip")
    assert spike.level == pytest.approx(1.96)


def test_megatron_compares_with_the_largest_of_the_first_100() -> None:
    first = [1.0] * 50 + [3.0] + [1.0] * 49
    assert find_spikes([*first, 29.9], method="megatron") == []
    (spike,) = find_spikes([*first, 30.0, 299.0, 1.0], method="megatron")
    assert (spike.onset, spike.peak, spike.end, spike.recovery) == (100, 101, 101, 102)
    assert spike.height == pytest.approx(299 / 3)
    assert math.isnan(spike.sigmas)
    assert find_spikes([*first[:99], 30.0], method="megatron") == []
    assert (judge_megatron(np.array([*first, 5.0])).spike == -1).all()


def test_runs_are_numbered() -> None:
    spiky = np.array([False, True, True, False, True])
    assert number_runs(spiky).tolist() == [-1, 0, 0, -1, 1]
    assert number_runs(np.array([], dtype=bool)).tolist() == []


def test_huge_spike_leaves_no_rounding_behind() -> None:
    values = noisy(3000)
    judged = judge_olmo(values)
    values[100] = 1e30
    again = judge_olmo(values)
    assert (again.level[1200:] == judged.level[1200:]).all()


def test_each_definition_names_its_source_and_default() -> None:
    for name, definition in DEFINITIONS.items():
        assert definition.name == name
        assert definition.source
        assert definition.judge.__doc__ is not None
        assert "Source:" in definition.judge.__doc__
        values = noisy(1500)
        default = definition.judge(values, definition.threshold)
        assert len(default.spike) == len(default.level) == 1500
