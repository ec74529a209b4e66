"""A converted model on several processes: what travels between them in FP8."""

from unclamp.parallel.fsdp import GatherReport, gather_codes

__all__ = ["GatherReport", "gather_codes"]
