"""What a run's log means: spikes of the loss, and whether clamping goes with them. Torch-free."""

from unclamp.analysis.association import Association, SiteEvidence, associate
from unclamp.analysis.curves import Curve, read_curve, run_curve
from unclamp.analysis.definitions import spike_score
from unclamp.analysis.divergences import (
    Divergence,
    DivergenceDetector,
    find_divergences,
    run_divergences,
)
from unclamp.analysis.gradients import (
    ClampedGradients,
    clamped_gradients,
    clamped_gradients_by,
)
from unclamp.analysis.paired import PairedDifference, paired_difference
from unclamp.analysis.prices import Prices, SitePrice, cast_prices
from unclamp.analysis.robust import SpikeDetector
from unclamp.analysis.spikes import (
    DEFINITIONS,
    Definition,
    Spike,
    find_spikes,
    run_spikes,
    smallest_height,
)
from unclamp.analysis.unjudged import is_judged, unjudged_in_words

__all__ = [
    "DEFINITIONS",
    "Association",
    "ClampedGradients",
    "Curve",
    "Definition",
    "Divergence",
    "DivergenceDetector",
    "PairedDifference",
    "Prices",
    "SiteEvidence",
    "SitePrice",
    "Spike",
    "SpikeDetector",
    "associate",
    "cast_prices",
    "clamped_gradients",
    "clamped_gradients_by",
    "find_divergences",
    "find_spikes",
    "is_judged",
    "paired_difference",
    "read_curve",
    "run_curve",
    "run_divergences",
    "run_spikes",
    "smallest_height",
    "spike_score",
    "unjudged_in_words",
]
