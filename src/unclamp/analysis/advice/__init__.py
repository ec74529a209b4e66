"""Advice: which scaling a run needs, where, and why."""

from unclamp.analysis.advice.advise import Advice, GroupAdvice, advise
from unclamp.analysis.advice.record import PUBLIC_RUNS, PublicRun
from unclamp.analysis.advice.words import reasons, verdict_sentence

__all__ = [
    "PUBLIC_RUNS",
    "Advice",
    "GroupAdvice",
    "PublicRun",
    "advise",
    "reasons",
    "verdict_sentence",
]
