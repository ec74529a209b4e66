"""The ladder delayed > guarded > dynamic by brute force, a site and a number at a time.

Nothing of unclamp is used: scales are quotients in float32, histories are lists.
"""

from dataclasses import dataclass, field

import numpy as np

MAX = {"e4m3fn": 448.0, "e5m2": 57344.0}
LIMIT = {"e4m3fn": 464.0, "e5m2": 61440.0}
"""Halfway to what would be the next value: what rounds to the largest is not clamped."""


@dataclass
class Ladder:
    """One site; `history` holds amaxes oldest first, `said` the decisions (step, kind, rung)."""

    fmt: str = "e4m3fn"
    length: int = 4
    tolerance: float = 0.1
    casts: int = 1
    of: int = 1
    recasts: int = 12
    recasts_of: int = 16
    floor: int = 0
    rung: int = 0
    history: list[float] = field(default_factory=list)
    said: list[tuple[int, str, int]] = field(default_factory=list)
    delayed_spoke: list[bool] = field(default_factory=list)
    guarded_spoke: list[bool] = field(default_factory=list)
    relapses: int = 0
    has_come_back: bool = False
    delayed_from: int = 0
    guarded_from: int = 0
    clamped: int = 0
    harmful: int = 0
    repeated: int = 0

    def scaled(self, amax: float, length: int, margin: int) -> float:
        """Return the amax times the scale that the newest `length` predict; 0: nothing known.

        A window of zeros keeps the scale that there was.
        """
        scale = np.float32(0)
        for end in range(1, len(self.history) + 1):
            largest = max(self.history[max(end - length, 0) : end])
            if largest > 0:
                scale = np.float32(MAX[self.fmt] / 2**margin) / np.float32(largest)
        return float(np.float32(amax) * scale)

    def step(self, step: int, amax: float | None) -> None:
        """Take the amax of an update; None: the site cast nothing."""
        if amax is None:
            return
        by_delayed = self.scaled(amax, self.length, 0)
        by_guarded = self.scaled(amax, 2, 1)
        clamps, repeats = (x > LIMIT[self.fmt] for x in (by_delayed, by_guarded))
        over = by_delayed / MAX[self.fmt]
        hurts = clamps and (1 - 1 / over) ** 2 > self.tolerance
        self.delayed_spoke.append(hurts)
        self.guarded_spoke.append(repeats)
        if self.rung == 0:
            self.clamped += clamps
            self.harmful += hurts
        self.repeated += self.rung == 1 and repeats
        self._decide(step, hurts=hurts, repeats=repeats)
        self.history.append(amax)

    def _decide(self, step: int, *, hurts: bool, repeats: bool) -> None:
        delayed, guarded = self.delayed_spoke, self.guarded_spoke
        is_out = [
            hurts and sum(delayed[-self.of :]) >= self.casts,
            repeats and sum(guarded[-self.recasts_of :]) >= self.recasts,
            False,
        ]
        is_back = [
            False,
            self._clean(delayed, self.delayed_from) >= self._needed(self.length),
            self._clean(guarded, self.guarded_from) >= self._needed(2),
        ]
        if is_out[self.rung]:
            self._up(step)
        elif is_back[self.rung]:
            self._down(step)

    def _clean(self, spoke: list[bool], since: int) -> int:
        count = 0
        for each in reversed(spoke[since:]):
            if each:
                break
            count += 1
        return count

    def _needed(self, length: int) -> int:
        return max(length, self.floor) * 2 ** min(self.relapses, 10)

    def _up(self, step: int) -> None:
        self.relapses += self.has_come_back
        self.has_come_back = False
        self.rung += 1
        self.delayed_from = len(self.delayed_spoke)
        if self.rung == 2:
            self.guarded_from = len(self.guarded_spoke)
        self.said.append((step, "up", self.rung))

    def _down(self, step: int) -> None:
        self.has_come_back = True
        self.rung -= 1
        self.delayed_from = len(self.delayed_spoke)
        self.said.append((step, "down", self.rung))


def series(kind: str, steps: int, seed: int) -> list[float | None]:
    """Return the amaxes of a site, of a kind that a rule has to cope with."""
    random = np.random.default_rng(seed)
    noise = np.exp(0.2 * random.standard_normal(steps))
    if kind == "outliers":
        noise[random.random(steps) < 0.05] *= 40
    elif kind == "periodic":
        noise[:: int(random.integers(3, 40))] *= 9
    elif kind == "rising":
        noise *= np.exp(np.linspace(0, 12, steps))
    elif kind == "doubling":
        noise = 2.0 ** np.arange(steps) * 1e-20
    elif kind == "step":
        noise[steps // 2 :] *= 30
    elif kind == "threshold":
        # The amax of a clamp error of 10 % is 1.4625 times what the scale is for.
        noise = np.where(
            np.arange(steps) % 7 == 0, 1.4625 + 0.01 * random.standard_normal(steps), 1
        )
    elif kind == "zeros":
        noise[random.random(steps) < 0.4] = 0
        noise[random.random(steps) < 0.05] *= 20
    values: list[float | None] = [float(np.float32(x)) for x in noise]
    if kind == "rare":
        values = [x if random.random() < 0.3 else None for x in values]
        values = [None if x is None else x * (50 if random.random() < 0.1 else 1) for x in values]
    return values


KINDS = ("calm", "outliers", "periodic", "rising", "doubling", "step", "threshold", "zeros", "rare")
