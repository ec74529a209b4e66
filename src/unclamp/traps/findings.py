"""All that is told of some traps and their outcomes, as one plain document."""

import platform
from collections.abc import Sequence
from typing import Any

import torch

from unclamp.traps.catalogue import TRAPS
from unclamp.traps.running import Outcome
from unclamp.traps.trap import Trap, fact_text
from unclamp.version import __version__


def findings(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return outcomes, each with its trap's texts, and the build that they belong to."""
    traps = {trap.name: trap for trap in TRAPS}
    return {
        "build": {
            "unclamp": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        },
        "behave": not any(outcome.is_bad for outcome in outcomes),
        "traps": [described(traps[o.name]) | {"outcome": o.to_dict()} for o in outcomes],
    }


def described(trap: Trap) -> dict[str, Any]:
    """Return a trap's texts, and what is documented of it, as plain data."""
    return {
        "name": trap.name,
        "theme": trap.theme,
        "belief": trap.belief,
        "truth": trap.truth,
        "code": trap.code,
        "documented": [
            {
                "device": each.device,
                "versions": each.versions,
                "expected": {name: fact_text(value) for name, value in each.expected.items()},
                "source": each.source,
            }
            for each in trap.documented
        ],
        "cost": trap.cost,
        "remedy": trap.remedy,
        "see": trap.see,
        "telling": trap.telling,
    }
