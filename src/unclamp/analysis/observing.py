"""Whether a run's casts were only counted, as `unclamp.observe` does: asked here alone."""

from unclamp.runlog import Header


def is_observed(header: Header) -> bool:
    """Whether nothing was cast in the training: the counts are what FP8 would have lost."""
    return bool(header.metadata.get("observed"))
