"""Rows of casts from readings of Transformer Engine's states; all of it on the writer's thread."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unclamp.formats import Format
from unclamp.integrations.nvdlfw_rows import NONFINITE_EVENT
from unclamp.integrations.te_histories import Casts, Reading, Rule, Tracker, updates_of
from unclamp.integrations.te_layouts import State, repeats_lower
from unclamp.integrations.te_reading import Copied
from unclamp.names import SiteName
from unclamp.runlog import Columns
from unclamp.totals import headroom_bits, scaled_amax

UNREAD_EVENT = "unread"
"""The event of a step whose casts could not be followed."""
TOO_MANY = (
    "the scales of Transformer Engine were updated more than {most} times between two calls of "
    "step (microbatches or evaluations), or more often than its history has rows, or its state was "
    "loaded or reset: the casts of such steps are not in the log, which has an event 'unread' for "
    "each. If they were microbatches say record_transformer_engine(..., microbatches={more}), and "
    "have an amax_history_len of two more at least"
)


@dataclass
class _Followed:
    """A state, what follows it, and the ids of its columns."""

    state: State
    tracker: Tracker
    format: Format
    used: frozenset[int] = frozenset()
    ids: dict[int, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of its history, and columns."""
        return self.tracker.rule.length, self.tracker.columns


class CastRows:
    """Makes the rows of a run from what was read at each step.

    Args:
        ids: Free ids of sites.
        microbatches: Most updates that are looked for.
    """

    def __init__(self, ids: Iterator[int], *, microbatches: int) -> None:
        self._ids, self._microbatches = ids, microbatches
        self._followed: dict[tuple[str, str], _Followed] = {}
        self._sites: list[tuple[int, SiteName, _Followed]] = []
        self._events: list[tuple[int, str, dict[str, Any]]] = []
        self._warnings: list[str] = []
        self._told: set[str] = set()

    def begin(self, copied: Copied) -> None:
        """Take what is there before the first step, all rows, as the past."""
        for state, reading in copied.readings():
            self._follow(state, reading)

    def casts(self, step: int, copies: Sequence[Copied]) -> Columns:
        """Return the rows of a step."""
        read = [pair for copied in copies for pair in copied.readings()]
        pairs = [(self._of(state, reading), reading) for state, reading in read]
        forward, backward = updates_of(
            *(
                [f.tracker.candidates(r) for f, r in pairs if f.state.direction == direction]
                for direction in ("forward", "backward")
            )
        )
        rows: list[dict[str, Any]] = []
        lost: set[str] = set()
        for followed, reading in pairs:
            common = forward if followed.state.direction == "forward" else backward
            updates = _own(followed.tracker.candidates(reading), common)
            if updates is None:
                followed.tracker.start_again(reading)
                lost.add(followed.state.fqn)
                continue
            found = followed.tracker.advance(reading, updates, followed.format.overflow_limit)
            rows += self._rows(step, followed, found)
        if lost:
            self._events.append((step, UNREAD_EVENT, {"modules": sorted(lost)}))
            most = self._microbatches + 1
            self._say(TOO_MANY.format(most=most, more=4 * self._microbatches))
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def new_sites(self) -> Columns:
        """Return the rows of sites that have cast for the first time."""
        taken, self._sites = self._sites, []
        if not taken:
            return {}
        states = [followed.state for _, _, followed in taken]
        formats = [followed.format for _, _, followed in taken]
        return {
            "site": [number for number, _, _ in taken],
            "fqn": [name.fqn for _, name, _ in taken],
            "role": [name.role for _, name, _ in taken],
            "format": [fmt.name for fmt in formats],
            "scaling": ["delayed"] * len(taken),
            "history_len": [len(state.history) for state in states],
            "granularity": ["tensor"] * len(taken),
            "format_max": [fmt.max for fmt in formats],
            "replicated": [repeats_lower(state) for state in states],
            "only_counted": [False] * len(taken),
        }

    def events(self) -> Columns:
        """Return the events since the last call."""
        taken, self._events = self._events, []
        if not taken:
            return {}
        return {
            "step": [step for step, _, _ in taken],
            "kind": [kind for _, kind, _ in taken],
            "data": [json.dumps(data) for _, _, data in taken],
        }

    def take_warnings(self) -> list[str]:
        """Return what the user is to be told, each once."""
        taken, self._warnings = self._warnings, []
        return taken

    def _say(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._warnings.append(text)

    def _of(self, state: State, reading: Reading) -> _Followed:
        """Return what follows a state; one that has come up since began with scales of 1.

        One that has got another shape is begun anew, with what is there as its past.
        """
        known = self._followed.get((state.fqn, state.direction))
        shape = (len(state.history), reading.scale.size)
        if known is not None and known.shape == shape:
            return known
        if known is not None:
            return self._follow(state, reading, ids=known)
        rows = max(len(state.history) - (state.timing == "after"), 0)
        blank = Reading(
            newest=np.zeros((rows, reading.scale.size), np.float32),
            scale=np.ones_like(reading.scale),
        )
        return self._follow(state, blank)

    def _follow(self, state: State, reading: Reading, ids: _Followed | None = None) -> _Followed:
        recipe, fmt = state.recipe, state.format
        reduce = getattr(recipe, "amax_compute_algo", "max")
        is_own = callable(reduce) or getattr(recipe, "scaling_factor_compute_algo", None)
        rule = Rule(
            length=len(state.history),
            largest=math.ldexp(fmt.max, -int(getattr(recipe, "margin", 0))),
            reduce=None if is_own else "max" if reduce == "max" else "most_recent",
            timing=state.timing,
        )
        followed = _Followed(state=state, tracker=Tracker(rule, reading), format=fmt)
        if ids is not None and ids.tracker.columns == followed.tracker.columns:
            followed.used, followed.ids = ids.used, ids.ids
        self._followed[state.fqn, state.direction] = followed
        return followed

    def _rows(self, step: int, followed: _Followed, found: Casts) -> Iterator[dict[str, Any]]:
        columns = np.flatnonzero(found.casts).tolist()
        self._number(followed, columns)
        broken = []
        for column in columns:
            number = followed.ids.get(column)
            if number is None:
                continue
            amax, scale = _known(found.amax[column]), _known(found.scale[column])
            if found.nonfinite[column]:
                broken.append(column)
            yield {
                "step": step,
                "site": number,
                "amax": amax,
                "scale": scale,
                "recast": 0,
                "clamped": {1: True, 0: False}.get(int(found.clamped[column])),
                "microsteps": int(found.casts[column]),
                "headroom_bits": _headroom(amax, scale, followed.format),
                "scale_age": int(found.age[column]) if found.age[column] > 0 else None,
            }
        if broken:
            names = followed.state.names(followed.used)
            sites = [names[column].to_dict() for column in broken if column in names]
            self._events.append((step, NONFINITE_EVENT, {"sites": sites}))

    def _number(self, followed: _Followed, columns: Sequence[int]) -> None:
        if not followed.used.issuperset(columns):
            followed.used |= frozenset(columns)
            for column, name in followed.state.names(followed.used).items():
                if column not in followed.ids:
                    followed.ids[column] = next(self._ids)
                    self._sites.append((followed.ids[column], name, followed))


def _own(candidates: set[int], common: int | None) -> int | None:
    """Return a state's updates: those of its direction, or else the fewest that explain it."""
    if common is not None and common in candidates:
        return common
    return min(candidates, default=None)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _headroom(amax: float | None, scale: float | None, fmt: Format) -> float | None:
    if amax is None or scale is None:
        return None
    scaled = scaled_amax(amax, scale)
    return headroom_bits(scaled, fmt.max) if 0 < scaled < math.inf else None
