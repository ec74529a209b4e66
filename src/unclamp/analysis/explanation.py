"""What was found about a spike: frozen data, to plain data and back, and in words.

Needs no torch. The replays of `unclamp.explain` fill it in; the terminal and the page show it.
All sentences and labels about an explanation are made here, with one way to write a share.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from unclamp.analysis.counterfactual import PASTE, Counterfactual, Override, Question, SiteShare
from unclamp.analysis.horizon import Horizon
from unclamp.analysis.reading import Reading
from unclamp.analysis.spikes import SpikeKind
from unclamp.names import SiteName
from unclamp.shown import Shown
from unclamp.written import counted

Verdict = Literal["clamping", "partly clamping", "not clamping", "not reproduced", "unknown"]
Status = Literal["running", "finished", "interrupted"]

CLAMPING = 0.5
"""Least share of a spike that goes with the clamps for clamping to be the cause."""
NOT_CLAMPING = 0.1
"""A spike of which less goes with the clamps has another cause."""
SHOWN_SITES = 4
LEAST_SHARE = 0.0005
"""Smaller shares of a spike are noise of the arithmetic, and are written as 0."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation(Shown):
    """The answer so far; `status` says whether it is whole.

    Attributes:
        run: The run's folder.
        onset: First step of the spike.
        last: Last step that counts.
        height: Peak over level; Inf where the loss is not finite, NaN where a ratio says nothing.
        level: Loss that the spike rises from; NaN if no calm step came before it.
        kind: "rise", or "nonfinite" where the loss is not finite.
        snapshot_step: The step that the replays start before.
        status: "running" until all questions are answered or the budget is spent.
        reproduced: Whether the plain replay gave the run's losses bit for bit.
        differences: If not: which step, by how much, and what may be why.
        noise: Share that a change of all weights by a 4096th makes.
        clamping_share: Share of the spike that is gone with nothing clamped.
        verdict: What follows from it, as far back as the horizon.
        horizon: From which steps on nothing clamped in the replays, and what clamped before; None
            before it was asked, and from an earlier version.
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
    kind: SpikeKind = "rise"
    status: Status = "running"
    reproduced: bool | None = None
    differences: tuple[str, ...] = ()
    noise: float | None = None
    clamping_share: float | None = None
    verdict: Verdict = "unknown"
    horizon: Horizon | None = None
    others: Mapping[str, float]
    underflowed: Mapping[str, float]
    sites: tuple[SiteShare, ...] = ()
    rest_share: float = 0.0
    clamped_sites: int = 0
    override: Override | None = None
    counterfactuals: tuple[Counterfactual, ...] = ()
    replays: int = 0
    budget: int = 0
    replay_s: float = 0.0
    step_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def named(self) -> list[SiteName]:
        """The smallest set of sites that, made dynamic, removes the spike; empty if none."""
        return [] if self.override is None else list(self.override.sites)

    @property
    def first_step(self) -> int:
        """The first step that was replayed with nothing clamped; before it nothing is said."""
        return self.snapshot_step if self.horizon is None else self.horizon.first_step

    @property
    def stated(self) -> str:
        """The verdict for people: a negative one holds from a step on."""
        if self.verdict != "not clamping":
            return self.verdict
        return f"not clamping from step {self.first_step} on"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; what JSON has no number for is still a number (`unclamp.files`)."""
        override = None if self.override is None else self.override.to_dict()
        return {
            **asdict(self),
            "sites": [site.to_dict() for site in self.sites],
            "override": override,
            "horizon": None if self.horizon is None else self.horizon.to_dict(),
            "counterfactuals": [each.to_dict() for each in self.counterfactuals],
            "words": self.words(),
        }

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return the explanation that `to_dict` made plain, by this version or an earlier one.

        Raises:
            AnalysisError: A value is missing or of another type.

        Numerics: where JSON had no number, the height comes back as Inf or NaN by `kind`, ends of
        intervals as -Inf and Inf, and other numbers as NaN.
        """
        read = Reading(data, "an explanation")
        kind = read.choice("kind", get_args(SpikeKind), _kind_before(read))
        return cls(
            run=read.text("run"),
            onset=read.whole("onset"),
            last=read.whole("last"),
            height=read.number("height", null=math.inf if kind == "nonfinite" else math.nan),
            level=read.number("level"),
            snapshot_step=read.whole("snapshot_step"),
            kind=kind,
            status=read.choice("status", get_args(Status), "running"),
            reproduced=read.maybe_flag("reproduced"),
            differences=read.texts("differences"),
            noise=read.maybe_number("noise"),
            clamping_share=read.maybe_number("clamping_share"),
            verdict=read.choice("verdict", get_args(Verdict), "unknown"),
            horizon=Horizon.from_dict(read.item("horizon")) if read.has("horizon") else None,
            others=read.numbers("others"),
            underflowed=read.numbers("underflowed"),
            sites=tuple(SiteShare.from_dict(each) for each in read.items("sites")),
            rest_share=read.number("rest_share", 0.0),
            clamped_sites=read.whole("clamped_sites", 0),
            override=Override.from_dict(read.item("override")) if read.has("override") else None,
            counterfactuals=tuple(map(Counterfactual.from_dict, read.items("counterfactuals"))),
            replays=read.whole("replays", 0),
            budget=read.whole("budget", 0),
            replay_s=read.number("replay_s", 0.0),
            step_s=read.number("step_s", 0.0),
            notes=read.texts("notes"),
        )

    # ---- in words --------------------------------------------------------------------------

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

    def __str__(self) -> str:
        if self.override is None:
            return f"{self.verdict}\n{self.words()}"
        return f"{self.verdict}\n{self.words()}\n\n{PASTE}\n{self.override.toml}".rstrip()

    def _height(self) -> str:
        if self.kind == "nonfinite":
            return "the loss is not finite"
        if not math.isfinite(self.height):  # a loss that is zero or below has no ratio
            return f"from a level of {self.level:.4g}"
        level = f"the level of {self.level:.4g}" if math.isfinite(self.level) else "its level"
        return f"{self.height:.2f} times {level}"

    def _about_replay(self) -> list[str]:
        if self.reproduced is None:
            return []
        if self.reproduced:
            return ["Without a change the losses came back bit for bit."]
        return ["Without a change the losses did NOT come back.", *self.differences]

    def _about_clamping(self) -> list[str]:
        assert self.clamping_share is not None
        if self.verdict == "not clamping":
            return [*self._about_no_clamping(self.clamping_share), *self._about_others()]
        cause = "the cause" if self.verdict == "clamping" else "a part of the cause"
        said = f"{self._free(self.clamping_share)}: clamping is {cause}."
        parts = [*self._about_start(), said]
        if self.horizon is not None and self.horizon.stop not in ("", "found"):
            parts.append(self.horizon.before())
        if self.clamped_sites:
            parts.append(f"{counted(self.clamped_sites, 'site')} clamped, or would have.")
        parts += self._about_sites()
        return parts + (self._about_others() if self.verdict == "partly clamping" else [])

    def _about_start(self) -> list[str]:
        """Say that the replays begin further back than usual, and what that costs."""
        horizon = self.horizon
        if horizon is None or horizon.asked[0].step == self.snapshot_step:
            return []
        near = horizon.asked[0]
        said = (
            f"With nothing clamped from step {near.step} on {_gone(near.removed)}; the clamping "
            "that matters lies before."
        )
        return [said, horizon.cost()]

    def _about_no_clamping(self, share: float) -> list[str]:
        horizon = self.horizon
        if horizon is None:
            return [f"With nothing clamped {_gone(share)}: clamping is not the cause."]
        shares = [f"from step {each.step} on {_gone(each.removed)}" for each in horizon.asked]
        verdict = f"from step {horizon.first_step} on clamping is not the cause"
        said = f"With nothing clamped {', '.join(shares)}: {verdict}."
        return [said, horizon.before(), *filter(None, [horizon.cost()])]

    def _free(self, share: float) -> str:
        """Return what goes with nothing clamped, from the start that the answer is about."""
        is_sure = self.horizon is None or self.horizon.stop == "found"
        if is_sure and (self.horizon is None or len(self.horizon.asked) == 1):
            return f"With nothing clamped {_gone(share)}"
        return f"With nothing clamped from step {self.snapshot_step} on {_gone(share)}"

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


def _kind_before(read: Reading) -> SpikeKind:
    """Return the kind of a spike that an earlier version did not write down.

    Its height told: "inf" for a loss that is not finite, "nan" for one that has no ratio.
    """
    is_broken = read.has("height") and math.isinf(read.number("height"))
    return "nonfinite" if is_broken else "rise"


def _gone(share: float) -> str:
    if share < -0.005:
        return f"it is {percent(-share)} higher"
    return f"{percent(max(share, 0.0))} of it is gone"


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _interval(site: SiteShare) -> str:
    if not math.isfinite(site.low) or site.high - site.low < 0.005:
        return ""
    return f" (95 % interval {interval(site)})"


def interval(site: SiteShare) -> str:
    """Return the ends of a site's interval, "-" where there is none."""
    if not (math.isfinite(site.low) and math.isfinite(site.high)):
        return "-"
    return f"{spike_share(site.low)} to {spike_share(site.high)}"


def spike_share(share: float | None) -> str:
    """Return a share of a spike as percent, "-" for None; what is noise is 0."""
    if share is None:
        return "-"
    return percent(0.0 if abs(share) < LEAST_SHARE else share)


def percent(share: float) -> str:
    """Return a fraction as percent: whole from 1 % on, below with two figures."""
    value = 100 * share
    if not math.isfinite(value):
        return "?"
    shown = f"{value:.0f}" if abs(value) >= 1 else f"{value:.2g}"
    return f"{'0' if shown == '-0' else shown} %"


# ---- what to call a counterfactual ---------------------------------------------------------------

LEADING_SITES = 4
"""Leading sites whose own counterfactual, only this one un-clamped, has a name."""


def named_counterfactuals(found: Explanation) -> list[tuple[str, Counterfactual]]:
    """Return the counterfactuals that are worth a look, with what was changed in words.

    Of up to a hundred: the plain replay, nothing clamped, the recommended sets, other questions,
    and only one of the leading sites un-clamped, in this order.
    """
    freed = [c.question for c in found.counterfactuals if c.question.kind == "unclamped"]
    free = max(freed, key=lambda question: len(question.sites), default=None)
    leading = {frozenset(row.members): i for i, row in reversed([*enumerate(found.sites)])}
    told: list[tuple[int, str, Counterfactual]] = []
    for each in found.counterfactuals:
        question = each.question
        place = leading.get(frozenset(question.sites), LEADING_SITES)
        if question == free:
            told.append((1, "nothing clamped", each))
        elif question.kind == "unclamped" and place < LEADING_SITES:
            who = _one_or(question, found.sites[place].name)
            told.append((5 + place, f"un-clamped only: {who}", each))
        elif question.kind in ("dynamic", "guarded"):
            who = _one_or(question, f"{len(question.sites)} sites")
            told.append((2, f"{question.kind}: {who}", each))
        elif (whole := _WHOLE.get(question.kind)) is not None:
            told.append((*whole, each))
    return [(label, each) for _, label, each in sorted(told, key=lambda one: one[0])]


_WHOLE = {
    "actual": (0, "nothing changed"),
    "blocks": (3, "a scale for every 32 elements"),
    "high_precision": (4, "no FP8 at all"),
}
"""Questions that change no sites, or all: place and name."""


def _one_or(question: Question, several: str) -> str:
    return str(question.sites[0]) if len(question.sites) == 1 else several
