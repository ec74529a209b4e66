"""What a scale loses, told from exponents alone, against the elements themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unclamp.analysis.whatif.bounds import Bin, of_count, of_removed
from unclamp.analysis.whatif.losses import losses
from unclamp.analysis.whatif.spread import Quarters, Spread
from unclamp.formats import E4M3FN, E5M2, Format

GENERATOR = np.random.default_rng(0)
SHAPES = {
    "normal": GENERATOR.normal(size=131_072),
    "laplace": GENERATOR.laplace(size=131_072),
    "student": GENERATOR.standard_t(3, size=131_072),
    "spread": np.exp(3 * GENERATOR.normal(size=131_072)),
    "one outlier": np.append(GENERATOR.normal(size=4096), 300.0),
}


def exponents_of(x: np.ndarray) -> tuple[np.ndarray, int]:
    exponents = np.frexp(np.abs(x[x != 0]))[1] - 1
    return np.bincount(exponents - exponents.min())[None].astype(float), int(exponents.min())


def truth(x: np.ndarray, scale: float, fmt: Format) -> tuple[float, float, float]:
    """Return elements clamped, clamp error and share of underflow, element by element."""
    size = np.abs(x.astype(np.float64))
    is_clamped = size * scale > fmt.overflow_limit
    removed = ((size - fmt.max / scale)[is_clamped] ** 2).sum()
    zeros = (size > 0) & (size * scale <= fmt.min_subnormal / 2)
    return is_clamped.sum(), removed / (size**2).sum(), zeros.sum() / (size > 0).sum()


@pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("overshoot", [0.01, 0.5, 1.04, 1.3, 2.0, 4.0, 16.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_truth_lies_in_the_interval_and_near_the_estimate(
    shape: str, overshoot: float, fmt: Format
) -> None:
    x = SHAPES[shape]
    amax = np.abs(x).max()
    scale = overshoot * fmt.max / amax
    counts, lowest = exponents_of(x)
    spread = Spread.of(counts, lowest, np.array([amax]))
    found = losses(spread, np.array([scale]), fmt)
    clamped, error, underflow = truth(x, scale, fmt)
    for each, value in (
        (found.clamped, clamped),
        (found.clamp_error, error),
        (found.underflow, underflow),
    ):
        assert each.low[0] <= value * (1 + 1e-9) + 1e-12
        assert value <= each.high[0] * (1 + 1e-9) + 1e-12
        assert each.low[0] <= each.value[0] * (1 + 1e-9) + 1e-12
    # Between the edges of octaves a normal tail bends more than any line through them shows.
    assert found.clamp_error.value[0] == pytest.approx(error, rel=0.7, abs=1e-6)
    if clamped > 50:
        assert found.clamped.value[0] == pytest.approx(clamped, rel=0.4)
    assert found.underflow.value[0] == pytest.approx(underflow, rel=0.2, abs=8 / len(x))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40),
    st.floats(1e-4, 1e4),
)
def test_intervals_hold_for_any_elements(elements: list[float], overshoot: float) -> None:
    x = np.array(elements)
    scale = overshoot * E4M3FN.max / x.max()
    counts, lowest = exponents_of(x)
    found = losses(Spread.of(counts, lowest, np.array([x.max()])), np.array([scale]), E4M3FN)
    for each, value in zip(
        (found.clamped, found.clamp_error, found.underflow), truth(x, scale, E4M3FN), strict=True
    ):
        assert each.low[0] <= value * (1 + 1e-6) + 1e-12
        assert value <= each.high[0] * (1 + 1e-6) + 1e-12


def test_no_elements_lose_nothing() -> None:
    found = losses(Spread.of(np.zeros((1, 1)), 0, np.array([0.0])), np.array([1.0]), E4M3FN)
    for each in (found.clamped, found.clamp_error, found.underflow):
        assert (each.low[0], each.value[0], each.high[0]) == (0, 0, 0)


def test_rounding_is_no_underflow() -> None:
    """No element is below the limit, at the edge of a bin; a policy with 0 would beat it else."""
    for number in range(1, 200):
        x = np.append(np.full(number, 1.5 * E4M3FN.min_subnormal), 1.9)
        counts, lowest = exponents_of(x)
        at_edge = [1 / 2, (1 + 1e-15) / 2, (1 - 1e-15) / 2]
        spread = Spread.of(*(np.repeat(counts, 3, 0), lowest, np.full(3, 1.9)))
        found = losses(spread, np.array(at_edge), E4M3FN)
        assert found.underflow.value.tolist() == [0, 0, 0]


NORMAL = GENERATOR.normal(size=131_072)
QUARTERED = SHAPES | {
    "one more log-normal": np.exp(GENERATOR.normal(size=131_072)),
    "uniform": GENERATOR.uniform(-1, 1, size=131_072),
    "clipped": np.clip(NORMAL, -2.2, 2.2),
    "clipped in the bulk": np.clip(NORMAL, -1.1, 1.1),
    "sparse": NORMAL * (GENERATOR.random(131_072) < 0.01),
    "constant": np.full(131_072, 1.7),
    "small": NORMAL[:2000],
}
OVERSHOOTS = [*np.geomspace(1.037, 64, 24).tolist(), *(2.0**-k for k in range(1, 16))]


def quarters_of(x: np.ndarray, octaves: int = 6) -> Quarters:
    """Return the quarters of the highest octaves, with float32 means as a log has them."""
    size = np.abs(x[x != 0]).astype(np.float64)
    mantissa, exponent = np.frexp(size)
    columns = 4 * int(exponent.max() - exponent.min() + 1)
    key = 4 * (exponent - exponent.min()) + np.floor(8 * mantissa).astype(int) - 4
    counts = np.bincount(key, minlength=columns).astype(float)
    sums = np.bincount(key, size, minlength=columns)
    means = (sums / np.maximum(counts, 1)).astype(np.float32)
    first = max(columns - 4 * octaves, 0)
    known = np.arange(columns) >= first
    return Quarters(
        counts=(counts * known)[None],
        sums=(counts * means * known)[None],
        first=np.array([first]),
    )


@pytest.mark.parametrize("fmt", [E4M3FN, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", QUARTERED)
def test_quarters_bring_estimates_within_a_fifth(shape: str, fmt: Format) -> None:
    x = QUARTERED[shape].astype(np.float32)
    elements, amax = np.count_nonzero(x), np.abs(x).max().astype(np.float64)
    spread = Spread.of(*exponents_of(x), np.array([amax]), quarters_of(x))
    for overshoot in OVERSHOOTS:
        scale = overshoot * fmt.max / amax
        found = losses(spread, np.array([scale]), fmt)
        clamped, error, underflow = truth(x, scale, fmt)
        for each, value in (
            (found.clamped, clamped),
            (found.clamp_error, error),
            (found.underflow, underflow),
        ):
            assert each.low[0] <= value * (1 + 1e-9) + 1e-12, overshoot
            assert value <= each.high[0] * (1 + 1e-9) + 1e-12, overshoot
            assert each.low[0] <= each.value[0] * (1 + 1e-9) + 1e-12, overshoot
            assert each.value[0] <= each.high[0] * (1 + 1e-9) + 1e-12, overshoot
        # Of a handful of elements nobody knows more than that they are few.
        assert found.clamped.value[0] == pytest.approx(clamped, rel=0.2, abs=3), overshoot
        assert found.underflow.value[0] == pytest.approx(underflow, rel=0.2, abs=8 / elements), (
            overshoot
        )
        if clamped > 1:
            assert found.clamp_error.value[0] == pytest.approx(error, rel=0.2), overshoot


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.floats(2.0**-20, 2.0**20, width=32) | st.sampled_from([1.0, 1.5, 3.0]),
        min_size=1,
        max_size=40,
    ),
    st.floats(1e-4, 1e4),
    st.integers(0, 6),
)
def test_intervals_of_quarters_hold_for_any_elements(
    elements: list[float], overshoot: float, octaves: int
) -> None:
    x = np.array(elements)
    scale = overshoot * E4M3FN.max / x.max()
    spread = Spread.of(*exponents_of(x), np.array([x.max()]), quarters_of(x, octaves))
    found = losses(spread, np.array([scale]), E4M3FN)
    for each, value in zip(
        (found.clamped, found.clamp_error, found.underflow), truth(x, scale, E4M3FN), strict=True
    ):
        assert each.low[0] <= value * (1 + 1e-6) + 1e-12
        assert value <= each.high[0] * (1 + 1e-6) + 1e-12
        assert each.low[0] <= each.value[0] * (1 + 1e-9) <= each.high[0] * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("length", [1, 2, 3, 16, 100])
def test_a_mean_and_a_number_bound_what_elements_can_be(length: int) -> None:
    # Any elements of a bin: their number above a limit and what they lose lie in the bounds.
    generator = np.random.default_rng(length)
    for _ in range(300):
        x = 1 + 0.25 * generator.beta(*generator.uniform(0.2, 3, 2), size=length)
        each = Bin(
            low=np.array([1.0]),
            high=np.array([1.25]),
            number=np.array([float(length)]),
            mean=np.array([x.mean()]),
        )
        limit = generator.uniform(0.95, 1.3, 1)
        most = limit * generator.uniform(0.9, 1)
        above = x[x > limit]
        low, high = of_count(each, limit)
        assert low[0] <= len(above) <= high[0]
        low, high = of_removed(each, limit, most)
        removed = np.square(above - most).sum()
        assert low[0] <= removed * (1 + 1e-6) + 1e-12
        assert removed <= high[0] * (1 + 1e-6) + 1e-12
