"""What was asked about a spike and what was answered, as frozen data: the parts of an explanation.

A *question* is which sites are scaled otherwise, and how. A *counterfactual* is the answer: the
loss of each step under it. Everything goes to plain data and comes back from it, also from that
which earlier versions wrote.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

from unclamp.analysis.reading import Reading
from unclamp.errors import AnalysisError
from unclamp.names import ROLES, Role, SiteName

ScalingName = Literal["dynamic", "guarded", "short history", "blocks"]
"""What may be recommended; "short history" is delayed scaling that remembers one update."""
SCALED: Mapping[ScalingName, str] = {
    "dynamic": "dynamic",
    "guarded": "guarded",
    "short history": "delayed with a history of one update",
    "blocks": "dynamic with a scale for every 32 elements",
}
"""Recommended scalings for people."""
Change = Literal["unclamped", "dynamic", "guarded", "short history", "blocks", "high_precision"]
QuestionKind = Literal["actual", "placebo", "own_scales"] | Change
KINDS: tuple[QuestionKind, ...] = ("actual", "placebo", "own_scales", *get_args(Change))
How = Literal["shapley", "both ways"]
GroupRole = Role | Literal["*"]
ANY: Literal["*"] = "*"
"""Stands in a group's name for what its members do not share."""
_SITE_TEXT = re.compile(rf"(.*?) ({'|'.join(ROLES)})(?:, |$)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Question:
    """How a replay differs from the run.

    Attributes:
        kind: "actual" changes nothing and "placebo" every weight by a 4096th; with "own_scales"
            each of several ranks takes scales from its own amaxes alone; the others are how
            the sites are scaled: "unclamped" as before but without clamping, "dynamic",
            "guarded", "short history" (delayed by one update alone), "blocks" (a scale for
            every 32 elements) or "high_precision".
        sites: The sites that are scaled otherwise, sorted.
        seed: Of a placebo.
    """

    kind: QuestionKind
    sites: tuple[SiteName, ...] = ()
    seed: int | None = None

    @property
    def name(self) -> str:
        """The question for people who read the file."""
        if self.kind == "placebo":
            return f"placebo {self.seed}"
        return f"{self.kind}: {', '.join(map(str, self.sites))}" if self.sites else self.kind

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        sites = [site.to_dict() for site in self.sites]
        return {"name": self.name, "kind": self.kind, "sites": sites, "seed": self.seed}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return the question that a dict holds; one without a kind is of an earlier version.

        Raises:
            AnalysisError: It holds none.
        """
        read = Reading(data, "a question")
        if not read.has("kind"):
            return cls._from_name(read.text("name"))
        return cls(
            kind=read.choice("kind", KINDS),
            sites=_sites(read),
            seed=read.maybe_whole("seed"),
        )

    @classmethod
    def _from_name(cls, name: str) -> Self:
        """Return the question of which an earlier version kept only the name.

        "unclamped: a input, b weight", "placebo 0" or "actual".
        """
        kind, _, rest = name.partition(": ")
        if name.startswith("placebo ") and name[8:].isdecimal():
            return cls(kind="placebo", seed=int(name[8:]))
        pairs = _SITE_TEXT.findall(rest)
        sites = [SiteName.from_dict({"fqn": fqn, "role": role}) for fqn, role in pairs]
        return cls(
            kind=Reading({"kind": kind}, f"a replay named {name!r}").choice("kind", KINDS),
            sites=tuple(sorted(sites)),
        )


ACTUAL = Question(kind="actual")
OWN_SCALES = Question(kind="own_scales")


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """The loss under a question.

    Attributes:
        question: What was changed.
        losses: By step.
        removed: Share of the spike that is gone; None where there is no spike in the replay.
        by_step: The same of each of the spike's steps in which the loss is above the level; empty
            from an earlier version.
    """

    question: Question
    losses: Mapping[int, float]
    removed: float | None = None
    by_step: Mapping[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; what JSON has no number for is still a number."""
        return {
            **self.question.to_dict(),
            "losses": _by_text(self.losses),
            "removed": self.removed,
            "by_step": _by_text(self.by_step),
        }

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return what a dict holds.

        Raises:
            AnalysisError: It holds no question, or steps or losses that are no numbers.
        """
        read = Reading(data, "a counterfactual")
        return cls(
            question=Question.from_dict(data),
            losses=_by_step(read, "losses"),
            removed=read.maybe_number("removed"),
            by_step=_by_step(read, "by_step"),
        )


@dataclass(frozen=True, kw_only=True)
class Underflow:
    """What goes of a spike where next to nothing underflows.

    Attributes:
        by_step: Share that is gone with a scale for every 32 elements at all sites, at each step
            at which that takes away most of the rise, and un-clamping alone does not.
        elevated: In how many steps of the spike the loss is above the level.
        removed: Share of the rise of those steps together.
        share: Share of the rise of all elevated steps that goes beyond what goes with nothing
            clamped, at those steps and at those that un-clamping mends; None of an earlier version.
    """

    by_step: Mapping[int, float]
    elevated: int
    removed: float
    share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; what JSON has no number for is still a number."""
        return {**asdict(self), "by_step": _by_text(self.by_step)}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return what a dict holds.

        Raises:
            AnalysisError: A value is missing or of another type.
        """
        read = Reading(data, "underflow")
        return cls(
            by_step=_by_step(read, "by_step"),
            elevated=read.whole("elevated"),
            removed=read.number("removed"),
            share=read.maybe_number("share"),
        )


@dataclass(frozen=True, kw_only=True)
class SiteShare:
    """What one site, or one group of them, caused.

    Attributes:
        fqn: The layer; a glob for a group.
        role: The operand; "*" for a group of several.
        share: Part of the spike that it caused, a fraction; the Shapley value once `how` says so.
        low: Lower end of its range, the noise included; -Inf where one sample gives none. "Both
            ways": the range of `only` and `last`. An exact Shapley value: the most that a placebo
            moves to either side. A sampled one: see `pairs`.
        high: Upper end; Inf likewise.
        how: "shapley", or "both ways": the mean of `only` and `last`.
        pairs: Of a sampled Shapley value: pairs of orders drawn. From 20 on the range is Student's
            95 % interval of their mean, with fewer it reaches from the least to the largest of
            them; 0 for an exact value, and from an earlier version.
        only: Share that is gone with only this mended: un-clamped, or in blocks where underflow is
            the cause.
        last: Share that is left with all others mended.
        effect: First-order effect on the spike's losses by the screening pass; None for
            gradients, and where it did not clamp.
        clamp_error: Squares removed by clamping over those of the tensor, summed over steps.
        overshoot: Largest amax over the largest representable value.
        underflow: Share of its elements that underflowed.
        named: Whether it belongs to the smallest set that removes the spike.
        sites: The sites of a group.
    """

    fqn: str
    role: GroupRole
    share: float
    low: float
    high: float
    how: How
    pairs: int = 0
    only: float | None = None
    last: float | None = None
    effect: float | None = None
    clamp_error: float = 0.0
    overshoot: float = 0.0
    underflow: float = 0.0
    named: bool = False
    sites: tuple[SiteName, ...] = ()

    @property
    def name(self) -> str:
        """The name for people."""
        return self.fqn if self.role == ANY else str(SiteName(self.fqn, self.role))

    @property
    def members(self) -> tuple[SiteName, ...]:
        """The sites: those of a group, or the one."""
        if self.sites or self.role == ANY:
            return self.sites
        return (SiteName(self.fqn, self.role),)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; what JSON has no number for is still a number."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return what a dict holds.

        Raises:
            AnalysisError: A value is missing or of another type.
        """
        read = Reading(data, "a site's share")
        return cls(
            fqn=read.text("fqn"),
            role=read.choice("role", (*ROLES, ANY)),
            share=read.number("share"),
            low=read.number("low", null=float("-inf")),
            high=read.number("high", null=float("inf")),
            how=read.choice("how", get_args(How), "shapley"),
            pairs=read.whole("pairs", 0),
            only=read.maybe_number("only"),
            last=read.maybe_number("last"),
            effect=read.maybe_number("effect"),
            clamp_error=read.number("clamp_error", 0.0),
            overshoot=read.number("overshoot", 0.0),
            underflow=read.number("underflow", 0.0),
            named=bool(read.maybe_flag("named")),
            sites=_sites(read),
        )


PASTE = "Paste before the recipe's first [[override]], or at the end of a file without one:"
"""Where the TOML of an override goes: the first rule that matches a layer decides for it, and what
stands before all tables of a file cannot come after one."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """A recommended change of the recipe.

    Attributes:
        sites: The sites to change.
        scaling: What to make them: "dynamic", or "guarded" where dynamic did not do; against
            underflow also "short history" (delayed by one update alone) or "blocks".
        removed: Share of the spike that is gone with it, by a replay; None if not replayed.
        added: What it adds at other steps in that replay, as a share of the spike's rise; 0 from an
            earlier version.
        instead: Other sites each of which alone does the same, where it is of one site.
        toml: Overrides for a recipe file, to go before those it has (`PASTE`).
        python: The same as code; None where rules of the recipe would come before it.
    """

    sites: tuple[SiteName, ...]
    scaling: ScalingName
    removed: float | None
    toml: str
    python: str | None
    instead: tuple[SiteName, ...] = ()
    added: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return what a dict holds.

        Raises:
            AnalysisError: A value is missing or of another type.
        """
        read = Reading(data, "an override")
        return cls(
            sites=_sites(read),
            scaling=read.choice("scaling", get_args(ScalingName), "dynamic"),
            removed=read.maybe_number("removed"),
            toml=read.text("toml"),
            python=read.maybe_text("python"),
            instead=_sites(read, "instead"),
            added=read.number("added", 0.0),
        )


def _by_text(values: Mapping[int, float]) -> dict[str, float]:
    return {str(step): value for step, value in values.items()}


def _by_step(read: Reading, key: str) -> dict[int, float]:
    values = read.numbers(key)
    if wrong := [step for step in values if not re.fullmatch(r"-?\d+", step)]:
        raise AnalysisError(f"expected steps for the {key} of a replay, got {wrong[0]!r}")
    return {int(step): value for step, value in values.items()}


def _sites(read: Reading, key: str = "sites") -> tuple[SiteName, ...]:
    """Return the sites under a key: objects, or pairs of fqn and role of earlier versions."""
    return tuple(_site(site) for site in read.items(key))


def _site(data: object) -> SiteName:
    if isinstance(data, list | tuple) and len(data) == 2:
        data = {"fqn": data[0], "role": data[1]}
    read = Reading(data, "a site")
    return SiteName(read.text("fqn"), read.choice("role", ROLES))
