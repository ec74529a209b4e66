"""What-if: what other policies would have done to the casts of a log."""

from unclamp.analysis.whatif.evaluate import evaluate, trace
from unclamp.analysis.whatif.outcome import Lost, Outcome, Range, SiteOutcome, WhatIf
from unclamp.analysis.whatif.policies import grid, parse_policy, policy_text

__all__ = [
    "Lost",
    "Outcome",
    "Range",
    "SiteOutcome",
    "WhatIf",
    "evaluate",
    "grid",
    "parse_policy",
    "policy_text",
    "trace",
]
