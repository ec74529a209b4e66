"""Runs traps on this build and its devices, and says whether each behaves as documented.

What needs no process of its own runs here, while processes of the others run beside it
(`unclamp.traps.apart`). An experiment that raises is an answer, and not a documented one.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from unclamp.numerics.gpu import architecture
from unclamp.traps.answers import Answer, answer_of
from unclamp.traps.apart import Apart
from unclamp.traps.trap import Fact, Trap, Version, fact_text

AS_DOCUMENTED = "as documented"
OTHERWISE = "not as documented"
UNDOCUMENTED = "not documented"
SKIPPED = "skipped"
FAILED = "failed"
BAD = (OTHERWISE, FAILED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trap did on one device of this build.

    Attributes:
        name: The trap's.
        device: torch's name of the device.
        verdict: `AS_DOCUMENTED`, `OTHERWISE`, `UNDOCUMENTED`, `SKIPPED` or `FAILED`.
        facts: What was found.
        versions: Which versions of torch the documented outcome is of.
        expected: That outcome, in words.
        differences: A sentence for each fact that is otherwise.
        reason: Why it was skipped, or how it failed.
        seconds: How long it ran.
    """

    name: str
    device: str
    verdict: str
    facts: dict[str, Fact] = field(default_factory=dict)
    versions: str | None = None
    expected: dict[str, str] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    reason: str | None = None
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        """Whether it did not behave as documented."""
        return self.verdict in BAD

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def torch_version() -> Version:
    """Return which torch this is: (2, 13)."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def devices_here() -> tuple[str, ...]:
    """Return the devices of this machine that experiments run on."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def run(
    traps: Sequence[Trap],
    *,
    devices: Sequence[str] | None = None,
    patience_s: float = 300,
    told: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:
    """Run traps, each on every device that it is for and that is here.

    Args:
        traps: Which, in the order of the result.
        devices: Where; all of this machine's, without it.
        patience_s: Seconds after which the processes of traps that need some are ended.
        told: Called with a trap's name before it runs.
    """
    here = tuple(devices_here() if devices is None else devices)
    absent = [trap for trap in traps if not set(trap.devices) & set(here)]
    pairs = [(trap, device) for trap in traps for device in trap.devices if device in here]
    reasons = {(t.name, d): t.needs(d) for t, d in pairs}
    beside = [(t, d) for t, d in pairs if (t.ranks or t.apart) and not reasons[t.name, d]]
    outcomes: dict[tuple[str, str], Outcome] = {}
    with Apart(beside, patience_s=patience_s) as apart:
        for trap, device in pairs:
            if reason := reasons[trap.name, device]:
                outcomes[trap.name, device] = _skipped(trap, device, reason)
            elif not (trap.ranks or trap.apart):
                told(trap.name)
                outcomes[trap.name, device] = judged(trap, device, timed(trap, device))
        for trap, device in beside:
            told(trap.name)
            outcomes[trap.name, device] = judged(trap, device, apart.answer(trap, device))
    for trap in absent:
        device = trap.devices[0]
        reason = f"torch sees no {device.upper()} device"
        outcomes[trap.name, device] = _skipped(trap, device, reason)
    return [
        outcomes[trap.name, device]
        for trap in traps
        for device in trap.devices
        if (trap.name, device) in outcomes
    ]


def timed(trap: Trap, device: str) -> Answer:
    """Run one experiment in this process; what raises is the answer."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return answer_of(trap, device, start=start)


def judged(trap: Trap, device: str, answer: Answer) -> Outcome:
    """Compare an answer with what is documented of this torch on this device."""
    names = (device,) if device == "cpu" else (device, architecture(torch.device(device)))
    documented = trap.documented_for(torch_version(), names)
    known: dict[str, Any] = {}
    if documented is not None:
        known["versions"] = documented.versions
        known["expected"] = {k: fact_text(v) for k, v in documented.expected.items()}
    if answer.error is not None:
        verdict, known["reason"] = FAILED, answer.error
    elif documented is None:
        verdict = UNDOCUMENTED
    else:
        known["differences"] = documented.differences(answer.facts)
        verdict = OTHERWISE if known["differences"] else AS_DOCUMENTED
    return Outcome(
        name=trap.name,
        device=device,
        verdict=verdict,
        facts=dict(answer.facts),
        seconds=answer.seconds,
        **known,
    )


def _skipped(trap: Trap, device: str, reason: str) -> Outcome:
    return Outcome(name=trap.name, device=device, verdict=SKIPPED, reason=reason)
