"""From a training run into a run log: the recorder."""

from unclamp.telemetry.cadence import Every
from unclamp.telemetry.recorder import Recorder

__all__ = ["Every", "Recorder"]
