"""From a training run into a run log, and to the dashboards that are watched meanwhile."""

from unclamp.runlog import Every
from unclamp.telemetry.recorder import Recorder
from unclamp.telemetry.sinks import MLflow, Sink, Sinks, TensorBoard, WandB

__all__ = ["Every", "MLflow", "Recorder", "Sink", "Sinks", "TensorBoard", "WandB"]
