"""From a training run into a run log, and into whatever else shall see it: recorder and sinks."""

from unclamp.telemetry.recorder import Recorder
from unclamp.telemetry.sinks import MLflow, Sink, Sinks, TensorBoard, WandB

__all__ = ["MLflow", "Recorder", "Sink", "Sinks", "TensorBoard", "WandB"]
