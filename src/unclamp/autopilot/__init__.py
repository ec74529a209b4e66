"""Autopilot: sites of a training change their scaling by a rule that was tried on logs."""

from unclamp.autopilot.pilot import Autopilot

__all__ = ["Autopilot"]
