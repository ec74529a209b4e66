"""Stateless FP8 arithmetic on tensors: amax and scale, cast with its statistics, GEMM."""

from unclamp.numerics.blocks import block_grid
from unclamp.numerics.cast import cast, dequantize
from unclamp.numerics.gemm import matmul, matmul_each
from unclamp.numerics.inspection import empty_details, inspect
from unclamp.numerics.quantize import quantize
from unclamp.numerics.record import CastPlan, GemmOperand, Quantized, plain_operand, torch_dtype
from unclamp.numerics.scale import channel_scale, scale_from_amax
from unclamp.numerics.stats import Stat, empty_stats, merge_stats, merged_stats

__all__ = [
    "CastPlan",
    "GemmOperand",
    "Quantized",
    "Stat",
    "block_grid",
    "cast",
    "channel_scale",
    "dequantize",
    "empty_details",
    "empty_stats",
    "inspect",
    "matmul",
    "matmul_each",
    "merge_stats",
    "merged_stats",
    "plain_operand",
    "quantize",
    "scale_from_amax",
    "torch_dtype",
]
