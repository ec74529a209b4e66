"""Who trained how long with which scaling, in public: what is known before any log is read.

Figures and sources only. Tokens decide nothing by themselves: how often amaxes outrun their
histories does, and that is what a log shows.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublicRun:
    """A training that somebody reported.

    Attributes:
        scaling: How its tensors were scaled.
        tokens: How long, tokens.
        outcome: What became of it.
        source: Where that stands.
    """

    scaling: str
    tokens: float
    outcome: str
    source: str


PUBLIC_RUNS = (
    PublicRun(
        scaling="delayed, with SwiGLU",
        tokens=200e9,
        outcome="a 7B model diverged near here",
        source="arXiv 2409.12517",
    ),
    PublicRun(
        scaling="delayed, with an architecture made for it (FOG)",
        tokens=450e9,
        outcome="stable",
        source="arXiv 2505.20524",
    ),
    PublicRun(
        scaling="dynamic, a scale a tensor",
        tokens=20e12,
        outcome="stable (Nemotron-H 56B)",
        source="arXiv 2504.03624",
    ),
    PublicRun(
        scaling="dynamic, blocks of 1x128 and 128x128",
        tokens=14.8e12,
        outcome="stable (DeepSeek-V3)",
        source="arXiv 2412.19437",
    ),
    PublicRun(
        scaling="dynamic, MX blocks, scales rounded up",
        tokens=15e12,
        outcome="stable",
        source="arXiv 2506.08027",
    ),
)
