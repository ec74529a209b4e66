"""What a run log means: plain data in, plain data out, without torch."""

from unclamp.analysis.spikes import Spike, find_spikes

__all__ = ["Spike", "find_spikes"]
