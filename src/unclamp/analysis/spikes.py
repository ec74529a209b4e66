"""Where a series jumps up: spikes by any definition, with onset, peak, end and recovery.

A definition judges points (`robust`, `definitions`); here their points become spikes, and
non-finite ones are added. Reading files is for `curves`, slow rises are for `divergences`.

`robust`, the default, is causal: whether a step belongs to a spike depends on no later step, so
`SpikeDetector` says the same of a run while it goes on. Only `end` and `recovery` need the rest.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from unclamp.analysis.curves import SERIES, run_curve
from unclamp.analysis.definitions import (
    Judged,
    judge_megatron,
    judge_olmo,
    judge_olmo_core,
    judge_zclip,
)
from unclamp.analysis.groups import Group, has_kinds, split_places
from unclamp.analysis.resolution import has_ratios
from unclamp.analysis.robust import THRESHOLD, judge_robust
from unclamp.errors import AnalysisError, did_you_mean
from unclamp.files import strict
from unclamp.runlog import RunLog

Values = Sequence[float | None] | np.ndarray
SpikeKind = Literal["rise", "nonfinite"]
DEFAULT = "robust"
"""The definition by which spikes are numbered and explained."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """Consecutive steps far above the level before them, or non-finite ones.

    Attributes:
        onset: First step.
        peak: Step of the largest value; the first non-finite one where there is one.
        end: Last step. That of the data if the series never came back.
        recovery: First step after the end at which the series is back at the level before the
            onset, within two standard deviations; None if it is not in the data.
        height: Peak over level, a ratio; Inf for a non-finite peak; NaN for a series that is
            somewhere zero or below, where a ratio says nothing. A zero of a series written with
            two decimals or more is half a step of the last one.
        sigmas: Peak minus level in the definition's standard deviations; Inf for a non-finite
            peak; NaN where the definition has none (Megatron).
        level: The value that was expected at the onset; NaN if too little came before it.
        kind: "rise", or "nonfinite" if any value is NaN or Inf.
        series: "loss", "grad_norm", or what the caller named it.
        group: The kind of batches among which it is a spike: level, end and recovery are of that
            kind, and steps of other kinds between onset and end do not belong to it. None for
            batches without a group, which are a kind too.
        number: Its place among the spikes of the loss, 1 for the first: the K that
            `unclamp explain RUN --spike K` takes. None for another series, and for spikes by
            another definition or threshold than the default, which explain does not count.
    """

    onset: int
    peak: int
    end: int
    recovery: int | None
    height: float
    sigmas: float
    level: float
    kind: SpikeKind
    series: str = "loss"
    group: Group = None
    # Not compared: a spike is the same one whatever came before it.
    number: int | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for strict JSON: what is NaN or Inf becomes None."""
        return strict(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A definition of a spike.

    Attributes:
        judge: Judges a finite series, given a threshold.
        threshold: Its default, in `unit`.
        source: Where it is published.
    """

    name: str
    judge: Callable[[np.ndarray, float], Judged]
    threshold: float
    unit: str
    source: str


DEFINITIONS = {
    definition.name: definition
    for definition in (
        Definition(
            name="robust",
            judge=judge_robust,
            threshold=THRESHOLD,
            unit="standard deviations of normal noise",
            source="unclamp.analysis.robust",
        ),
        Definition(
            name="olmo",
            judge=judge_olmo,
            threshold=7.0,
            unit="standard deviations of the last 1,000 values",
            source="arXiv 2501.00656, section 3.2",
        ),
        Definition(
            name="olmo-core",
            judge=judge_olmo_core,
            threshold=6.0,
            unit="standard deviations of the last 128 values",
            source="allenai/OLMo-core, src/olmo_core/optim/skip_step_optimizer.py",
        ),
        Definition(
            name="zclip",
            judge=judge_zclip,
            threshold=2.5,
            unit="standard deviations by exponential average",
            source="arXiv 2504.02507; bluorion-com/ZClip, zclip/zclip.py",
        ),
        Definition(
            name="megatron",
            judge=judge_megatron,
            threshold=10.0,
            unit="multiples of the largest of the first 100 values",
            source="NVIDIA/Megatron-LM, megatron/core/rerun_state_machine.py",
        ),
    )
}


def find_spikes(
    values: Values,
    *,
    steps: Sequence[int] | np.ndarray | None = None,
    groups: Sequence[Group] = (),
    method: str = DEFAULT,
    threshold: float | None = None,
    series: str = "loss",
) -> list[Spike]:
    """Return the upward spikes of a series, in the order of their onsets.

    Args:
        values: One a step, such as losses. None is a missing value and left out.
        steps: Their step numbers, in order; 0, 1, ... without them.
        groups: The kind of each step's batch. Each kind is judged as a series of its own, from
            its own beginning on. Without them all are of one kind.
        method: Name of one of `DEFINITIONS`.
        threshold: In the definition's unit; its own by default.
        series: Name written into the spikes.

    Raises:
        AnalysisError: No such definition, or a threshold that is not above 0.
        ValueError: `steps` or `groups` and `values` differ in length.

    Numerics: each run of NaN or Inf of a kind is a spike, or part of the one it touches, whatever
    the definition; it enters no level. Empty and short series have no others.

    Example:
        >>> loss = [2.0 + 0.01 * (i % 7) for i in range(100)]
        >>> loss[60] = 3.1
        >>> [(spike.onset, round(spike.height, 1)) for spike in find_spikes(loss)]
        [(60, 1.5)]
    """
    found = []
    for group, own, at in _kinds(values, steps, groups):
        spikes = _find(own, at, method, threshold, series)
        found += [replace(spike, group=group) for spike in spikes]
    found.sort(key=lambda spike: spike.onset)
    is_counted = series == SERIES[0] and method == DEFAULT and threshold in (None, THRESHOLD)
    return [replace(s, number=i) for i, s in enumerate(found, 1)] if is_counted else found


def _kinds(
    values: Values, steps: Sequence[int] | np.ndarray | None, groups: Sequence[Group]
) -> list[tuple[Group, Values, np.ndarray]]:
    """Return the values of each kind with their steps."""
    at = np.arange(len(values)) if steps is None else np.asarray(steps, dtype=np.int64)
    if len(at) != len(values):
        raise ValueError(f"expected a step a value, got {len(at)} steps, {len(values)} values")
    if not has_kinds(groups):
        return [(None, values, at)]
    if len(groups) != len(values):
        raise ValueError(
            f"expected a group a value, got {len(groups)} groups, {len(values)} values"
        )
    every: list[Any] = list(values)
    return [
        (group, [every[i] for i in places], at[places])
        for group, places in split_places(groups).items()
    ]


def _find(
    values: Values,
    steps: np.ndarray,
    method: str,
    threshold: float | None,
    series: str,
) -> list[Spike]:
    """Return the spikes of batches of one kind."""
    numbers, at = _present(values, steps)
    finite = np.flatnonzero(np.isfinite(numbers))
    judged = _judge(numbers[finite], method, threshold)
    spike = np.full(len(numbers), -1)
    spike[finite] = judged.spike
    has_ratio = has_ratios(numbers[finite])
    found = []
    for begin, stop in _runs(numbers, spike):
        level, spread = _expected_at(begin, judged, finite)
        found.append(
            _spike(numbers, at, slice(begin, stop), level, spread, series, has_ratio=has_ratio)
        )
    return found


def run_spikes(
    log: RunLog, *, method: str = DEFAULT, threshold: float | None = None
) -> list[Spike]:
    """Return the spikes of a run's loss and gradient norm, by onset.

    Several ranks count as their mean; a step recorded again counts as it was recorded last.

    Raises:
        AnalysisError: As `find_spikes`.
    """
    curve = run_curve(log)
    spikes = [
        spike
        for name in SERIES
        if name in curve.series
        for spike in find_spikes(
            curve.series[name],
            steps=curve.steps,
            groups=curve.groups,
            method=method,
            threshold=threshold,
            series=name,
        )
    ]
    return sorted(spikes, key=lambda spike: (spike.onset, spike.series != SERIES[0]))


def smallest_height(
    values: Values, *, method: str = DEFAULT, threshold: float | None = None
) -> float:
    """Return the height that a one-step spike needs to be found, a ratio.

    The median over all judged steps of the limit over the level, times two standard deviations of
    noise: a spike of that height is found at about 49 of 50 steps of ordinary noise, at half of
    the steps at least.

    Raises:
        AnalysisError: As `find_spikes`.

    Numerics: NaN if nothing could be judged, or if the series is somewhere zero or below.
    """
    numbers, _ = _present(values, None)
    numbers = numbers[np.isfinite(numbers)]
    judged = _judge(numbers, method, threshold)
    known = np.isfinite(judged.limit)
    if not known.any() or not has_ratios(numbers):
        return math.nan
    level = judged.level[known]
    noise = np.exp(2 * np.nan_to_num(judged.spread[known] / level))
    return float(np.median(judged.limit[known] / level * noise))


def rise_at(values: Values, *, steps: Sequence[int] | np.ndarray, at: int, level: float) -> Spike:
    """Return the step `at`, and those after it as long as they are above a level, as a spike.

    It has no number, and `sigmas` is NaN: nobody detected it.

    Args:
        values: Losses, one a step. None is a missing value and left out.
        steps: Their step numbers, in order.
        at: The onset, whatever its loss.
        level: The loss before it.

    Raises:
        AnalysisError: The step has no loss.

    Numerics: NaN and Inf are above every level. Nothing finite is above a level of NaN.
    """
    numbers, present = _present(values, steps)
    found = np.flatnonzero(present == at)
    if len(found) == 0:
        within = f"; it has those of {present[0]} to {present[-1]}" if len(present) else ""
        raise AnalysisError(f"the run recorded no loss of step {at}{within}")
    begin = int(found[0])
    is_above = (numbers[begin:] > level) | ~np.isfinite(numbers[begin:])
    length = len(is_above) if is_above.all() else int(np.argmin(is_above))
    places = slice(begin, begin + max(length, 1))
    has_ratio = has_ratios(numbers)
    return _spike(numbers, present, places, level, math.nan, SERIES[0], has_ratio=has_ratio)


def _judge(numbers: np.ndarray, method: str, threshold: float | None) -> Judged:
    if method not in DEFINITIONS:
        hint = did_you_mean(method, DEFINITIONS)
        raise AnalysisError(f"expected a method of {list(DEFINITIONS)}, got {method!r}{hint}")
    definition = DEFINITIONS[method]
    if threshold is None:
        threshold = definition.threshold
    if not 0 < threshold < math.inf:
        raise AnalysisError(f"expected a threshold above 0 {definition.unit}, got {threshold}")
    return definition.judge(numbers, threshold)


def _present(
    values: Values, steps: Sequence[int] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values that are there, and their steps."""
    at = np.arange(len(values)) if steps is None else np.asarray(steps, dtype=np.int64)
    if len(at) != len(values):
        raise ValueError(f"expected a step a value, got {len(at)} steps, {len(values)} values")
    there = np.array([value is not None for value in values], dtype=bool)
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    return numbers, at[there]


def _expected_at(place: int, judged: Judged, finite: np.ndarray) -> tuple[float, float]:
    """Return level and spread at a place of the series, finite or not.

    A non-finite point changes no expectation, so that of the next finite one, or else of the
    last one, is its own.
    """
    if len(finite) == 0:
        return math.nan, math.nan
    i = min(int(np.searchsorted(finite, place)), len(finite) - 1)
    return float(judged.level[i]), float(judged.spread[i])


def _runs(numbers: np.ndarray, spike: np.ndarray) -> list[tuple[int, int]]:
    """Return begin and stop of each run of points of one spike, or non-finite, joined."""
    runs: list[tuple[int, int]] = []
    current = -1  # number of the spike that the run at hand holds, if any
    for i in np.flatnonzero((spike >= 0) | ~np.isfinite(numbers)).tolist():
        number = int(spike[i])
        joins = bool(runs) and runs[-1][1] == i and (number in (-1, current) or current == -1)
        if joins:
            runs[-1] = (runs[-1][0], i + 1)
            current = current if number == -1 else number
        else:
            runs.append((i, i + 1))
            current = number
    return runs


def _spike(
    numbers: np.ndarray,
    steps: np.ndarray,
    places: slice,
    level: float,
    spread: float,
    series: str,
    *,
    has_ratio: bool,
) -> Spike:
    inside = numbers[places]
    broken = ~np.isfinite(inside)
    peak = places.start + int(np.argmax(broken) if broken.any() else np.argmax(inside))
    height = float(numbers[peak]) / level if has_ratio and level > 0 else math.nan
    sigmas = (float(numbers[peak]) - level) / spread if spread > 0 else math.nan
    back = level if math.isnan(spread) else level + 2 * spread
    recovered = _first_at_or_below(numbers, places.stop, back)
    return Spike(
        onset=int(steps[places.start]),
        peak=int(steps[peak]),
        end=int(steps[places.stop - 1]),
        recovery=None if recovered is None else int(steps[recovered]),
        height=math.inf if broken.any() else height,
        sigmas=math.inf if broken.any() else sigmas,
        level=level,
        kind="nonfinite" if broken.any() else "rise",
        series=series,
    )


def _first_at_or_below(numbers: np.ndarray, begin: int, bound: float) -> int | None:
    """Return the first place from `begin` on with a finite value within `bound`; NaN bounds none.

    Looks at growing pieces: a spike usually recovers soon, and some never do.
    """
    size = 64
    while begin < len(numbers):
        piece = numbers[begin : begin + size]
        is_back = np.isfinite(piece) & ~(piece > bound)
        if is_back.any():
            return begin + int(np.argmax(is_back))
        begin, size = begin + size, 2 * size
    return None
