"""What an autopilot did in a run: its events as lines, and a sentence for the run. Torch-free."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from unclamp.names import shown
from unclamp.runlog import AUTOPILOT_EVENT, RunLog
from unclamp.written import counted, percent, times

SITES_IN_TEXT = 3


def decisions_text(decisions: Sequence[Any]) -> str:
    """Return an event's decisions as one line, with what each was made from."""
    known = [d for d in decisions if isinstance(d, dict)]
    said = [_decision_text(decision) for decision in known[:SITES_IN_TEXT]]
    more = len(known) - SITES_IN_TEXT
    return ", ".join(said) + (f" and {counted(more, 'more site')}" if more > 0 else "")


def read_steering(log: RunLog) -> list[str]:
    """Return sentences on what an autopilot decided in a run; none where none steered it."""
    rows = log.sql(
        f"SELECT DISTINCT step, data FROM events WHERE kind = '{AUTOPILOT_EVENT}' ORDER BY step"
    )
    events = [_read(text) for text in rows.column("data").to_pylist()]
    if not any("rule" in event for event in events):
        return []
    (first, *_) = [event for event in events if "rule" in event]
    decisions = [d for event in events for d in event.get("decisions", []) if isinstance(d, dict)]
    of = {kind: sum(d.get("kind") == kind for d in decisions) for kind in ("up", "down", "held")}
    said = (
        f"An autopilot steered {counted(first.get('steered', 0), 'site')} by the rule "
        f"{first['rule']}: {of['up']:,} switched up, {of['down']:,} came back"
    )
    if of["held"]:
        said += f", {of['held']:,} were held by the ceiling on reads"
    tested = first.get("tested_on") or []
    on = counted(len(tested), "log") if tested else "no log"
    return [f"{said}. The rule was tried on {on} before."]


def _read(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _decision_text(decision: Mapping[str, Any]) -> str:
    name = f"{shown(str(decision.get('fqn')))} {decision.get('role')}"
    way = f"{_kind(decision.get('before'))} → {_kind(decision.get('after'))}"
    held = "held, not " if decision.get("kind") == "held" else ""
    return f"{name} {held}{way} ({_why(decision)})"


def _kind(policy: object) -> str:
    return str(policy).split("(", 1)[0]


def _why(decision: Mapping[str, Any]) -> str:
    reason = decision.get("reason")
    if reason == "clamped":
        over, error = decision.get("overshoot"), decision.get("clamp_error")
        said = [f"overshoot {times(over)}"] if isinstance(over, int | float) else []
        if isinstance(error, int | float):
            said.append(f"clamp error up to {percent(error)}")
        return ", ".join(said)
    if reason == "clean":
        return f"{decision.get('clean')} clean updates"
    if reason == "repeated":
        return f"{decision.get('spoke')} of {decision.get('of')} casts repeated"
    return str(reason)
