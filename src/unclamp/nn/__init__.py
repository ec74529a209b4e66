"""FP8 in a model: the linear layer, the ledger that owns its scaling state, convert and revert."""

from unclamp.nn.convert import ConvertReport, RevertReport, convert, find_ledgers, revert
from unclamp.nn.ledger import Ledger, Site
from unclamp.nn.linear import Fp8Linear

__all__ = [
    "ConvertReport",
    "Fp8Linear",
    "Ledger",
    "RevertReport",
    "Site",
    "convert",
    "find_ledgers",
    "revert",
]
