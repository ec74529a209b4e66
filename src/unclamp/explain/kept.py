"""Answers of replays on disk, so that nobody asks twice: those about one spike from one start.

What identifies the start is in the file's name (`start`); whether the answers are still of use is
for `game` to say.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unclamp.analysis.counterfactual import Question
from unclamp.explain.replay import SiteCount, Trace
from unclamp.files import write_json
from unclamp.names import SiteName


@dataclass(frozen=True, kw_only=True)
class Screened:
    """What a screening pass found.

    Attributes:
        effects: First-order change of the losses by site (`screening`).
        seconds: Duration.
    """

    effects: Mapping[SiteName, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Answers by question, and the screening pass if there was one."""

    answers: Mapping[Question, Trace] = field(default_factory=dict)
    screened: Screened | None = None


def write_kept(path: Path, kept: Kept) -> None:
    """Write answers to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"answers": [_to_data(*pair) for pair in kept.answers.items()]}
    if kept.screened is not None:
        effects = [[s.fqn, s.role, float(x).hex()] for s, x in kept.screened.effects.items()]
        data["screened"] = {"effects": effects, "seconds": kept.screened.seconds}
    write_json(path, data)


def read_kept(path: Path) -> Kept:
    """Read the answers of a file; none where there is no such file or it is no longer ours."""
    try:
        data = json.loads(path.read_bytes())
        answers = {
            Question.from_dict(question): _to_trace(answer)
            for question, answer in _pairs(data["answers"])
        }
        return Kept(answers=answers, screened=_to_screened(data.get("screened")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Kept()


def exact(trace: Trace) -> dict[int, str]:
    """Return losses as text that is equal only for equal bits; NaN equals NaN."""
    return {step: float(loss).hex() for step, loss in trace.losses.items()}


def _to_data(question: Question, trace: Trace) -> dict[str, Any]:
    return {
        "question": question.to_dict(),
        "losses": {str(step): text for step, text in exact(trace).items()},
        "sites": [[site.fqn, site.role, asdict(count)] for site, count in trace.sites.items()],
        "underflowed": trace.underflowed,
        "elements": trace.elements,
        "seconds": trace.seconds,
        "underflow": [[site.fqn, site.role, share] for site, share in trace.underflow.items()],
    }


def _pairs(kept: Any) -> Iterator[tuple[Any, Any]]:
    """Yield questions and answers; an earlier version kept answers by the question's name."""
    if isinstance(kept, Mapping):
        yield from (({"name": name}, data) for name, data in kept.items())
    else:
        yield from ((data["question"], data) for data in kept)


def _to_trace(data: Mapping[str, Any]) -> Trace:
    return Trace(
        losses={int(step): float.fromhex(text) for step, text in data["losses"].items()},
        sites={_site(fqn, role): SiteCount(**count) for fqn, role, count in data["sites"]},
        underflowed=data["underflowed"],
        elements=data["elements"],
        seconds=data["seconds"],
        underflow={_site(fqn, role): share for fqn, role, share in data.get("underflow", [])},
    )


def _to_screened(data: Mapping[str, Any] | None) -> Screened | None:
    if data is None:
        return None
    effects = {_site(fqn, role): float.fromhex(text) for fqn, role, text in data["effects"]}
    return Screened(effects=effects, seconds=data["seconds"])


def _site(fqn: str, role: str) -> SiteName:
    return SiteName.from_dict({"fqn": fqn, "role": role})
