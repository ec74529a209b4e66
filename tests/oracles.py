"""Independent implementations that the casts are held to."""

import math

import gfloat
import ml_dtypes
import numpy as np
import torch
from gfloat.formats import format_info_ocp_e4m3, format_info_ocp_e5m2
from gfloat.types import Domain

from unclamp import Format
from unclamp.reference import is_saturated, round_to_format


def _fnuz(name: str, precision: int, bias: int) -> gfloat.FormatInfo:
    return gfloat.FormatInfo(
        name,
        8,
        precision,
        bias=bias,
        is_signed=True,
        domain=Domain.Finite,
        has_nz=False,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


GFLOAT = {
    "e4m3fn": format_info_ocp_e4m3,
    "e5m2": format_info_ocp_e5m2,
    "e4m3fnuz": _fnuz("e4m3fnuz", 4, 8),
    "e5m2fnuz": _fnuz("e5m2fnuz", 3, 16),
}
ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


def identical(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether values are the same to the bit, signs of zeros too; NaN payloads aside."""
    nan = np.isnan(a)
    return bool(
        np.array_equal(nan, np.isnan(b))
        and np.array_equal(a[~nan], b[~nan])
        and np.array_equal(np.signbit(a[~nan]), np.signbit(b[~nan]))
    )


def by_reference(x: np.ndarray, fmt: Format) -> np.ndarray:
    return np.array([round_to_format(v, fmt) for v in x.tolist()])


def by_gfloat(x: np.ndarray, fmt: Format) -> np.ndarray:
    rounded = gfloat.round_ndarray(GFLOAT[fmt.name], x.astype(np.float64), sat=True)
    return np.asarray(rounded, dtype=np.float64)


def by_ml_dtypes(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Unsaturated: what overflows becomes Inf or NaN."""
    with np.errstate(all="ignore"):
        return x.astype(np.float32).astype(ML_DTYPES[fmt.name]).astype(np.float64)


def count_lost(x: torch.Tensor, scale: float, fmt: Format) -> tuple[int, int, int]:
    """Count saturated, underflowed and non-finite elements one number at a time."""
    values = x.to(torch.float32).flatten().tolist()
    finite = [v for v in values if math.isfinite(v)]
    with np.errstate(over="ignore"):
        products = [float(np.float32(v) * np.float32(scale)) for v in finite]
    saturated = sum(is_saturated(p, fmt) or math.isinf(p) for p in products)
    underflowed = sum(
        v != 0 and round_to_format(p, fmt) == 0 for v, p in zip(finite, products, strict=True)
    )
    return saturated, underflowed, len(values) - len(finite)
