"""What was found about a spike: frozen data, to plain data and back, and in words.

Needs no torch. The replays of `unclamp.explain` fill it in; the terminal and the page show it.
All sentences about an explanation are made here, with the one way to write a share of `shares`;
what its replays are called is in `labels`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from unclamp.analysis.blame import CLAMPING, NOT_CLAMPING, part_of_cause, part_of_fp8
from unclamp.analysis.blame import MOST as MOST
from unclamp.analysis.counterfactual import (
    ACTUAL,
    PASTE,
    SCALED,
    Counterfactual,
    Override,
    Question,
    QuestionKind,
    SiteShare,
    Underflow,
)
from unclamp.analysis.horizon import Horizon
from unclamp.analysis.reading import Reading
from unclamp.analysis.shares import (
    by_step,
    gone,
    listed_steps,
    percent,
    range_of,
    steps_between,
)
from unclamp.analysis.spikes import SpikeKind
from unclamp.names import SiteName
from unclamp.shown import Shown
from unclamp.written import counted

Verdict = Literal[
    "clamping",
    "mostly clamping",
    "partly clamping",
    "not clamping",
    "underflow",
    "clamping and underflow",
    "cannot tell",
    "not reproduced",
    "unknown",
]
Status = Literal["running", "finished", "interrupted"]

TOLD_NOISE = 0.05
"""Chaos is told where placebos move more."""
SHOWN_SITES = 4


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
        noise: Largest share that a placebo moved: a change of all weights by a 4096th.
        placebos: How many there were. A change without effect moves more than the largest of 19
            once in 20 times.
        clamping_share: Share of the spike that is gone with nothing clamped.
        verdict: What follows from it, as far back as the horizon.
        horizon: From which steps on nothing clamped in the replays, and what clamped before; None
            before it was asked, and from an earlier version.
        underflow: The steps at which it does harm; None where it does not, or was not asked. With
            the verdict "clamping and underflow" its `share` is the one, and `clamping_share` the
            other.
            Where it is the verdict, shares of sites, of the override and of counterfactuals are
            of these steps.
        others: Shares gone under other questions: "blocks" (next to nothing underflows),
            "high_precision" (no FP8 at all), "own_scales" (each of several ranks its own).
        underflowed: Share of elements that underflowed, by question.
        sites: What each leading site caused, the largest share first.
        rest_share: Share of all sites that are not among them.
        clamped_sites: How many sites clamped, or would have.
        override: The recommended change of the recipe.
        counterfactuals: The loss of each step under each replay.
        replays: Replays so far, from whatever snapshot.
        budget: Most replays allowed.
        steps: Steps of all replays together: one from an older snapshot takes more of them. 0 of
            an earlier version.
        replay_s: Seconds of all replays.
        step_s: Seconds of one step of a replay.
        notes: What else a reader must know.
        identity: What identifies the question, whatever the budget: an answer to another one
            replaces this one; empty if any does.
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
    placebos: int = 2
    clamping_share: float | None = None
    verdict: Verdict = "unknown"
    horizon: Horizon | None = None
    underflow: Underflow | None = None
    others: Mapping[str, float]
    underflowed: Mapping[str, float]
    sites: tuple[SiteShare, ...] = ()
    rest_share: float = 0.0
    clamped_sites: int = 0
    override: Override | None = None
    counterfactuals: tuple[Counterfactual, ...] = ()
    replays: int = 0
    budget: int = 0
    steps: int = 0
    replay_s: float = 0.0
    step_s: float = 0.0
    notes: tuple[str, ...] = ()
    identity: str = ""

    @property
    def named(self) -> list[SiteName]:
        """The smallest set of sites that, scaled otherwise, removes the spike; empty if none."""
        return [] if self.override is None else list(self.override.sites)

    @property
    def first_step(self) -> int:
        """The first step that was replayed with nothing clamped; before it nothing is said."""
        return self.snapshot_step if self.horizon is None else self.horizon.first_step

    @property
    def stated(self) -> str:
        """The verdict for people: a negative one holds from a step on, of two causes with both."""
        if self.verdict == "clamping and underflow" and self.underflow and self.clamping_share:
            shares = percent(self.clamping_share), percent(self.underflow.share or 0.0)
            return f"clamping ({shares[0]}) and underflow ({shares[1]})"
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
            "underflow": None if self.underflow is None else self.underflow.to_dict(),
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
            placebos=read.whole("placebos", 2),
            clamping_share=read.maybe_number("clamping_share"),
            verdict=read.choice("verdict", get_args(Verdict), "unknown"),
            horizon=Horizon.from_dict(read.item("horizon")) if read.has("horizon") else None,
            underflow=Underflow.from_dict(read.item("underflow"))
            if read.has("underflow")
            else None,
            others=read.numbers("others"),
            underflowed=read.numbers("underflowed"),
            sites=tuple(SiteShare.from_dict(each) for each in read.items("sites")),
            rest_share=read.number("rest_share", 0.0),
            clamped_sites=read.whole("clamped_sites", 0),
            override=Override.from_dict(read.item("override")) if read.has("override") else None,
            counterfactuals=tuple(map(Counterfactual.from_dict, read.items("counterfactuals"))),
            replays=read.whole("replays", 0),
            budget=read.whole("budget", 0),
            steps=read.whole("steps", 0),
            replay_s=read.number("replay_s", 0.0),
            step_s=read.number("step_s", 0.0),
            notes=read.texts("notes"),
            identity=read.text("identity", ""),
        )

    # ---- in words --------------------------------------------------------------------------

    def words(self) -> str:
        """Return the finding as a paragraph."""
        parts = [
            f"The spike at {steps_between(self.onset, self.last)} ({self._height()}) was "
            f"replayed from the snapshot before step {self.snapshot_step}."
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
        share = self.clamping_share
        assert share is not None
        if self.verdict in ("not clamping", "underflow"):
            rest = self._about_underflow() if self.verdict == "underflow" else []
            parts = [*self._about_no_clamping(share), *self._about_noise()]
            return [*parts, *self._about_others(), *rest]
        if self.verdict == "cannot tell":
            return [f"{self._free(share)}.", *self._about_noise(), *self._about_others()]
        if self.verdict == "unknown":
            before = [] if self.horizon is None else [self.horizon.before()]
            return [f"{self._free(share)}.", *self._about_noise(), *before, *self._about_others()]
        said = f"{self._free(share)}: clamping is {part_of_cause(share)}."
        parts = [*self._about_start(), said, *self._told_by_step("unclamped")]
        parts += self._about_noise()
        if self.horizon is not None and self.horizon.stop not in ("", "found"):
            parts.append(self.horizon.before())
        if self.clamped_sites:
            parts.append(f"{counted(self.clamped_sites, 'site')} clamped, or would have.")
        if self.verdict == "clamping and underflow":
            return [*parts, *self._about_others(), *self._about_both(), *self._about_sites()]
        parts += self._about_sites()
        return parts + self._about_others()

    def _about_noise(self) -> list[str]:
        """Say what chaos moves, where that is much or decides."""
        if self.noise is None or (self.noise < TOLD_NOISE and self.verdict != "cannot tell"):
            return []
        said = (
            f"{self.placebos} replays in which only every weight changes by a 4096th move it by up "
            f"to {percent(self.noise)}"
        )
        if self.verdict == "cannot tell":
            return [f"{said}: chaos hides whether clamping is the cause."]
        return [f"{said}, so shares are known no better."]

    def _about_underflow(self) -> list[str]:
        found = self.underflow
        if found is None:
            return []
        return [
            f"At {listed_steps(found.by_step)}, {len(found.by_step)} of the "
            f"{counted(found.elevated, 'step')} above the level, {percent(found.removed)} of the "
            "rise goes in blocks and un-clamping does not help: underflow is the cause there.",
            *self._about_sites("of the rise of these steps"),
        ]

    def _about_both(self) -> list[str]:
        """Say what underflow does beside clamping."""
        found = self.underflow
        if found is None or found.share is None:
            return []
        return [
            f"In blocks {percent(found.share)} of it goes beyond what goes with nothing clamped, "
            f"also at {listed_steps(found.by_step)}, which un-clamping does not mend: underflow is "
            "a cause too."
        ]

    def _told_by_step(self, kind: QuestionKind) -> list[str]:
        """Say at which steps a change of all sites helps and harms, where it does both."""
        asked = [each.question for each in self.counterfactuals if each.question.kind == kind]
        return self._told(max(asked, key=lambda question: len(question.sites), default=None))

    def _told(self, question: Question | None) -> list[str]:
        losses = {each.question: each.losses for each in self.counterfactuals}
        shares = {each.question: each.by_step for each in self.counterfactuals}
        if question is None or question not in losses or ACTUAL not in losses:
            return []
        told = by_step(shares[question], losses[question], losses[ACTUAL])
        return [told] if told else []

    def _about_start(self) -> list[str]:
        """Say that the replays begin further back than usual, and what that costs."""
        horizon = self.horizon
        if horizon is None or horizon.asked[0].step == self.snapshot_step:
            return []
        near = horizon.asked[0]
        is_little = near.removed < NOT_CLAMPING
        rest = "clamping that matters lies before" if is_little else "rest lies before, or is not"
        said = f"With nothing clamped from step {near.step} on {gone(near.removed)}; the {rest}"
        return [f"{said}{'' if is_little else ' clamping'}.", horizon.cost()]

    def _about_no_clamping(self, share: float) -> list[str]:
        horizon = self.horizon
        if horizon is None:
            return [f"With nothing clamped {gone(share)}: {self._blame(share)}."]
        shares = [f"from step {each.step} on {gone(each.removed)}" for each in horizon.asked]
        start = self.snapshot_step if self._is_partly_clamped(share) else horizon.first_step
        verdict = f"from step {start} on {self._blame(share)}"
        said = f"With nothing clamped {', '.join(shares)}: {verdict}."
        if self.verdict == "not clamping" and any(a.removed >= NOT_CLAMPING for a in horizon.asked):
            said += " What goes is no more than chaos moves."
        told = self._told_by_step("unclamped")
        return [said, *told, horizon.before(), *filter(None, [horizon.cost()])]

    def _is_partly_clamped(self, share: float) -> bool:
        """Whether a part of a spike of underflow goes with the clamps, more than chaos moves."""
        return self.verdict == "underflow" and share >= max(NOT_CLAMPING, self.noise or 0.0)

    def _blame(self, share: float) -> str:
        is_part = self._is_partly_clamped(share)
        return f"clamping is {part_of_cause(share)}" if is_part else "clamping is not the cause"

    def _free(self, share: float) -> str:
        """Return what goes with nothing clamped, from the start that the answer is about."""
        is_sure = self.horizon is None or self.horizon.stop == "found"
        if is_sure and (self.horizon is None or len(self.horizon.asked) == 1):
            return f"With nothing clamped {gone(share)}"
        return f"With nothing clamped from step {self.snapshot_step} on {gone(share)}"

    def _about_sites(self, whole: str = "of the spike") -> list[str]:
        named = [site for site in self.sites if site.named] or list(self.sites[:1])
        said = [
            f"{site.name} caused {percent(site.share)} {whole}{range_of(site)}"
            for site in named[:SHOWN_SITES]
        ]
        parts = [f"{'; '.join(said)}."] if said else []
        override = self.override
        if override is not None and override.removed is not None:
            which = (
                "that site" if len(override.sites) == 1 else f"those {len(override.sites)} sites"
            )
            parts.append(
                f"Making {which} {SCALED[override.scaling]} removes {percent(override.removed)} "
                f"{whole}, by a replay{_on_top(override)}."
            )
            parts += self._told(Question(kind=override.scaling, sites=override.sites))
        if override is not None and override.instead:
            others = ", ".join(map(str, override.instead[:SHOWN_SITES]))
            which = "either" if len(override.instead) == 1 else "any one"
            is_whole = (override.removed or 0.0) >= CLAMPING
            does = "does too" if is_whole else "removes as much"
            is_in_blocks = self.verdict in ("underflow", "clamping and underflow")
            change, into = ("Putting", " into blocks") if is_in_blocks else ("Un-clamping", "")
            alone = f": {which} alone {'removes it' if is_whole else 'does'}"
            parts.append(f"{change} {others}{into} in its place {does}{alone}.")
        return parts

    def _about_others(self) -> list[str]:
        parts = []
        if "blocks" in self.others:
            parts.append(
                f"With a scale for every 32 elements, so that "
                f"{percent(self.underflowed['blocks'])} of elements underflow (in the run "
                f"{percent(self.underflowed['actual'])}), {gone(self.others['blocks'])}."
            )
            parts += self._told_by_step("blocks")
        if "high_precision" in self.others:
            share = self.others["high_precision"]
            told = self._told_by_step("high_precision")
            meaning = "" if told else f": {part_of_fp8(share)}"
            parts += [f"In high precision everywhere {gone(share)}{meaning}.", *told]
        return parts


def _on_top(override: Override) -> str:
    if percent(override.added) == "0 %":
        return ""
    return f", and adds {percent(override.added)} as much at other steps"


def _kind_before(read: Reading) -> SpikeKind:
    """Return the kind of a spike that an earlier version did not write down.

    Its height told: "inf" for a loss that is not finite, "nan" for one that has no ratio.
    """
    is_broken = read.has("height") and math.isinf(read.number("height"))
    return "nonfinite" if is_broken else "rise"
