"""How much a single cast may lose before advice calls it harmful."""

from dataclasses import dataclass

import numpy as np

from unclamp.names import Role
from unclamp.totals import clamp_error_bound

MILD = 4.0
"""Overshoot of inputs and weights up to which clamping was never seen to do harm in plain
trainings; the planted ones that did are above 30 (docs/deciding.md)."""
MILD_GRADIENT = 25.0
"""The same of gradients. A cast of a gradient changes no loss of its step, and of trainings whose
gradients overshot 14 to 25 times at every twentieth step none lost anything that could be measured
(lab/LOG.md, "few labels")."""


@dataclass(frozen=True, kw_only=True)
class Harm:
    """Clamp error of a single cast that is tolerated, fraction in [0, 1).

    Attributes:
        value: Of inputs and weights.
        gradient: Of gradients.
    """

    value: float = clamp_error_bound(MILD)
    gradient: float = clamp_error_bound(MILD_GRADIENT)

    def of(self, role: Role) -> float:
        """Return that of an operand."""
        return self.gradient if role == "grad_output" else self.value


def tolerated_overshoot(harm: float) -> float:
    """Return the overshoot whose largest possible clamp error is `harm`, in [0, 1)."""
    return float(1 / (1 - np.sqrt(harm)))
