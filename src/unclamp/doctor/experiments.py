"""Verdicts of the experiments of `unclamp.traps` that need neither processes nor a compiler."""

from dataclasses import asdict, dataclass
from typing import Any

from unclamp.traps import TRAPS, Outcome, Trap, run

SLOW = "hopper-accumulation"
"""It needs numba's compiler, and says nothing of the device."""
THEMES = ("casts", "scales", "gemms", "sums")


@dataclass(frozen=True, kw_only=True)
class TrapAnswer:
    """A trap's verdict here; `detail` is what is otherwise, or why it was not tried."""

    name: str
    verdict: str
    detail: str | None = None
    is_bad: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def probe_traps(device: str) -> tuple[TrapAnswer, ...]:
    """Run the quick traps that are for a device."""
    return tuple(map(_answer, run(quick_traps(device), devices=[device])))


def quick_traps(device: str) -> list[Trap]:
    """Return the traps of casts, scales, GEMMs and sums for a device."""
    return [t for t in TRAPS if device in t.devices and t.theme in THEMES and t.name != SLOW]


def _answer(outcome: Outcome) -> TrapAnswer:
    detail = outcome.reason or "; ".join(outcome.differences) or None
    return TrapAnswer(
        name=outcome.name, verdict=outcome.verdict, detail=detail, is_bad=outcome.is_bad
    )
