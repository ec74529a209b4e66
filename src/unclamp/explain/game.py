"""What a spike would have been with some sites un-clamped: replays, counted and kept.

A *question* is how the sites are scaled otherwise, and which sites. Its answer is a replay, which
is written to a file before anybody uses it: asked again, also by a later process, it costs
nothing. The budget bounds the answers that are replays.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from unclamp.explain.facts import SiteKey
from unclamp.explain.replay import Replay, SiteCount, Trace, block_scaled
from unclamp.policy import unclamped
from unclamp.scaling import Dynamic, Guarded, HighPrecision, Scaling

Kind = Literal["unclamped", "dynamic", "guarded", "blocks", "high_precision"]
CAP = 100.0
"""A loss counts at most so many times the level: Inf and NaN become this."""


class BudgetSpent(Exception):
    """Another replay would pass the budget."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The steps of a spike, and the level its loss rises from."""

    first: int
    last: int
    level: float

    def loss(self, losses: Mapping[int, float]) -> float:
        """Return the mean loss over the spike's steps; what is not finite counts as the cap."""
        top = CAP * abs(self.level)
        values = [losses[n] for n in range(self.first, self.last + 1)]
        return sum(min(v, top) if math.isfinite(v) else top for v in values) / len(values)


class Game:
    """Answers to questions about one spike.

    Args:
        replay: Makes the replays.
        window: The spike.
        budget: Most answers that are replays; those of earlier processes count.
        cache: The file that keeps answers.
        on_replay: Called after each replay, with its name and the answer.
    """

    def __init__(
        self,
        replay: Replay,
        window: Window,
        *,
        budget: int,
        cache: Path,
        on_replay: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.replay, self.window, self.budget = replay, window, budget
        self.answers: dict[str, Trace] = {}
        self._cache, self._on_replay = cache, on_replay
        self._actual = self._floor = math.nan

    @property
    def spent(self) -> int:
        """Replays so far, those of earlier processes that are of use here included."""
        return len(self.answers)

    @property
    def seconds(self) -> float:
        """Time of all replays."""
        return sum(trace.seconds for trace in self.answers.values())

    def begin(self, actual: Trace) -> None:
        """Take the plain replay; keep earlier answers if they started from the same one."""
        self.answers = {}
        earlier = _read(self._cache)
        if earlier.get("actual") is not None:
            found = earlier["actual"]
            if {n: v.hex() for n, v in found.losses.items()} == {
                n: v.hex() for n, v in actual.losses.items()
            }:
                self.answers = earlier
        self.answers["actual"] = actual
        self._actual, self._floor = self.window.loss(actual.losses), self.window.level
        self._keep("actual")

    @property
    def rise(self) -> float:
        """How far the spike rises; NaN before there is a plain replay."""
        return self._actual - self._floor

    def lower_floor(self, without_clamping: Trace) -> None:
        """Count the spike from what its loss is with nothing clamped, if that is below the level.

        A batch may be easier than those before it; without this, shares would add up to more than
        the whole.
        """
        self._floor = min(self.window.level, self.window.loss(without_clamping.losses))

    def ask(self, kind: Kind, sites: Iterable[SiteKey]) -> Trace:
        """Return the replay with these sites scaled otherwise.

        Raises:
            BudgetSpent: It would be one too many.
        """
        changes: dict[SiteKey, Scaling] = {}
        for key in sorted(sites):
            scaling = self._changed(kind, key)
            if scaling is not None and scaling != self.replay.original(key):
                changes[key] = scaling
        if not changes:
            return self.answers["actual"]
        name = f"{kind}: " + ", ".join(f"{fqn} {role}" for fqn, role in changes)
        return self._answer(
            name, lambda: self.replay.run(changes, last=self.window.last), is_named=True
        )

    def placebo(self, seed: int) -> Trace:
        """Return the replay in which every weight is changed by a 4096th."""
        return self._answer(
            f"placebo {seed}", lambda: self.replay.run({}, last=self.window.last, perturb=seed)
        )

    def removed(self, kind: Kind, sites: Iterable[SiteKey]) -> float:
        """Return the share of the spike that is gone with these sites scaled otherwise."""
        return self.share_gone(self.ask(kind, sites))

    def known(self, kind: Kind, sites: Iterable[SiteKey]) -> float | None:
        """Return what `removed` does if no replay is needed for it, else None."""
        budget, self.budget = self.budget, 0
        try:
            return self.removed(kind, sites)
        except BudgetSpent:
            return None
        finally:
            self.budget = budget

    def share_gone(self, trace: Trace) -> float:
        """Return the share of the spike that is gone in a replay."""
        return (self._actual - self.window.loss(trace.losses)) / self.rise

    def _changed(self, kind: Kind, key: SiteKey) -> Scaling | None:
        before = self.replay.original(key)
        if kind == "unclamped":
            return unclamped(before)
        if kind == "blocks":
            return block_scaled(before)
        if not before.casts:
            return None
        if kind == "high_precision":
            return HighPrecision()
        return Dynamic() if kind == "dynamic" else Guarded()

    def _answer(self, name: str, run: Callable[[], Trace], *, is_named: bool = False) -> Trace:
        if name not in self.answers:
            if self.spent >= self.budget:
                raise BudgetSpent
            self.answers[name] = run()
            self._keep(name)
        return self.answers[name]

    def _keep(self, name: str) -> None:
        data = {key: _to_data(trace) for key, trace in self.answers.items()}
        write_json(self._cache, {"answers": data})
        self._on_replay(name)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all; NaN and Inf become text.

    Raises:
        OSError: The disk does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(strict(data), indent=1, allow_nan=False), encoding="utf-8")
    part.replace(path)


def strict(data: Any) -> Any:
    """Return data with what JSON has no number for as text."""
    if isinstance(data, Mapping):
        return {str(key): strict(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [strict(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data


def _to_data(trace: Trace) -> dict[str, Any]:
    return {
        "losses": {str(n): float(loss).hex() for n, loss in trace.losses.items()},
        "sites": [[*key, asdict(count)] for key, count in trace.sites.items()],
        "underflowed": trace.underflowed,
        "elements": trace.elements,
        "seconds": trace.seconds,
    }


def _read(path: Path) -> dict[str, Trace]:
    """Return the answers of a file; none where there is no such file or it is no longer ours."""
    try:
        data = json.loads(path.read_bytes())["answers"]
        return {
            name: Trace(
                losses={int(n): float.fromhex(v) for n, v in one["losses"].items()},
                sites={(fqn, role): SiteCount(**count) for fqn, role, count in one["sites"]},
                underflowed=one["underflowed"],
                elements=one["elements"],
                seconds=one["seconds"],
            )
            for name, one in data.items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
