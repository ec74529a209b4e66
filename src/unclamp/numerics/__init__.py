"""Stateless FP8 arithmetic on tensors: amax and scale, cast with its statistics, GEMM."""

from unclamp.numerics.cast import Quantized, cast, dequantize, quantize, torch_dtype
from unclamp.numerics.scale import scale_from_amax
from unclamp.numerics.stats import Stat, empty_stats, merge_stats

__all__ = [
    "Quantized",
    "Stat",
    "cast",
    "dequantize",
    "empty_stats",
    "merge_stats",
    "quantize",
    "scale_from_amax",
    "torch_dtype",
]
