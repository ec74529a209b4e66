"""What is asked of every value of a long series, compiled: as the detectors say it, bit for bit.

`robust.SpikeDetector` and `divergences.DivergenceDetector` take about ten microseconds a value,
which is ten seconds for a million. Each value's windows depend on what was decided of those before
it, so no array operation can take their place; here the same statements are compiled by numba.
The rules and their reasons stand with the detectors, and tests hold both equal.

All of it is in this file, and constants come as arguments (`long_series`): numba keeps what it
compiled on disk, and looks at the file of the function alone when it decides whether that is still
right.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


def compiled(function: Callable) -> Any:
    """Compile a function at its first call; kept on disk where numba finds a folder for it."""
    try:
        return njit(function, cache=True, nogil=True)
    except RuntimeError:  # no folder to write to
        return njit(function, nogil=True)


# A window of the last numbers ----------------------------------------------------------------
# A tuple of arrays: the numbers in order of arrival (a ring), the same sorted, and how many there
# are and where the oldest is. It is `robust.RunningWindow`.
@compiled
def _window(size):
    return np.empty(size), np.empty(size), np.zeros(2, np.int64)


@compiled
def _clear(window):
    window[2][:] = 0


@compiled
def _drop_oldest(window):
    arrived, order, at = window
    count, number = at[0], arrived[at[1]]
    place = np.searchsorted(order[:count], number)
    for i in range(place, count - 1):
        order[i] = order[i + 1]
    at[0], at[1] = count - 1, (at[1] + 1) % len(arrived)


@compiled
def _add(window, number):
    arrived, order, at = window
    count, size = at[0], len(arrived)
    if count < size:
        arrived[(at[1] + count) % size] = number
        place = np.searchsorted(order[:count], number, side="right")
        for i in range(count, place, -1):
            order[i] = order[i - 1]
        order[place] = number
        at[0] = count + 1
        return
    # The oldest goes: only what lies between the two places moves.
    hole = np.searchsorted(order, arrived[at[1]])
    place = np.searchsorted(order, number, side="right")
    if place > hole:
        place -= 1
        for i in range(hole, place):
            order[i] = order[i + 1]
    else:
        for i in range(hole, place, -1):
            order[i] = order[i - 1]
    order[place] = number
    arrived[at[1]] = number
    at[1] = (at[1] + 1) % size


@compiled
def _median(window):
    order, count = window[1], window[2][0]
    return (order[(count - 1) // 2] + order[count // 2]) / 2


@compiled
def running_median(values, width):
    """Return the median of `width` values around each, an odd number; those that are NaN not."""
    half = width // 2
    window = _window(width)
    medians = np.empty(len(values))
    for i in range(-half, len(values)):
        gone, new = i - half - 1, i + half
        if gone >= 0 and not math.isnan(values[gone]):
            _drop_oldest(window)
        if new < len(values) and not math.isnan(values[new]):
            _add(window, values[new])
        if i >= 0:
            medians[i] = _median(window) if window[2][0] > 0 else math.nan
    return medians


# The resolution ------------------------------------------------------------------------------
# `told` holds the count of values, and the decimals of the latest (-1: not rounded); `latest` when
# a value had so many decimals. They are those of `resolution.Resolution`.
@compiled
def _is_whole(number, digits):
    return abs(number - np.rint(number)) <= digits.relative * number


@compiled
def _decimals(value, digits, powers):
    size = abs(value)
    most = math.floor(min(float(digits.most_decimals), math.log10(digits.largest / size)))
    if most < 0 or not _is_whole(size * powers[most], digits):
        return digits.most_decimals + 1
    for decimals in range(most):
        if _is_whole(size * powers[decimals], digits):
            return decimals
    return most


@compiled
def _note_decimals(value, told, latest, digits, powers):
    if value == 0:
        return
    told[0] += 1
    none = digits.most_decimals + 1
    decimals = _decimals(value, digits, powers)
    latest[decimals] = told[0]
    most = none
    if decimals != none:
        while latest[most] <= told[0] - digits.window:
            most -= 1
    told[1] = -1 if most == none else most


@compiled
def _unrounded(value, told, digits, grids):
    is_small = value == 0 and told[1] >= digits.fewest_of_zero
    return grids[told[1]] / 2 if is_small else value


# The spikes ----------------------------------------------------------------------------------
@compiled
def _spread_and_excess(errors, count, rule, tails):
    outer = 1 + count // rule.tail_share
    high = low = 0.0
    for i in range(count - outer, count):
        high += errors[i]
    for i in range(outer):
        low += errors[i]
    tail = max(high, -low) / (outer * tails[count])
    spread = (errors[(3 * count) // 4] - errors[count // 4]) / rule.normal_iqr
    if spread <= 0:
        return max(tail, 0.0), 1.0
    return spread, min(max(tail / (rule.tail_slack * spread), 1.0), rule.largest_excess)


@compiled
def _noise(errors, count, expected, grid, is_log, rule, tails):
    spread, excess = _spread_and_excess(errors, count, rule, tails)
    if is_log and grid > 0:
        grid = grid / max(math.exp(expected), 1e-300)
    spread = max(spread, rule.rounding_spread * grid)
    power = rule.tail_power * count / (count + rule.tail_doubt)
    noise = rule.asked * spread * (1 + rule.small_sample / count)
    raised = noise * excess**power
    if is_log:
        raised = min(raised, rule.largest_tail_rise * rule.asked / rule.threshold)
    steps = math.log1p(rule.grid_steps * grid) if is_log else rule.grid_steps * grid
    normal = max(max(noise, steps), rule.rounding * abs(expected))
    return spread, normal, max(raised / normal, 1.0) if normal > 0 else 1.0


@compiled
def _expect(calm, base, drift, errors, latest, grid, is_log, rule, tails):
    if calm[2][0] == 0:
        return math.nan, math.nan, math.inf, 1.0
    expected = _median(calm)
    if drift[2][0] > 0:
        expected += min(0.0, _median(drift))
    expected = min(expected, _median(base))
    count = errors[2][0]
    if count < rule.first_errors:
        return expected, math.nan, math.inf, 1.0
    noise = _noise(errors[1], count, expected, grid, is_log, rule, tails)
    if latest[2][0] < count:
        other = _noise(latest[1], latest[2][0], expected, grid, is_log, rule, tails)
        if other[1] * other[2] < noise[1] * noise[2]:
            noise = other
    return expected, noise[0], noise[1], noise[2]


@compiled
def _learn_error(error, errors, latest, seen, rule):
    is_full = errors[2][0] == len(errors[0]) and latest[2][0] == len(latest[0])
    _add(errors, error)
    if is_full:  # then they hold the same, and go on to
        return
    _add(latest, error)
    if latest[2][0] > max(float(rule.latest_errors), rule.latest_share * seen):
        _drop_oldest(latest)


@compiled
def _clean(errors, latest, seen, rule, tails):
    spread, _ = _spread_and_excess(errors[1], errors[2][0], rule, tails)
    bound = 2 * rule.asked * spread
    arrived, _, at = errors
    past = np.empty(at[0])
    for i in range(at[0]):
        past[i] = arrived[(at[1] + i) % len(arrived)]
    _clear(errors)
    _clear(latest)
    for error in past:
        if abs(error) <= bound:
            _learn_error(error, errors, latest, seen, rule)


@compiled
def _learn(number, expected, noise, calm, base, drift, errors, latest, waiting, seen, rule, tails):
    if calm[2][0] > 0:
        _add(drift, number - _median(calm))
        ring, at = waiting
        if drift[2][0] == rule.drift_points and abs(number - expected) <= noise:
            ring[(at[1] + at[0]) % len(ring)] = number - expected
            at[0] += 1
        count = errors[2][0]
        while at[0] > min(count // 8, rule.delay):
            error = ring[at[1]]
            at[0], at[1] = at[0] - 1, (at[1] + 1) % len(ring)
            _learn_error(error, errors, latest, seen, rule)
        if count < rule.first_errors and errors[2][0] == rule.first_errors:
            _clean(errors, latest, seen, rule, tails)
    _add(calm, number)
    _add(base, number)


@compiled
def _is_independent(errors, rule):
    arrived, _, at = errors
    alike, count = 0, at[0]
    for i in range(1, count):
        one = arrived[(at[1] + i - 1) % len(arrived)] > 0
        other = arrived[(at[1] + i) % len(arrived)] > 0
        alike += one == other
    return alike <= rule.most_alike * max(count - 1, 1)


@compiled
def judge(values, rule, digits, tails, powers, grids, spike, level, limit, spreads):
    """Write into the last four what `robust.SpikeDetector` says after each finite value."""
    calm, base = _window(rule.level_points), _window(rule.base_points)
    drift = _window(rule.drift_points)
    errors, latest = _window(rule.error_points), _window(rule.error_points)
    waiting = (np.empty(rule.delay + 2), np.zeros(2, np.int64))
    raw, raws = np.empty(rule.error_points + rule.level_points), 0
    last, lasts = np.empty(rule.level_points), 0
    streaks, streak_at = np.empty(rule.error_points + 1, np.int64), np.zeros(2, np.int64)
    told, decimals = np.array([0, -1]), np.full(digits.most_decimals + 2, -digits.window)
    is_log, is_open, is_settled = True, False, False
    floor = math.nan
    count = streak = length = unsettled = 0
    numbered = -1
    for i, number in enumerate(values):
        value, seen = number, i + 1
        _note_decimals(value, told, decimals, digits, powers)
        if is_log:
            value = _unrounded(value, told, digits, grids)
        grid = grids[told[1]] if told[1] >= 0 else 0.0
        if is_log and value <= 0:
            is_log = False
            past = np.empty(min(raws, len(raw)))
            for k in range(len(past)):
                past[k] = raw[(raws - len(past) + k) % len(raw)]
            for window in (calm, base, drift):
                _clear(window)
            _clear(errors)
            _clear(latest)
            waiting[1][:] = 0
            raws = 0
            for was in past:
                told_of = _expect(calm, base, drift, errors, latest, grid, False, rule, tails)
                _learn(was, told_of[0], math.inf, calm, base, drift, errors, latest, waiting,
                       seen, rule, tails)  # fmt: skip
                raw[raws % len(raw)] = was
                raws += 1
            if is_open:
                floor = math.exp(min(floor, rule.largest_exponent))
                for k in range(len(last)):
                    last[k] = math.exp(last[k]) if k < min(lasts, len(last)) else 0.0
        number = math.log(value) if is_log else value
        expected, spread, noise, tail = _expect(
            calm, base, drift, errors, latest, grid, is_log, rule, tails
        )
        least = rule.min_rise if is_log else rule.rounding * abs(expected)
        above = number - expected
        can_begin = not is_open or is_settled
        streak = streak + 1 if can_begin and above > max(noise, least) else 0
        if streak == rule.usual_streak and above <= noise * tail:
            streaks[(streak_at[1] + streak_at[0]) % len(streaks)] = seen
            streak_at[0] += 1
        while streak_at[0] > 0 and streaks[streak_at[1]] <= seen - rule.error_points:
            streak_at[0], streak_at[1] = streak_at[0] - 1, (streak_at[1] + 1) % len(streaks)
        evidence = 1
        if streak >= 2 and streak_at[0] <= rule.most_streaks and _is_independent(errors, rule):
            evidence = streak
        rise = max(noise * tail ** (1 / evidence), least)
        if math.isnan(spread):
            level[i] = math.exp(expected) if is_log else expected
            limit[i] = spreads[i] = math.nan
        elif is_log:
            level[i] = math.exp(expected)
            limit[i] = math.exp(min(expected + rise, rule.largest_exponent))
            spreads[i] = level[i] * spread
        else:
            level[i], limit[i], spreads[i] = expected, expected + rise, spread
        if can_begin and above > rise:
            is_open, is_settled = True, False
            floor = expected + rule.end_share * rise
            length, streak, unsettled, lasts = streak - 1, 0, 0, 0
            waiting[1][:] = 0
            count += 1
        elif is_open and not number > floor:
            is_open = False
        if is_open and not is_settled:
            last[lasts % len(last)] = number
            lasts += 1
            unsettled += 1
            if unsettled >= rule.settled:
                is_settled = True
                for window in (calm, base, drift):
                    _clear(window)
                for k in range(max(lasts - len(last), 0), lasts):
                    _add(calm, last[k % len(last)])
                    _add(base, last[k % len(last)])
        else:
            _learn(number, expected, noise * tail, calm, base, drift, errors, latest, waiting,
                   seen, rule, tails)  # fmt: skip
            raw[raws % len(raw)] = value
            raws += 1
        length = length + 1 if is_open else 0
        own = count - 1 if is_open else -1
        begin = i - length + 1 if own > numbered else i
        numbered = max(numbered, own)
        spike[begin : i + 1] = own


# Divergences ---------------------------------------------------------------------------------
@compiled
def _slow_limit(changes, low, grid, rule):
    order, count = changes[1], changes[2][0]
    if count < rule.fewest_blocks:
        return math.inf
    spread = (order[(3 * count) // 4] - order[count // 4]) / rule.normal_iqr
    steps = math.log1p(rule.grid_steps * grid / max(math.exp(low), 1e-300))
    return max(max(rule.least_rise, rule.sigmas * spread), steps)


@compiled
def diverge(values, rule, digits, powers, grids, is_open, levels, lows):
    """Write into the last three what `divergences.DivergenceDetector` says after each."""
    latest, changes = _window(rule.level_points), _window(rule.blocks)
    new, old = _window(rule.step_points), _window(rule.step_points)
    told, decimals = np.array([0, -1]), np.full(digits.most_decimals + 2, -digits.window)
    passing = np.empty(rule.step_points)
    block = math.nan
    largest = low = open_limit = 0.0
    inside = False
    for i in range(len(values)):
        value = values[i]
        _note_decimals(value, told, decimals, digits, powers)
        value = _unrounded(value, told, digits, grids)
        if value <= 0:
            return
        number = math.log(value)
        _add(latest, number)
        _add(new, number)
        if i >= rule.step_points:
            _add(old, passing[i % rule.step_points])
            if old[2][0] == rule.step_points:
                largest = max(largest, _median(new) - _median(old))
        passing[i % rule.step_points] = number
        level = _median(latest)
        if (i + 1) % rule.level_points == 0:
            if not math.isnan(block):
                _add(changes, level - block)
            block = level
        if i + 1 < rule.level_points:
            continue
        if i + 1 == rule.level_points or level <= low:
            low, largest, inside = level, 0.0, False
        elif inside:
            inside = level - low > rule.end_share * open_limit
        else:
            grid = grids[told[1]] if told[1] >= 0 else 0.0
            limit = _slow_limit(changes, low, grid, rule)
            if level - low > limit:
                if largest > rule.step_share * (level - low):
                    low, largest = level, 0.0
                else:
                    inside, open_limit = True, limit
        is_open[i] = inside
        levels[i], lows[i] = math.exp(level), math.exp(low)
