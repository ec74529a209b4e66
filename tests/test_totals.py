"""Each formula of what a cast lost, against sums made by hand, in Python, arrays and SQL alike."""

import math

import duckdb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unclamp.totals import (
    SCALED_AMAX_SQL,
    GradientChange,
    SiteTotals,
    clamp_error,
    headroom_bits,
    overshoot,
    scaled_amax,
    share,
)

counts = st.integers(0, 10**9)
ROWS = [  # amax, scale, elements, saturated, underflowed, error
    (896.0, 1.0, 10, 2, 1, 0.5),
    (100.0, 2.0, 10, 0, 4, 0.0),
    (700.0, 2.0, 30, 3, 0, 0.25),
]


def totals(amax: float, scale: float, elements: int, saturated: int, under: int, error: float,
           step: int) -> SiteTotals:  # fmt: skip
    return SiteTotals(
        rows=1, casts=2, elements=elements, saturated=saturated, underflowed=under,
        clamped_rows=int(saturated > 0), overshoot=overshoot(scaled_amax(amax, scale), 448.0),
        clamp_error_sum=error, clamp_error_max=error, worst_step=step if saturated else None,
    )  # fmt: skip


def test_totals_of_rows_are_what_a_pencil_says() -> None:
    added = sum((totals(*row, step=i) for i, row in enumerate(ROWS)), SiteTotals())
    assert (added.rows, added.casts, added.elements, added.saturated) == (3, 6, 50, 5)
    assert added.overshoot == 1400 / 448
    assert added.underflow_share == 0.1
    assert added.saturated_share == 0.1
    assert added.clamp_error == 0.375  # the mean of 0.5 and 0.25: one row clamped nothing
    assert (added.clamp_error_max, added.worst_step, added.clamped_rows) == (0.5, 0, 2)


def test_nothing_is_no_share_of_nothing() -> None:
    nothing = SiteTotals()
    assert (nothing.clamp_error, nothing.underflow_share, nothing.saturated_share) == (0, 0, 0)
    assert (nothing.sqnr_db_mean, nothing.sqnr_db_min, nothing.worst_step) == (None, None, None)


def test_of_signal_to_noise_ratios_the_finite_ones_have_a_mean() -> None:
    exact = SiteTotals(sqnr_db_min=math.inf)
    added = exact + SiteTotals(sqnr_db_min=20.0, sqnr_db_sum=50.0, sqnr_rows=2)
    assert (added.sqnr_db_min, added.sqnr_db_mean) == (20.0, 25.0)
    assert (exact + exact).sqnr_db_min == math.inf


@given(st.lists(st.tuples(counts, counts), min_size=1, max_size=20))
def test_a_share_of_arrays_and_tensors_is_that_of_numbers(pairs: list[tuple[int, int]]) -> None:
    wholes = [max(pair) for pair in pairs]
    parts = [min(pair) for pair in pairs]
    expected = [p / w if w else 0.0 for p, w in zip(parts, wholes, strict=True)]
    assert [share(p, w) for p, w in zip(parts, wholes, strict=True)] == expected
    floats = [(float(part), float(whole)) for part, whole in zip(parts, wholes, strict=True)]
    for table in (np.array(floats), torch.tensor(floats, dtype=torch.float64)):
        part, whole = table[:, 0], table[:, 1]
        assert share(part, whole).tolist() == expected
        assert clamp_error(part, whole).tolist() == expected


@given(st.floats(0, 2.0**127, width=32), st.floats(2.0**-126, 2.0**127, width=32))
def test_the_scaled_amax_of_sql_is_that_of_python(amax: float, scale: float) -> None:
    query = f"SELECT {SCALED_AMAX_SQL} FROM (SELECT $amax::FLOAT AS amax, $scale::FLOAT AS scale)"
    found = duckdb.execute(query, {"amax": amax, "scale": scale}).fetchone()
    assert found == (scaled_amax(amax, scale),)


@pytest.mark.parametrize(("scaled", "bits"), [(448.0, 0.0), (896.0, -1.0), (112.0, 2.0)])
def test_headroom_and_overshoot_are_two_words_for_one_ratio(scaled: float, bits: float) -> None:
    assert headroom_bits(scaled, 448.0) == bits
    assert overshoot(scaled, 448.0) == 2**-bits


@pytest.mark.parametrize("kept", [0.25, 1.0, -0.5])
def test_the_descent_lost_is_what_a_step_of_sgd_lowers_a_loss_less(kept: float):
    """Of a loss that is linear, <U, w>, whose step along C lowers it by <U, C>."""
    unclamped = np.array([3.0, -4.0, 12.0])
    computed = np.array([3.0, -4.0, 12.0 * kept])
    lowered = [float(unclamped @ step) for step in (unclamped, computed)]
    change = GradientChange.of(
        computed=float(computed @ computed),
        change=float((unclamped - computed) @ (unclamped - computed)),
        product=float(computed @ (unclamped - computed)),
    )
    assert change.descent_lost == pytest.approx(1 - lowered[1] / lowered[0])
