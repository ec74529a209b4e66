"""A rule tried on logs: every decision that it would have made, and what became of it.

The machine that steers a training (`steering.machine`) runs over the log's amaxes, and each cast is
made, on paper, with the policy that its site had at that moment. A log knows the tensors of the
training that wrote it, and not those that the decisions would have led to.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unclamp.analysis.steering.decisions import Decision
from unclamp.analysis.steering.logged import Row, read_harms, read_prices, read_rows
from unclamp.analysis.steering.machine import OWN_READS, Machine, Tried
from unclamp.analysis.steering.rule import Rule
from unclamp.analysis.whatif.limits import find_limits
from unclamp.errors import AnalysisError
from unclamp.files import write_json
from unclamp.formats import get_format
from unclamp.names import SiteName
from unclamp.runlog import RunLog
from unclamp.shown import Shown
from unclamp.totals import share
from unclamp.version import __version__
from unclamp.written import counted, listed, percent

BACKTEST_KIND = "unclamp-backtest"
SHORT_STAY = 50
"""Steps within which a way up and back that avoided nothing is a false switch."""


@dataclass(frozen=True, kw_only=True)
class RunTested:
    """What a rule does on one log.

    Attributes:
        run: The run's folder, as it was given.
        steps: Steps with casts.
        casts: Casts, of all sites.
        clamped: Casts that would have clamped anything on the rung of their moment.
        first: Of these, those that may have lost more than the tolerance and sent the site up: no
            rule that reacts can foresee them.
        missed: Those that may have lost more and left the site on a rung that clamps.
        missed_measured: Of these, those whose clamp error or price the log measured, above it.
        ups: Switches up.
        downs: Switches down.
        held: Switches that the ceiling on reads forbade.
        false: Ways up and back within 50 steps that avoided nothing.
        idle: Switches up that avoided nothing until the site came back or the log ended.
        avoided: Updates at which a site's lower rung would have clamped too much, or repeated,
            while the site stood above it.
        reads_a_cast: Reads a cast, meant over casts.
        reads: Reads an element, meant over elements.
        decisions: All of them, in the order of steps.
        limits: What the log cannot know, in sentences.
    """

    run: str
    steps: int
    casts: int
    clamped: int
    first: int
    missed: int
    missed_measured: int
    ups: int
    downs: int
    held: int
    false: int
    idle: int
    avoided: int
    reads_a_cast: float
    reads: float
    decisions: tuple[Decision, ...] = ()
    limits: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        data = {k: v for k, v in vars(self).items() if k not in ("decisions", "limits")}
        decisions = [decision.to_dict() for decision in self.decisions]
        return data | {"decisions": decisions, "limits": list(self.limits)}


@dataclass(frozen=True, kw_only=True, repr=False)
class Backtest(Shown):
    """A rule tried on logs of a model; what `Autopilot` wants before it steers.

    Attributes:
        rule: The rule.
        late: Updates that passed before a decision was in force.
        sites: Name and format of each site that it was tried on.
        runs: What it does on each log.
    """

    rule: Rule
    late: int
    sites: Mapping[SiteName, str]
    runs: tuple[RunTested, ...] = field(default=())

    @property
    def ups(self) -> int:
        """Switches up, of all runs."""
        return sum(run.ups for run in self.runs)

    @property
    def missed(self) -> int:
        """Clamps that may have lost more than the tolerance and changed nothing, of all runs."""
        return sum(run.missed for run in self.runs)

    @property
    def false_share(self) -> float:
        """Share of switches up that were false; 0 where there was none."""
        return float(share(sum(run.false for run in self.runs), self.ups))

    @property
    def reads_a_cast(self) -> float:
        """Reads a cast, meant over the casts of all runs."""
        casts = sum(run.casts for run in self.runs)
        return float(share(sum(run.reads_a_cast * run.casts for run in self.runs), casts))

    @property
    def sentences(self) -> list[str]:
        """What came out, and what there is to be wary of."""
        said = [
            f"On {counted(len(self.runs), 'log')} the rule goes up {counted(self.ups, 'time')} and "
            f"comes back {sum(r.downs for r in self.runs):,} times, at {self.reads_a_cast:.3f} "
            f"reads a cast; {percent(self.false_share)} of the switches up are false (back within "
            f"{SHORT_STAY} steps, and nothing avoided)."
        ]
        first, avoided = (sum(getattr(r, n) for r in self.runs) for n in ("first", "avoided"))
        said.append(
            f"{counted(first, 'cast')} could have lost more than {percent(self.rule.tolerance)} "
            f"before the site went up, which no rule that reacts can foresee; "
            f"{counted(avoided, 'later one was', 'later ones were')} avoided."
        )
        if self.missed:
            said.append(
                f"{counted(self.missed, 'cast')} could have lost more than the tolerance without a "
                "switch up: the rule waits for more such casts, or its ceiling on reads forbids it."
            )
        held = sum(run.held for run in self.runs)
        if held:
            said.append(
                f"The ceiling of {self.rule.reads:g} reads a cast forbade "
                f"{counted(held, 'switch', 'switches')} up."
            )
        return said

    def __str__(self) -> str:
        return "\n".join([f"rule: {self.rule}", *self.sentences])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, which `from_dict` reads."""
        return {
            "kind": BACKTEST_KIND,
            "unclamp_version": __version__,
            "rule": self.rule.to_dict(),
            "late": self.late,
            "sites": [name.to_dict() | {"format": fmt} for name, fmt in self.sites.items()],
            "sentences": self.sentences,
            "false_share": self.false_share,
            "missed": self.missed,
            "reads_a_cast": self.reads_a_cast,
            "runs": [run.to_dict() for run in self.runs],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Backtest":
        """Return what `to_dict` wrote, without the decisions.

        Raises:
            AnalysisError: It is something else.
        """
        try:
            if data["kind"] != BACKTEST_KIND:
                raise ValueError(f"the kind is {data['kind']!r}")
            runs = [
                RunTested(**{k: v for k, v in run.items() if k not in ("decisions", "limits")},
                          limits=tuple(run["limits"]))
                for run in data["runs"]
            ]  # fmt: skip
            sites = {SiteName.from_dict(site): site["format"] for site in data["sites"]}
            rule = Rule.from_dict(data["rule"])
            return cls(rule=rule, late=data["late"], sites=sites, runs=tuple(runs))
        except (KeyError, TypeError, ValueError) as error:
            raise AnalysisError(
                f"expected what `unclamp backtest RUN --out FILE` writes: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "Backtest":
        """Read what `save` wrote.

        Raises:
            AnalysisError: There is no such file, or it is something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AnalysisError(f"cannot read the backtest {str(path)!r}: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file, for a training to read."""
        write_json(Path(path), self.to_dict())


def backtest(
    logs: Sequence[RunLog | str | Path] | RunLog | str | Path, rule: Rule, *, late: int = 0
) -> Backtest:
    """Return what a rule would have done on logs.

    Every site begins on the lowest rung, whatever scaling the log's training had.

    Args:
        logs: Runs of one model, or their folders.
        rule: The rule.
        late: Updates that pass before a decision is in force: 0 as on a CPU, 1 as on a GPU.

    Raises:
        AnalysisError: No log, a log without casts, or logs of different models.
        RunLogError: A folder holds no run.
    """
    given = [logs] if isinstance(logs, RunLog | str | Path) else list(logs)
    if not given:
        raise AnalysisError("expected at least one log to try a rule on")
    runs, sites = [], None
    for each in given:
        if isinstance(each, RunLog):
            tested, own = _test(each, rule, late)
        else:
            with RunLog.open(each) as log:
                tested, own = _test(log, rule, late)
        if sites is not None and own.keys() != sites.keys():
            other = sorted(map(str, own.keys() ^ sites.keys()))
            raise AnalysisError(
                f"expected logs of one model: {tested.run} has other sites than the first log, "
                f"such as {listed(other, most=3)}"
            )
        sites = own
        runs.append(tested)
    return Backtest(rule=rule, late=late, sites=sites or {}, runs=tuple(runs))


# ---- one log -----------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums over the updates of a log, and the ways up that have not ended."""

    casts: int = 0
    clamped: int = 0
    first: int = 0
    missed: int = 0
    missed_measured: int = 0
    avoided: int = 0
    reads: float = 0.0
    read: float = 0.0
    elements: int = 0


def _test(log: RunLog, rule: Rule, late: int) -> tuple[RunTested, dict[SiteName, str]]:
    sites = [site for site in log.named_sites() if not site.only_counted]
    formats = [get_format(site.format) for site in sites]
    machine = Machine(rule, [site.name for site in sites], formats)
    harms, prices = read_harms(log, rule, sites), read_prices(log, rule, sites)
    tally, decisions, steps = _Tally(), [], 0
    in_force = [machine.rung.copy() for _ in range(late + 1)]
    for row in read_rows(log, sites):
        made, tried = machine.step(row.step, row.amax, prices=prices.get(row.step))
        _add(tally, machine, tried, row, in_force.pop(0), harms)
        in_force.append(machine.rung.copy())
        decisions += made
        steps += 1
    if not steps:
        raise AnalysisError(
            f"{log.path} has no casts: a backtest needs the log of an FP8 training, or of an "
            "observed one"
        )
    tested = RunTested(
        run=str(log.path),
        steps=steps,
        casts=tally.casts,
        clamped=tally.clamped,
        first=tally.first,
        missed=tally.missed,
        missed_measured=tally.missed_measured,
        ups=sum(d.kind == "up" for d in decisions),
        downs=sum(d.kind == "down" for d in decisions),
        held=sum(d.kind == "held" for d in decisions),
        avoided=tally.avoided,
        reads_a_cast=float(share(tally.reads, tally.casts)),
        reads=float(share(tally.read, tally.elements)),
        decisions=tuple(decisions),
        limits=find_limits(log, rule.ladder, looked_at=1, known=1),
        **_judged(decisions, machine),
    )
    return tested, {site.name: site.format for site in sites}


def _add(
    tally: _Tally,
    machine: Machine,
    tried: Tried,
    row: Row,
    rung: np.ndarray,
    harms: set[tuple[int, int]],
) -> None:
    """Add an update whose casts were made on these rungs."""
    ladder, everyone = machine.rule.ladder, np.arange(len(rung))
    cast = tried.is_cast
    clamps = np.array([scaling.clamps for scaling in ladder])
    flows = tried.overflows[rung, everyone] & cast
    clamped = flows & clamps[rung]
    harmful = clamped & (tried.clamp_error[rung, everyone] > machine.rule.tolerance)
    stays = harmful & clamps[machine.rung]
    tally.casts += int(cast.sum())
    tally.clamped += int(clamped.sum())
    tally.missed += int(stays.sum())
    tally.first += int((harmful & ~stays).sum())
    # What the log measured as harmful is missed too where the bound says that it could not be.
    measured = [i for i in np.flatnonzero(clamped & clamps[machine.rung])
                if (row.step, int(i)) in harms]  # fmt: skip
    tally.missed_measured += len(measured)
    lower = np.maximum(rung - 1, 0)
    tally.avoided += int((tried.speaks[lower, everyone] & (rung > 0)).sum())
    own = np.array([OWN_READS if s.takes_own else float(s.casts) for s in ladder])
    reads = own[rung] + (flows & np.array([s.guards for s in ladder])[rung])
    tally.reads += float(reads[cast].sum())
    tally.read += float((reads * row.elements)[cast].sum())
    tally.elements += int(row.elements[cast].sum())


def _judged(decisions: Sequence[Decision], machine: Machine) -> dict[str, int]:
    """Return how many ways up avoided nothing: within a short stay, and until the end."""
    open_ways: dict[SiteName, list[Decision]] = {}
    false = idle = 0
    for each in decisions:
        ways = open_ways.setdefault(each.site, [])
        if each.kind == "up":
            ways.append(each)
        elif each.kind == "down" and ways:
            began = ways.pop()
            idle += each.avoided == 0
            false += each.avoided == 0 and each.step - began.step <= SHORT_STAY
    for name, ways in open_ways.items():
        idle += bool(ways) and machine.avoided(name) == 0
    return {"false": false, "idle": idle}
