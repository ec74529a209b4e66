"""FP8 in a model: the linear layer, the ledger that owns its scaling state, convert, revert
and switch.
"""  # noqa: D205

from unclamp.nn.adapted import Adapted
from unclamp.nn.attention import Attention, attention
from unclamp.nn.convert import (
    ConvertReport,
    RevertReport,
    convert,
    find_ledgers,
    first_and_last,
    revert,
)
from unclamp.nn.converted import Converted
from unclamp.nn.copies import EvaluatedSite, EvaluationCounts, evaluation_counts, refresh
from unclamp.nn.coverage import coverage
from unclamp.nn.covering import Example, cover
from unclamp.nn.layout import Site
from unclamp.nn.ledger import Ledger
from unclamp.nn.linear import Fp8Linear
from unclamp.nn.observe import Observation, ObservedSite, observe
from unclamp.nn.products import products_of
from unclamp.nn.saved import weights_only
from unclamp.nn.scaling_state import ScalingState
from unclamp.nn.step import step
from unclamp.nn.switch import SwitchReport, switch
from unclamp.nn.users_banks import grouped_mm

__all__ = [
    "Adapted",
    "Attention",
    "ConvertReport",
    "Converted",
    "EvaluatedSite",
    "EvaluationCounts",
    "Example",
    "Fp8Linear",
    "Ledger",
    "Observation",
    "ObservedSite",
    "RevertReport",
    "ScalingState",
    "Site",
    "SwitchReport",
    "attention",
    "convert",
    "cover",
    "coverage",
    "evaluation_counts",
    "find_ledgers",
    "first_and_last",
    "grouped_mm",
    "observe",
    "products_of",
    "refresh",
    "revert",
    "step",
    "switch",
    "weights_only",
]
