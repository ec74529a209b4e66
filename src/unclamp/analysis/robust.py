"""The robust detector: causal, one-sided, calibrated by the series' own past errors.

For each point it predicts a value from the points before it and asks how far above the point is,
measured by how far earlier points were off *their* predictions.

Prediction: the median of the last points that were no spikes, lowered by how much that median has
lately been too high, and never above the median of a longer past. So neither a decaying loss nor
a learning-rate drop is a spike, and neither ten steps nor a slow rise become their own level.

Limit: the interquartile range of the last errors gives a standard deviation; how far the outer
errors exceed those of a normal distribution raises the limit. So noise with heavy tails raises it
by itself. But outer errors are single, so steps are evidence together: at the k-th of k
consecutive steps beyond normal noise only the k-th root of that raise counts. A spike that is
certain at its third step has its onset at its first.

Errors of spikes do not count, nor do errors beyond the noise in either direction. The rest count
with a delay. Once the series is twice as long, early ones no longer raise the limit. Where values
are written with few decimals, a rise also has to exceed `GRID_STEPS` steps of the last one
(`resolution`). Below `MIN_HEIGHT` nothing is a spike, however quiet the series.

Positive series are judged in logarithms, where a ratio is a difference and noise is the same at
every level. A series that has been zero or below has no ratios and is judged as it is.

A spike ends when the series is back within half the limit. One that has lasted `SETTLED` steps
becomes the new level, so that spikes on top of it are still found; it is counted as the same
spike until the old level is reached. Nothing that is said at a step depends on later steps.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from unclamp.analysis.definitions import ROUNDING, Judged
from unclamp.analysis.resolution import Resolution

LEVEL_POINTS = 5
BASE_POINTS = 31
"""The level is at most the median of so many: it must not climb along with a slow spike."""
DRIFT_POINTS = 9
ERROR_POINTS = 400
FIRST_ERRORS = 16
LATEST_SHARE = 0.5
"""Errors of this share of the series, the latest, may lower the limit by themselves: a curve calms
at that pace, and what its first steps did must not hold the limit up for hundreds of steps."""
LATEST_ERRORS = 48
"""So many at least: fewer say little of the noise."""
SETTLED = 50
USUAL_STREAK = 2
MOST_ALIKE = 0.55
"""Share of neighbouring errors of one sign up to which they count as independent; half are by
chance."""
MOST_STREAKS = 2
"""After more runs of so many steps that only together exceed the noise, among the last
`ERROR_POINTS`, no run is evidence: they are usual."""
MIN_HEIGHT = 1.2
THRESHOLD = 5.0
SMALL_SAMPLE = 6.0
"""The limit is larger by this over the number of errors: few errors say little of their spread."""
DELAY = 20
"""Errors count this many steps later: the foot of a slow spike must not raise its limit."""
TAIL_SHARE = 64
"""One in so many errors, on each side, is an outer one."""
TAIL_SLACK = 1.15
"""Outer errors may exceed normal ones by this before the limit rises: the estimate varies."""
TAIL_POWER = 3.5
"""How strongly outer errors raise the limit. Of Student's t with 3 degrees of freedom the outer
errors are about 1.7 times the normal ones, and one in 10,000 is six times as far out."""
TAIL_DOUBT = 100
"""The power is half of that at this number of errors: outer ones of few errors vary much."""
LARGEST_EXCESS = 2.0
"""More is not believed: one missed spike among the errors would hide those after it."""
LARGEST_TAIL_RISE = math.log(8.0)
"""Heavy tails raise the limit of a positive series to this at most: where many steps are mildly
raised, their product with a wide spread would be a limit that no spike reaches. What the spread
alone asks for stays."""
GRID_STEPS = 3.0
"""A rise by as many steps of the last written digit, or fewer, may be rounding."""
NORMAL_IQR = 1.349
LONG = 100_000
"""Series of so many values are judged by compiled code (`long_series`), which says the same."""
ROUNDING_SPREAD = 6**-0.5
"""Standard deviation of the difference of two rounded values, in steps of the grid."""
END_SHARE = 0.5
LARGEST_EXPONENT = 700.0
MIN_RISE = math.log(MIN_HEIGHT)


class RunningWindow:
    """The last `size` numbers, in order of arrival and sorted."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.arrived: deque[float] = deque()
        self.sorted: list[float] = []

    def add(self, number: float) -> None:
        """Take in a number; the oldest of more than `size` is forgotten."""
        if len(self.arrived) == self.size:
            self.drop_oldest()
        self.arrived.append(number)
        insort(self.sorted, number)

    def drop_oldest(self) -> None:
        """Forget the number that arrived first."""
        del self.sorted[bisect_left(self.sorted, self.arrived.popleft())]

    def median(self) -> float:
        """Return the median of what is there, one number at least."""
        count = len(self.sorted)
        return (self.sorted[(count - 1) // 2] + self.sorted[count // 2]) / 2


def _normal_tails() -> list[float]:
    """Return, for each number of errors, the mean of the outer ones if they are normal."""
    normal = NormalDist()
    return [
        -sum(normal.inv_cdf((i + 0.6) / (count + 0.2)) for i in range(_outer(count)))
        / _outer(count)
        if count > 1
        else math.nan
        for count in range(ERROR_POINTS + 1)
    ]


def _outer(count: int) -> int:
    """Return how many of `count` errors are outer ones, on each side."""
    return 1 + count // TAIL_SHARE


NORMAL_TAILS = _normal_tails()


def _spread_and_excess(errors: list[float]) -> tuple[float, float]:
    """Return the standard deviation of sorted errors, and how far outer ones exceed normal ones.

    The excess is at least 1 and at most `LARGEST_EXCESS`.
    """
    count = len(errors)
    outer = _outer(count)
    tail = max(_added(errors[-outer:]), -_added(errors[:outer])) / (outer * NORMAL_TAILS[count])
    spread = (errors[(3 * count) // 4] - errors[count // 4]) / NORMAL_IQR
    if spread <= 0:  # most errors are equal, as of losses printed with few digits
        return max(tail, 0.0), 1.0
    return spread, min(max(tail / (TAIL_SLACK * spread), 1.0), LARGEST_EXCESS)


def _added(numbers: list[float]) -> float:
    """Return a plain sum: `sum` is more exact from Python 3.12 on, and a log has one answer."""
    total = 0.0
    for number in numbers:
        total += number
    return total


class SpikeDetector:
    """Judges a series while it arrives: `update` once a value.

    Attributes:
        spike: Number of the spike that the last finite value belongs to, -1 for none.
        length: Finite values of that spike so far; 0 for none. Where it was not certain at its
            first value, those from there on count: the onset lies `length - 1` values back.
        level: The value that was expected of it; NaN while there were too few.
        limit: The value above which it is a spike; NaN likewise.
        spread: Standard deviation of the expectation's error; NaN likewise.
    """

    def __init__(self, *, threshold: float = THRESHOLD) -> None:
        """Start with an empty past.

        Args:
            threshold: Standard deviations of normal noise; heavy tails raise the limit above it.
        """
        self.threshold = threshold
        self.spike = -1
        self.length = 0
        self.level = self.limit = self.spread = math.nan
        self._count = 0
        self._resolution = Resolution()
        self._logarithmic = True
        self._forget()
        self._floor = math.nan
        self._open = self._settled = False
        self._last: deque[float] = deque(maxlen=LEVEL_POINTS)
        self._unsettled = self._streak = self._seen = 0
        self._streaks: deque[int] = deque()

    def _forget(self) -> None:
        self._calm = RunningWindow(LEVEL_POINTS)
        self._base = RunningWindow(BASE_POINTS)
        self._drift = RunningWindow(DRIFT_POINTS)
        self._errors = RunningWindow(ERROR_POINTS)
        self._latest_errors = RunningWindow(ERROR_POINTS)
        self._waiting: deque[float] = deque()
        self._raw: deque[float] = deque(maxlen=ERROR_POINTS + LEVEL_POINTS)

    def update(self, value: float) -> bool:
        """Return whether `value` belongs to a spike: begins one, or goes on with it.

        Numerics: a NaN or Inf does, and changes nothing else, `spike` included.
        """
        if not math.isfinite(value):
            return True
        self._seen += 1
        self._resolution.add(value)
        value = self._resolution.unrounded(value) if self._logarithmic else value
        if self._logarithmic and value <= 0:
            self._leave_logarithms()
        number = math.log(value) if self._logarithmic else value
        expected, spread, noise, tail = self._expect()
        least = self._least_rise(expected)
        above = number - expected
        can_begin = not self._open or self._settled
        self._streak = self._streak + 1 if can_begin and above > max(noise, least) else 0
        rise = max(noise * tail ** (1 / self._evidence(above, noise * tail)), least)
        self._publish(expected, spread, rise)
        if can_begin and above > rise:
            self._begin(expected, rise)
        elif self._open and not number > self._floor:
            self._open = False
        if self._open and not self._settled:
            self._last.append(number)
            self._unsettled += 1
            if self._unsettled >= SETTLED:
                self._settle()
        else:
            self._learn(number, value, expected, noise * tail)
        self.length = self.length + 1 if self._open else 0
        self.spike = self._count - 1 if self._open else -1
        return self._open

    def _evidence(self, above: float, single: float) -> int:
        """Return how many consecutive steps are evidence together: 1 where such runs are usual.

        `single` is the limit for single steps. What a run of steps reaches again and again is how
        the series is, as the crests of one that oscillates.
        """
        if self._streak == USUAL_STREAK and above <= single:
            self._streaks.append(self._seen)
        while self._streaks and self._streaks[0] <= self._seen - ERROR_POINTS:
            self._streaks.popleft()
        if self._streak < 2 or len(self._streaks) > MOST_STREAKS or not self._is_independent():
            return 1
        return self._streak

    def _is_independent(self) -> bool:
        """Return whether neighbouring errors are on one side of zero about as often as not.

        Of a series that is smoothed, or swings, they are; then a run of them is one event.
        """
        signs = [error > 0 for error in self._errors.arrived]
        alike = sum(one == other for one, other in pairwise(signs))
        return alike <= MOST_ALIKE * max(len(signs) - 1, 1)

    def _begin(self, expected: float, rise: float) -> None:
        self._open, self._settled = True, False
        self._floor = expected + END_SHARE * rise
        self.length = self._streak - 1
        self._streak = 0
        self._unsettled = 0
        self._last.clear()
        self._waiting.clear()
        self._count += 1

    def _settle(self) -> None:
        """Take the spike's last values for the level from now on."""
        self._settled = True
        self._calm = RunningWindow(LEVEL_POINTS)
        self._base = RunningWindow(BASE_POINTS)
        self._drift = RunningWindow(DRIFT_POINTS)
        for number in self._last:
            self._calm.add(number)
            self._base.add(number)

    def _learn(self, number: float, value: float, expected: float, noise: float) -> None:
        if self._calm.sorted:
            self._drift.add(number - self._calm.median())
            # Errors beyond the noise are the foot of a spike or a drop of the level. While the
            # drift is not known, they are those of a lagging level.
            drift_known = len(self._drift.sorted) == DRIFT_POINTS
            if drift_known and abs(number - expected) <= noise:
                self._waiting.append(number - expected)
            count = len(self._errors.sorted)
            while len(self._waiting) > min(count // 8, DELAY):
                self._learn_error(self._waiting.popleft())
            if count < FIRST_ERRORS == len(self._errors.sorted):
                self._clean()
        self._calm.add(number)
        self._base.add(number)
        self._raw.append(value)

    def _expect(self) -> tuple[float, float, float, float]:
        """Return expectation, standard deviation of its error, and what noise makes at most.

        The last two numbers are the largest error of normal noise, and the factor by which outer
        errors raise it, 1 or more.
        """
        if not self._calm.sorted:
            return math.nan, math.nan, math.inf, 1.0
        expected = self._calm.median()
        if self._drift.sorted:
            expected += min(0.0, self._drift.median())
        expected = min(expected, self._base.median())
        errors, latest = self._errors.sorted, self._latest_errors.sorted
        if len(errors) < FIRST_ERRORS:
            return expected, math.nan, math.inf, 1.0
        noise = self._noise(errors, expected)
        if len(latest) < len(errors):
            noise = min(noise, self._noise(latest, expected), key=lambda n: n[1] * n[2])
        return expected, *noise

    def _noise(self, errors: list[float], expected: float) -> tuple[float, float, float]:
        """Return what sorted errors say of the noise: the last three numbers of `_expect`."""
        count = len(errors)
        spread, excess = _spread_and_excess(errors)
        grid = self._grid_at(expected)
        spread = max(spread, ROUNDING_SPREAD * grid)
        power = TAIL_POWER * count / (count + TAIL_DOUBT)
        noise = self.threshold * spread * (1 + SMALL_SAMPLE / count)
        raised = noise * excess**power
        if self._logarithmic:
            raised = min(raised, LARGEST_TAIL_RISE * self.threshold / THRESHOLD)
        steps = math.log1p(GRID_STEPS * grid) if self._logarithmic else GRID_STEPS * grid
        normal = max(noise, steps, ROUNDING * abs(expected))
        return spread, normal, max(raised / normal, 1.0) if normal > 0 else 1.0

    def _grid_at(self, expected: float) -> float:
        """Return the step of the last written digit, in a positive series as share of the level."""
        grid = self._resolution.grid
        return grid / max(math.exp(expected), 1e-300) if self._logarithmic and grid else grid

    def _least_rise(self, expected: float) -> float:
        return MIN_RISE if self._logarithmic else ROUNDING * abs(expected)

    def _clean(self) -> None:
        """Forget those of the first errors that are beyond the noise, now that it is known."""
        spread, _ = _spread_and_excess(self._errors.sorted)
        bound = 2 * self.threshold * spread
        kept = [error for error in self._errors.arrived if abs(error) <= bound]
        self._errors = RunningWindow(ERROR_POINTS)
        self._latest_errors = RunningWindow(ERROR_POINTS)
        for error in kept:
            self._learn_error(error)

    def _learn_error(self, error: float) -> None:
        self._errors.add(error)
        self._latest_errors.add(error)
        if len(self._latest_errors.sorted) > max(LATEST_ERRORS, LATEST_SHARE * self._seen):
            self._latest_errors.drop_oldest()

    def _publish(self, expected: float, spread: float, rise: float) -> None:
        if math.isnan(spread):
            self.level = math.exp(expected) if self._logarithmic else expected
            self.limit = self.spread = math.nan
        elif self._logarithmic:
            self.level = math.exp(expected)
            self.limit = math.exp(min(expected + rise, LARGEST_EXPONENT))
            self.spread = self.level * spread
        else:
            self.level, self.limit, self.spread = expected, expected + rise, spread

    def _leave_logarithms(self) -> None:
        """Learn the past anew as it is: from here on the series has no ratios."""
        past = list(self._raw)
        was_open, floor = self._open, self._floor
        self._logarithmic = False
        self._forget()
        for value in past:
            expected, _, _, _ = self._expect()
            self._learn(value, value, expected, math.inf)
        if was_open:
            self._floor = math.exp(min(floor, LARGEST_EXPONENT))
            self._last = deque(map(math.exp, self._last), maxlen=LEVEL_POINTS)


def judge_robust(values: np.ndarray, threshold: float = THRESHOLD) -> Judged:
    """Judge a finite series with `SpikeDetector`, from its first point on.

    Numerics: the first 25 points are not judged.

    Source: this module; measured in docs/spikes.md.
    """
    if len(values) >= LONG:
        from unclamp.analysis import long_series  # noqa: PLC0415 - numba is slow to import

        return long_series.judge_robust(values, threshold)
    detector = SpikeDetector(threshold=threshold)
    spike = np.empty(len(values), dtype=np.int64)
    last = -1
    level, limit, spread = np.empty((3, len(values)))
    for i, value in enumerate(values.tolist()):
        detector.update(value)
        begins = detector.spike > last
        last = max(last, detector.spike)
        spike[i - detector.length + 1 if begins else i : i + 1] = detector.spike
        level[i] = detector.level
        limit[i], spread[i] = detector.limit, detector.spread
    return Judged(spike=spike, level=level, limit=limit, spread=spread)
