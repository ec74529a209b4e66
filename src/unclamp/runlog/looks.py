"""Columns of `casts` that are measured on request only, and null elsewhere."""

import pyarrow as pa


def column(name: str, dtype: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    """Return a column whose meaning travels with it."""
    return pa.field(name, dtype, nullable=nullable, metadata={"meaning": meaning})


QUARTERED_OCTAVES = 6
"""Octaves whose quarters are logged: an old scale clamps elements of these."""
QUARTER = pa.struct(
    [
        pa.field("elements", pa.int64(), nullable=False),
        pa.field("mean", pa.float32(), nullable=False),
    ]
)
"""What a quarter of an octave holds."""

INSPECTED = [
    column(
        "sqnr_db",
        pa.float64(),
        "sum of squares of the finite elements over that of the cast's errors, decibel; Inf for "
        "an exact cast; null where the cast was not inspected or saw no non-zero element",
        nullable=True,
    ),
    column(
        "sqnr_row_median_db",
        pa.float64(),
        "median over rows of the ratio of each row alone, decibel, to 0.25: a row is a token of an "
        "input or grad_output, an output feature of a weight; rows without a non-zero element are "
        "left out; Inf where half of them are exact, null likewise",
        nullable=True,
    ),
    column(
        "range_used",
        pa.float64(),
        "share of the format's powers of two that at least one code lies in, fraction",
        nullable=True,
    ),
    column(
        "headroom_bits",
        pa.float64(),
        "log2 of the largest representable value over amax; below 0 where anything was clamped",
        nullable=True,
    ),
    column(
        "scale_age",
        pa.int32(),
        "updates of the site since the amax that the scale comes from; 0 where it is the tensor's "
        "own, null where it comes from no single one",
        nullable=True,
    ),
    column(
        "exponents",
        pa.map_(pa.int16(), pa.int64()),
        "floor(log2 |x|) to elements, count, over finite non-zero elements",
        nullable=True,
    ),
    column(
        "quarters",
        pa.map_(pa.int16(), QUARTER),
        "of the six highest octaves of exponents, each cut into four of equal width: quarter q of "
        "octave e, which begins at 2**e * (1 + q / 4), has the key 4 * e + q; to elements, count, "
        "and the mean of their |x|, in the tensor's unit; null in older logs, where the highest "
        "octave is not within -59 to 63, and likewise",
        nullable=True,
    ),
]
"""What costs a pass of its own: only at the steps that the recorder inspects, else null."""

GRADIENT = [
    column(
        "grad_error",
        pa.float64(),
        "of a grad_output: norm of what its clamping changed in the weight's gradient over the "
        "norm of that gradient without it, each over those of the step's casts that clamped; 0 "
        "where nothing was clamped, null where it was not measured or is not finite",
        nullable=True,
    ),
    column(
        "grad_cosine",
        pa.float64(),
        "cosine between the weight's gradient and the one without clamping; 1 and null likewise",
        nullable=True,
    ),
    column(
        "grad_ratio",
        pa.float64(),
        "norm of the weight's gradient over that of the one without clamping; 1 and null likewise",
        nullable=True,
    ),
    column(
        "weight_grad_norm",
        pa.float64(),
        "norm of the weight's gradient without clamping, of the loss as it was scaled: root of the "
        "sum of squares over those of the step's casts that clamped; null where none did, or it "
        "was not measured",
        nullable=True,
    ),
]
"""What clamping a gradient did to the weight's: where it clamped and was measured, else null."""

PRICE = [
    column(
        "price_clamp",
        pa.float64(),
        "of an input or weight: sum over the clamped elements of the gradient of the loss times "
        "what the cast changed, x_hat - x, in units of the loss, over all of the step's casts; "
        "above 0 where clamping raised the loss, to first order; 0 where nothing was clamped, null "
        "where it was not measured or is not finite",
        nullable=True,
    ),
    column(
        "price_rounding",
        pa.float64(),
        "the same over all other elements: rounding, and underflow with it; null unless the "
        "recorder was asked for it, and likewise",
        nullable=True,
    ),
]
"""What casts changed of the loss, to first order, where it was measured, else null."""
