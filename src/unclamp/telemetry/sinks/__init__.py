"""Where a run's numbers go beside its log: TensorBoard, Weights & Biases, MLflow, or your function.

`numbers` makes one step's table rows into named numbers, `backend` is what the three services
share, `sink` holds the protocol for others and keeps a sink's failure from the run. When the
sinks are called is for the recorder.
"""

from unclamp.telemetry.sinks.mlflow import MLflow
from unclamp.telemetry.sinks.numbers import (
    Histogram,
    SiteInfo,
    histograms,
    per_site,
    site_infos,
    summarise,
)
from unclamp.telemetry.sinks.sink import NumbersFunction, Sink, Sinks
from unclamp.telemetry.sinks.tensorboard import TensorBoard
from unclamp.telemetry.sinks.wandb import WandB

__all__ = [
    "Histogram",
    "MLflow",
    "NumbersFunction",
    "Sink",
    "Sinks",
    "SiteInfo",
    "TensorBoard",
    "WandB",
    "histograms",
    "per_site",
    "site_infos",
    "summarise",
]
