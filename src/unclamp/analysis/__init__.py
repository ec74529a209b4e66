"""What a run's log means: spikes of the loss. Torch-free."""

from unclamp.analysis.curves import Curve, read_curve, run_curve
from unclamp.analysis.definitions import spike_score
from unclamp.analysis.robust import SpikeDetector
from unclamp.analysis.spikes import (
    DEFINITIONS,
    Definition,
    Spike,
    find_spikes,
    run_spikes,
    smallest_height,
)

__all__ = [
    "DEFINITIONS",
    "Curve",
    "Definition",
    "Spike",
    "SpikeDetector",
    "find_spikes",
    "read_curve",
    "run_curve",
    "run_spikes",
    "smallest_height",
    "spike_score",
]
