"""How far back an answer about a spike reaches: from where it was replayed, what clamped before.

A clamp can do its harm many steps later: a gradient that was clamped lies in the momentum, and the
weight it bends may be read when a rare token comes again. So "it is not the clamping" holds only
for the steps in which nothing was clamped, and is never said without the first of them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from unclamp.analysis.reading import Reading
from unclamp.analysis.shares import gone
from unclamp.names import ROLES, SiteName
from unclamp.runlog import RunLog
from unclamp.totals import CLAMPED_SQL, LOOK_FIRST_SQL, LOST_SQL
from unclamp.written import counted

Stop = Literal[
    "",
    "found",
    "nothing clamped",
    "no older snapshot",
    "no calm step",
    "budget",
    "chaos",
    "not reproduced",
    "scaling changed",
    "unreadable",
]
"""Why nothing older was asked; empty while there is no reason yet."""
_REASONS = {
    "no older snapshot": "there is no older snapshot that leads up to the spike",
    "no calm step": (
        "no step between an older snapshot and the spike is calm, so that a part of the spike is "
        "not told from a better training"
    ),
    "budget": "the budget of replays was spent",
    "not reproduced": "the losses from the next older snapshot did not come back",
    "chaos": "what goes of it from further back is not told from chaos",
    "scaling changed": "the next older snapshot was taken under another scaling",
    "unreadable": "the next older snapshot could not be used",
}
LISTED_SITES = 8
FIRST_NUMBERS = (0, 1)
"""Trainings number their first step so; a log that begins later may lack steps before."""


@dataclass(frozen=True, kw_only=True)
class Clamped:
    """What a run's log says was clamped before a step.

    Attributes:
        steps: How many steps had clamped elements.
        last: The last of them; None for none.
        hardest: The step of the cast with the largest clamp error; None for none.
        sites: The sites, that cast's first, by their largest clamp error; the first of many.
        is_complete: Whether the log holds every step in which anything clamped; not so where only
            every n-th step's casts were recorded.
        begins: The first step in the log; 0 where nothing was trained before it.
    """

    steps: int = 0
    last: int | None = None
    hardest: int | None = None
    sites: tuple[SiteName, ...] = ()
    is_complete: bool = True
    begins: int = 0

    def covers(self, step: int) -> bool:
        """Whether the log holds every step from this one on in which anything clamped."""
        return self.is_complete and self.begins <= step

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return what a dict holds.

        Raises:
            AnalysisError: A value is missing or of another type.
        """
        read = Reading(data, "what clamped before")
        sites = (Reading(site, "a site") for site in read.items("sites"))
        return cls(
            steps=read.whole("steps"),
            last=read.maybe_whole("last"),
            hardest=read.maybe_whole("hardest"),
            sites=tuple(SiteName(s.text("fqn"), s.choice("role", ROLES)) for s in sites),
            is_complete=bool(read.maybe_flag("is_complete")),
            begins=read.whole("begins", 0),
        )

    def words(self) -> str:
        """Return a sentence."""
        lacks = () if self.is_complete else ("lacks the casts of many steps",)
        begins = (f"begins at step {self.begins}",) if self.begins else ()
        which = " and ".join((*begins, *lacks))
        where = f"The log, which {which}," if which else "The log"
        if self.last is None:
            return f"{where} shows nothing clamped before."
        site = f" ({self.sites[0]})" if self.sites else ""
        if self.steps == 1:
            return f"{where} shows clamped elements before, at step {self.last}{site}."
        return (
            f"{where} shows clamped elements in {self.steps:,} steps before, the last of them step "
            f"{self.last}, and the largest clamp error at step {self.hardest}{site}."
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What goes of a spike with nothing clamped from a step on.

    Attributes:
        step: The step.
        steps: Steps of a replay from there.
        removed: Share of the spike that is gone.
    """

    step: int
    steps: int
    removed: float

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return what a dict holds.

        Raises:
            AnalysisError: A value is missing or of another type.
        """
        read = Reading(data, "a start that was asked")
        return cls(
            step=read.whole("step"), steps=read.whole("steps"), removed=read.number("removed")
        )


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How far back an answer reaches.

    Attributes:
        asked: The starts from which nothing clamped, the latest first; at least one.
        clamped: What the log says was clamped before the earliest; None where there is no log.
        stop: Why nothing older was asked.
        hidden: The answer from an older start that could not be used, as chaos moves as much or
            the budget did not suffice to ask how much it moves; None where there is none.
    """

    asked: tuple[Asked, ...]
    clamped: Clamped | None = None
    stop: Stop = ""
    hidden: Asked | None = None

    @property
    def first_step(self) -> int:
        """The first step that was replayed with nothing clamped."""
        return self.asked[-1].step

    @property
    def is_open(self) -> bool:
        """Whether something may have clamped before, that was not asked about."""
        clamped = self.clamped
        if self.first_step == 0:  # numbers of steps begin here
            return False
        return clamped is None or clamped.last is not None or not clamped.covers(0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "first_step": self.first_step}

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Return what a dict holds.

        Raises:
            AnalysisError: A value is missing or of another type.
        """
        read = Reading(data, "a horizon")
        return cls(
            asked=tuple(map(Asked.from_dict, read.items("asked"))),
            clamped=Clamped.from_dict(read.item("clamped")) if read.has("clamped") else None,
            stop=read.choice("stop", get_args(Stop), ""),
            hidden=Asked.from_dict(read.item("hidden")) if read.has("hidden") else None,
        )

    def before(self) -> str:
        """Say what is known of the steps before the first that was asked."""
        if self.hidden is not None:
            known = "" if self.clamped is None else f" {self._logged()}"
            return f"{self._about_hidden(self.hidden)}{known}"
        if not self.is_open:
            is_known = self.clamped is not None and self.clamped.covers(0)
            return Clamped().words() if is_known else "No step comes before."
        reason = _REASONS.get(self.stop, "")
        said = f"Steps before {self.first_step} were not replayed{': ' if reason else ''}{reason}."
        return f"{said} {self._logged()}"

    def _about_hidden(self, hidden: Asked) -> str:
        why = (
            "the budget of replays was spent before it was asked how much of that is chaos"
            if self.stop == "budget"
            else "chaos moves too much from there for that to tell anything"
        )
        return (
            f"With nothing clamped from step {hidden.step} on {gone(hidden.removed)}, but {why}: "
            f"whether clamping before step {self.first_step} is the cause is not known."
        )

    def _logged(self) -> str:
        if self.clamped is None:
            return "Whether anything clamped in them is not known."
        if self.clamped.begins >= self.first_step > 0:
            return f"The log begins at step {self.clamped.begins}."
        return self.clamped.words()

    def cost(self) -> str:
        """Say what an older start costs; empty where only one was asked."""
        if len(self.asked) < 2:
            return ""
        near, far = self.asked[0], self.asked[-1]
        return (
            f"A replay from step {near.step} takes {counted(near.steps, 'step')}, and one from "
            f"step {far.step} takes {far.steps}."
        )


_COMPUTED = "SELECT DISTINCT site, rank, fqn, role FROM sites WHERE NOT only_counted"


def clamped_before(run: Path, step: int) -> Clamped:
    """Return what a run's log says was clamped before a step, ranks taken together.

    Sites that are only counted are left out: what they clamp changes nothing.

    Raises:
        RunLogError: The folder holds no run.
    """
    with RunLog.open(run) as log:
        cadence = log.header.cadence
        rows = log.sql(
            f"SELECT fqn, role, max(step) AS last, max({LOST_SQL}) AS error, "
            f"arg_max(step, {LOST_SQL}) AS hardest FROM casts "
            f"JOIN ({_COMPUTED}) USING (site, rank) "
            f"WHERE {LOOK_FIRST_SQL} AND {CLAMPED_SQL} AND step < $step "
            "GROUP BY ALL ORDER BY error DESC, fqn, role",
            step=step,
        ).to_pylist()
        (logged,) = log.sql("SELECT min(step) AS first FROM steps").to_pylist()
        (total,) = log.sql(
            "SELECT count(DISTINCT step) AS steps FROM casts "
            f"SEMI JOIN ({_COMPUTED}) USING (site, rank) WHERE {LOOK_FIRST_SQL} AND {CLAMPED_SQL} "
            "AND step < $step",
            step=step,
        ).to_pylist()
    sites = [SiteName.from_dict({"fqn": row["fqn"], "role": row["role"]}) for row in rows]
    return Clamped(
        steps=total["steps"],
        last=max((row["last"] for row in rows), default=None),
        hardest=rows[0]["hardest"] if rows else None,
        sites=tuple(sites[:LISTED_SITES]),
        is_complete=cadence is None or cadence.casts.or_clamped or not cadence.is_sparse,
        begins=_first_unless_of_training(step if logged["first"] is None else logged["first"]),
    )


def _first_unless_of_training(step: int) -> int:
    return 0 if step in FIRST_NUMBERS else step
