"""What a site's casts lost in total, and the formulas that say how bad it was.

Each formula stands here and nowhere else, in Python and, where a query needs it, in DuckDB's SQL
beside it. Counts come from a ledger, from the rows of a run log or from its summaries; which, is
for the reader. Torch-free: the functions compute with numbers, numpy arrays and tensors alike.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")
"""A float, a numpy array, or a tensor of any library: elementwise throughout."""

SCALED_AMAX_SQL = "amax::DOUBLE * scale"
"""`scaled_amax` of a row of `casts`; the columns are float32, and their product may not fit it."""
CLAMPED_SQL = "coalesce(clamped, saturated > 0, false)"
"""Whether a row of `casts` is known to have clamped; older logs tell it by their counts alone."""
LOOK_FIRST_SQL = "(saturated > 0 OR saturated IS NULL)"
"""True of all rows of which `CLAMPED_SQL` is; with it a query skips row groups without any."""
UNDECIDED_SQL = "clamped IS NULL AND saturated IS NULL"
"""Whether nobody knows that of a row."""
LOST_SQL = f"coalesce(saturated_error, greatest(1 - 1 / ({SCALED_AMAX_SQL}), 1e-6))"
"""What rows of `casts` that clamped are ordered by: the clamp error; where elements were not
counted, what rises with the scaled amax, which is above 0 and means nothing else."""


def scaled_amax(amax: Value, scale: Value) -> Value:
    """Return what the largest element became before the cast, in the format's unit.

    Numerics: An amax of 0 at a scale of Inf says nothing: NaN.
    """
    return amax * scale  # type: ignore[operator]


def overshoot(scaled: Value, format_max: Value | float) -> Value:
    """Return the largest scaled element over the format's largest value; above 1 it was clamped.

    Args:
        scaled: amax * scale, or amax / scale_inv.
        format_max: Largest finite value of the format.
    """
    return scaled / format_max  # type: ignore[operator]


def share(part: Value, whole: Value) -> Value:
    """Return `part` over `whole`, a fraction, and 0 where there is nothing to be a part of.

    Args:
        part: At most `whole`, and so 0 where that is.
        whole: At least 0.

    Numerics: NaN where either is NaN, or both are Inf.
    """
    # Adding 1 to a whole of 0 divides 0 by 1, with no branch that arrays would need.
    return part / (whole + (whole <= 0))  # type: ignore[operator]


def clamp_error(removed: Value, square: Value) -> Value:
    """Return the share of a tensor's squares that clamping removed.

    Args:
        removed: Sum of squares of what was cut off the clamped elements.
        square: Sum of squares of the finite elements.
    """
    return share(removed, square)


def clamp_error_bound(overshoot: Value) -> Value:
    """Return the largest clamp error that a cast with this overshoot can have, fraction.

    Each clamped element loses (|x| - t)**2 of x**2, and |x| is at most the overshoot times t.

    Args:
        overshoot: 1 or more; a numpy array or a float.
    """
    return (1 - 1 / overshoot) ** 2  # type: ignore[operator, return-value]


def headroom_bits(scaled: float, format_max: float) -> float:
    """Return log2 of the format's largest value over the largest scaled element, which is not 0.

    It is below 0 where anything was clamped.
    """
    return math.log2(format_max / scaled)


@dataclass(frozen=True, kw_only=True)
class GradientChange:
    """What clamping did to gradients of weights, as sums of squares; `a + b` is of both together.

    With C the gradient as it was computed and U the one without clamping:

    Attributes:
        computed: Sum of squares of C.
        unclamped: Sum of squares of U.
        change: Sum of squares of U - C.
        product: Sum of products of C and U.
    """

    computed: float = 0.0
    unclamped: float = 0.0
    change: float = 0.0
    product: float = 0.0

    @classmethod
    def of(cls, *, computed: float, change: float, product: float) -> "GradientChange":
        """Return it from what a look measures: `product` is that of C and the change."""
        unclamped = computed + 2 * product + change
        return cls(
            computed=computed,
            unclamped=max(0.0, unclamped),
            change=change,
            product=computed + product,
        )

    @property
    def is_nothing(self) -> bool:
        """Whether clamping changed nothing."""
        return self.change == 0

    @property
    def error(self) -> float:
        """Norm of the change over that of U; 0 where nothing was clamped, NaN where U is 0."""
        return 0.0 if self.is_nothing else _root_ratio(self.change, self.unclamped)

    @property
    def ratio(self) -> float:
        """Norm of C over that of U; 1 where nothing was clamped, NaN where U is 0."""
        return 1.0 if self.is_nothing else _root_ratio(self.computed, self.unclamped)

    @property
    def cosine(self) -> float:
        """Cosine between C and U; 1 where nothing was clamped, NaN where one of them is 0."""
        if self.is_nothing:
            return 1.0
        norms = math.sqrt(self.computed) * math.sqrt(self.unclamped)
        return min(1.0, max(-1.0, self.product / norms)) if norms > 0 else math.nan

    @property
    def descent_lost(self) -> float:
        """Share of the weight's descent that clamping takes, to first order and under plain SGD.

        A step along U lowers the loss by the learning rate times <U, U>, one along C by <U, C>.
        It is 1 - cosine * ratio: 0 where nothing was clamped, above 1 where the step goes up.
        """
        return 0.0 if self.is_nothing else 1 - self.cosine * self.ratio

    @property
    def norm(self) -> float:
        """Norm of U."""
        return math.sqrt(self.unclamped)

    @property
    def is_known(self) -> bool:
        """Whether error, ratio and cosine are numbers; not where the gradient was NaN or Inf."""
        return all(map(math.isfinite, (self.error, self.ratio, self.cosine)))

    def __add__(self, other: "GradientChange") -> "GradientChange":
        """Return that of both."""
        return GradientChange(
            computed=self.computed + other.computed,
            unclamped=self.unclamped + other.unclamped,
            change=self.change + other.change,
            product=self.product + other.product,
        )


def _root_ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class SiteTotals:
    """What the casts of one site added up to; `a + b` is what both did.

    A row is what a run log keeps of a step on a rank: the casts of its microsteps, merged.

    Attributes:
        rows: Rows added up.
        casts: Casts made.
        elements: Elements cast.
        saturated: Finite elements clamped.
        underflowed: Non-zero elements that became zero.
        nonfinite: Inf and NaN elements.
        recasts: Casts repeated with the true scale.
        clamped_rows: Rows in which anything was clamped.
        overshoot: Largest amax over the largest representable value.
        clamp_error_sum: Clamp errors of all rows, added up: what sites are ranked by.
        clamp_error_max: The largest of them.
        worst_step: First step that had it; None where nothing was clamped.
        sqnr_db_min: Least signal-to-noise ratio, decibel; None where no cast was inspected, Inf
            where all inspected ones were exact.
        sqnr_db_sum: The finite ones, added up.
        sqnr_rows: How many were finite.
        uncounted: Rows of which only the largest element is known, as of the scaling state of
            others: they clamped or not, and how many elements is not known.
        undecided: Of these, the rows of which nobody knows whether they clamped.
    """

    rows: int = 0
    casts: int = 0
    elements: int = 0
    saturated: int = 0
    underflowed: int = 0
    nonfinite: int = 0
    recasts: int = 0
    clamped_rows: int = 0
    overshoot: float = 0.0
    clamp_error_sum: float = 0.0
    clamp_error_max: float = 0.0
    worst_step: int | None = None
    sqnr_db_min: float | None = None
    sqnr_db_sum: float = 0.0
    sqnr_rows: int = 0
    uncounted: int = 0
    undecided: int = 0

    @property
    def decided_rows(self) -> int:
        """Rows of which it is known whether they clamped: what `clamped_rows` are a share of."""
        return self.rows - self.undecided

    @property
    def is_counted(self) -> bool:
        """Whether the elements of all rows were counted."""
        return not self.uncounted

    @property
    def clamp_error(self) -> float | None:
        """Mean clamp error of the rows in which anything was clamped; 0 without any.

        None where elements were not counted, and so are the shares.
        """
        return share(self.clamp_error_sum, self.clamped_rows) if self.is_counted else None

    @property
    def underflow_share(self) -> float | None:
        """Underflowed elements, a fraction of all."""
        return share(self.underflowed, self.elements) if self.is_counted else None

    @property
    def saturated_share(self) -> float | None:
        """Clamped elements, a fraction of all."""
        return share(self.saturated, self.elements) if self.is_counted else None

    @property
    def sqnr_db_mean(self) -> float | None:
        """Mean of the finite signal-to-noise ratios, decibel; None without one."""
        return self.sqnr_db_sum / self.sqnr_rows if self.sqnr_rows else None

    def __add__(self, other: "SiteTotals") -> "SiteTotals":
        """Return what both did; of equal largest clamp errors that of `self` has the worst step."""
        worst = max((self, other), key=lambda totals: totals.clamp_error_max)
        sqnr = [t.sqnr_db_min for t in (self, other) if t.sqnr_db_min is not None]
        return SiteTotals(
            rows=self.rows + other.rows,
            casts=self.casts + other.casts,
            elements=self.elements + other.elements,
            saturated=self.saturated + other.saturated,
            underflowed=self.underflowed + other.underflowed,
            nonfinite=self.nonfinite + other.nonfinite,
            recasts=self.recasts + other.recasts,
            clamped_rows=self.clamped_rows + other.clamped_rows,
            overshoot=max(self.overshoot, other.overshoot),
            clamp_error_sum=self.clamp_error_sum + other.clamp_error_sum,
            clamp_error_max=worst.clamp_error_max,
            worst_step=worst.worst_step,
            sqnr_db_min=min(sqnr, default=None),
            sqnr_db_sum=self.sqnr_db_sum + other.sqnr_db_sum,
            sqnr_rows=self.sqnr_rows + other.sqnr_rows,
            uncounted=self.uncounted + other.uncounted,
            undecided=self.undecided + other.undecided,
        )
