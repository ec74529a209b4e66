"""Was it the clamping? Snapshots of a training, and replays of a spike with sites un-clamped."""

from unclamp.explain.entry import explain_spike
from unclamp.explain.explanation import Explanation, SiteShare
from unclamp.explain.limits import Limits
from unclamp.explain.snapshots import Rewind, Snapshots
from unclamp.explain.training import Training

__all__ = [
    "Explanation",
    "Limits",
    "Rewind",
    "SiteShare",
    "Snapshots",
    "Training",
    "explain_spike",
]
