"""What was found about a spike, as plain data and in words.

Knows nothing of replays: `investigate` fills it in, anybody reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from unclamp.explain.mend import Override

Verdict = Literal["clamping", "partly clamping", "not clamping", "not reproduced", "unknown"]
Status = Literal["running", "finished", "interrupted"]

CLAMPING = 0.5
"""Least share of a spike that goes with the clamps for clamping to be the cause."""
NOT_CLAMPING = 0.1
"""A spike of which less goes with the clamps has another cause."""
SHOWN_SITES = 4


@dataclass(frozen=True, kw_only=True)
class SiteShare:
    """What one site, or one group of them, caused.

    Attributes:
        fqn: The layer; a glob for a group.
        role: The operand; "*" for a group of several.
        share: Part of the spike that it caused, a fraction; the Shapley value once `how` says so.
        low: Lower end of the 95 % interval, the noise included.
        high: Upper end.
        how: "shapley", or "both ways": the mean of `only` and `last`.
        only: Share that is gone with only this un-clamped.
        last: Share that is left with only this clamped.
        effect: First-order effect on the spike's losses by the screening pass; None for
            gradients, and where it did not clamp.
        clamp_error: Squares removed by clamping over those of the tensor, summed over steps.
        overshoot: Largest amax over the largest representable value.
        named: Whether it belongs to the smallest set that removes the spike.
        sites: The sites of a group.
    """

    fqn: str
    role: str
    share: float
    low: float
    high: float
    how: str
    only: float | None = None
    last: float | None = None
    effect: float | None = None
    clamp_error: float = 0.0
    overshoot: float = 0.0
    named: bool = False
    sites: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name for people."""
        return self.fqn if self.role == "*" else f"{self.fqn} {self.role}"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The answer so far; `status` says whether it is whole.

    Attributes:
        run: The run's folder.
        onset: First step of the spike.
        last: Last step that counts.
        height: Peak over level.
        level: Loss that the spike rises from.
        snapshot_step: The step that the replays start before.
        status: "running" until all questions are answered or the budget is spent.
        reproduced: Whether the plain replay gave the run's losses bit for bit.
        differences: If not: which step, by how much, and what may be why.
        noise: Share that a change of all weights by a 4096th makes.
        clamping_share: Share of the spike that is gone with nothing clamped.
        verdict: What follows from it.
        others: Shares gone under other questions: "blocks" (next to nothing underflows),
            "high_precision" (no FP8 at all).
        underflowed: Share of elements that underflowed, by question.
        sites: What each leading site caused, the largest share first.
        rest_share: Share of all sites that are not among them.
        clamped_sites: How many sites clamped, or would have.
        override: The recommended change of the recipe.
        counterfactuals: The loss of each step under each replay.
        replays: Replays so far.
        budget: Most replays allowed.
        replay_s: Seconds of all replays.
        step_s: Seconds of one step of a replay.
        notes: What else a reader must know.
    """

    run: str
    onset: int
    last: int
    height: float
    level: float
    snapshot_step: int
    status: Status = "running"
    reproduced: bool | None = None
    differences: tuple[str, ...] = ()
    noise: float | None = None
    clamping_share: float | None = None
    verdict: Verdict = "unknown"
    others: Mapping[str, float]
    underflowed: Mapping[str, float]
    sites: tuple[SiteShare, ...] = ()
    rest_share: float = 0.0
    clamped_sites: int = 0
    override: Override | None = None
    counterfactuals: tuple[Mapping[str, Any], ...] = ()
    replays: int = 0
    budget: int = 0
    replay_s: float = 0.0
    step_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> list[tuple[str, str]]:
        """The smallest set of sites that, made dynamic, removes the spike; empty if none."""
        return [] if self.override is None else list(self.override.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON but for numbers that are not finite."""
        data = {**asdict(self), "words": self.words()}
        data["override"] = None if self.override is None else self.override.to_dict()
        return data

    def words(self) -> str:
        """Return the finding as a paragraph."""
        parts = [
            f"The spike at {_steps(self.onset, self.last)} ({self._height()}) was replayed from "
            f"the snapshot before step {self.snapshot_step}."
        ]
        parts += self._about_replay()
        if self.clamping_share is not None and self.verdict != "not reproduced":
            parts += self._about_clamping()
        parts += self.notes
        if self.status == "interrupted":
            parts.append("Interrupted: this is the answer so far; the same command goes on.")
        return " ".join(parts)

    def _height(self) -> str:
        if not math.isfinite(self.height):
            return "the loss is not finite"
        return f"{self.height:.2f} times the level of {self.level:.4g}"

    def _about_replay(self) -> list[str]:
        if self.reproduced is None:
            return []
        if self.reproduced:
            return ["Without a change the losses came back bit for bit."]
        return ["Without a change the losses did NOT come back.", *self.differences]

    def _about_clamping(self) -> list[str]:
        assert self.clamping_share is not None
        gone = _gone(self.clamping_share)
        if self.verdict == "not clamping":
            return [
                f"With nothing clamped {gone}: clamping is not the cause.",
                *self._about_others(),
            ]
        cause = "the cause" if self.verdict == "clamping" else "a part of the cause"
        parts = [f"With nothing clamped {gone}: clamping is {cause}."]
        if self.clamped_sites:
            parts.append(f"{self.clamped_sites} sites clamped, or would have.")
        parts += self._about_sites()
        return parts + (self._about_others() if self.verdict == "partly clamping" else [])

    def _about_sites(self) -> list[str]:
        named = [site for site in self.sites if site.named] or list(self.sites[:1])
        said = [
            f"{site.name} caused {percent(site.share)} of the spike{_interval(site)}"
            for site in named[:SHOWN_SITES]
        ]
        parts = [f"{'; '.join(said)}."] if said else []
        override = self.override
        if override is not None and override.removed is not None:
            which = (
                "that site" if len(override.sites) == 1 else f"those {len(override.sites)} sites"
            )
            parts.append(
                f"Making {which} {override.scaling} removes {percent(override.removed)} of the "
                "spike, by a replay."
            )
        return parts

    def _about_others(self) -> list[str]:
        parts = []
        if "blocks" in self.others:
            parts.append(
                f"With a scale for every 32 elements, so that "
                f"{percent(self.underflowed['blocks'])} of elements underflow (in the run "
                f"{percent(self.underflowed['actual'])}), {_gone(self.others['blocks'])}."
            )
        if "high_precision" in self.others:
            share = self.others["high_precision"]
            meaning = "it is FP8" if share >= CLAMPING else "most of it is not FP8 at all"
            parts.append(f"In high precision everywhere {_gone(share)}: {meaning}.")
        return parts


def _gone(share: float) -> str:
    if share < -0.005:
        return f"it is {percent(-share)} higher"
    return f"{percent(max(share, 0.0))} of it is gone"


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _interval(site: SiteShare) -> str:
    if not math.isfinite(site.low) or site.high - site.low < 0.005:
        return ""
    return f" (95 % interval {percent(site.low)} to {percent(site.high)})"


def percent(share: float) -> str:
    """Return a fraction as percent with two figures or none."""
    value = 100 * share
    if not math.isfinite(value):
        return "?"
    shown = f"{value:.0f}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{'0' if shown == '-0' else shown} %"
