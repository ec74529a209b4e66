"""From which share of a spike on something is the cause, most of it or a part; and in words."""

CLAMPING = 0.9
"""Least share of a spike that goes with the clamps for clamping to be the cause."""
MOST = 0.5
"""Least share for it to be most of the cause; below it is a part."""
NOT_CLAMPING = 0.1
"""A spike of which less goes with the clamps has another cause."""


def part_of_cause(share: float) -> str:
    """Return what part of the cause clamping is if such a share goes with the clamps."""
    if share >= CLAMPING:
        return "the cause"
    return "most of the cause" if share >= MOST else "a part of the cause"


def part_of_fp8(share: float) -> str:
    """Return what part of a spike is FP8 if such a share goes in high precision."""
    if share >= CLAMPING:
        return "it is FP8"
    return "most of it is FP8" if share >= MOST else "most of it is not FP8 at all"
